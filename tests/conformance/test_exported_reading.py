"""Exported descriptors: faults are read. The numbers are those of the checklist of the protocol."""

from __future__ import annotations

import errno
import os
import select
import signal
import struct
from typing import TYPE_CHECKING

import pytest
from tests.conformance.exported_tools import IN, OUT, VERSION, make_ground, make_scene  # noqa: F401
from tests.conformance.protocol_tools import handling, number, page_of, there, wait_until

from userfault.kernel import memory, process
from userfault.kernel.memory import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conformance.exported_tools import Ground, Scene
    from tests.conformance.protocol_tools import Background, Touched


def test_exported_item_7_r_idle_it_says_eagain_if_it_does_not_block(scene: Scene) -> None:
    served = scene.running()
    os.set_blocking(served.program.fd, False)
    with pytest.raises(BlockingIOError) as caught:
        os.read(served.program.fd, 8)
    assert caught.value.errno == errno.EAGAIN


def test_exported_item_7_r_a_blocking_read_ends_on_a_fault(scene: Scene) -> None:
    served = scene.running()
    reading = scene.stage.call(os.read, served.program.fd, 8)
    touch = scene.stage.start_read(served.at(3))
    served.program.answer(number(reading.result()), 1)
    assert touch.result() == there(1)


def test_exported_item_7_r_a_blocking_read_ends_with_eintr(scene: Scene) -> None:
    served = scene.running()

    class InterruptedByPurposeError(Exception):
        pass

    def interrupt(*_: object) -> None:  # what it raises, Python raises instead of reading again
        raise InterruptedByPurposeError

    with handling(signal.SIGALRM, interrupt):
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pytest.raises(InterruptedByPurposeError):
            os.read(served.program.fd, 8)
    (touch,) = served.touch(0)
    served.program.answer(served.program.fault(), 1)
    assert touch.result() == there(1)


@pytest.mark.parametrize("length", [8, 9, 16, 4096])
def test_exported_item_8_r_a_read_gives_one_address_however_large_the_buffer(scene: Scene, length: int) -> None:
    served = scene.running()
    touches = served.touch(0, 1, 2)
    found = [os.read(served.program.fd, length) for _ in range(3)]

    assert [len(data) for data in found] == [8] * 3
    assert sorted(map(number, found)) == [served.at(0), served.at(1), served.at(2)]
    for data in found:
        served.program.answer(number(data), 7)
    assert [touch.result() for touch in touches] == [there(7)] * 3


def test_exported_item_9_r_a_fault_is_reported_once(scene: Scene) -> None:
    served = scene.running()
    os.set_blocking(served.program.fd, False)
    (touch,) = served.touch(1)
    assert served.program.fault() == served.at(1)

    served.program.becomes(OUT)
    served.prove()
    with pytest.raises(BlockingIOError):
        os.read(served.program.fd, 8)
    served.program.answer(served.at(1), 2)
    assert touch.result() == there(2)
    served.prove()
    with pytest.raises(BlockingIOError):
        os.read(served.program.fd, 8)


def test_exported_item_10_r_two_threads_on_one_page_are_two_reads(scene: Scene) -> None:
    served = scene.running()
    touches = [served.touch_at(served.at(1, byte)) for byte in (5, 4000)]

    assert sorted([served.program.fault(), served.program.fault()]) == [served.at(1, 5), served.at(1, 4000)]

    served.waiting(0, 2)
    served.program.answer(served.at(1), 3)
    assert [touch.result() for touch in touches] == [there(3)] * 2
    assert served.info.answered == 2


@pytest.mark.parametrize("byte", [0, 1, 7, 2048, PAGE_SIZE - 1])
def test_exported_item_11_r_the_address_is_where_it_was_touched(scene: Scene, byte: int) -> None:
    served = scene.running()
    touch = served.touch_at(served.at(2, byte))

    assert served.program.fault() == served.at(2, byte)

    served.program.answer(served.at(2), 3)
    assert touch.result() == there(3)


def test_exported_item_11_r_a_write_is_a_fault_like_a_read(scene: Scene) -> None:
    served = scene.running()
    touch = scene.stage.start_write(served.at(2, 9), 77)
    assert served.program.fault() == served.at(2, 9)

    served.program.answer(served.at(2), 3)

    assert touch.result() == there(0)
    page = bytearray(page_of(3))
    page[9] = 77
    assert os.pread(served.program.memory_fd, PAGE_SIZE, 2 * PAGE_SIZE) == page


def test_the_oldest_fault_is_read_first(scene: Scene) -> None:
    """The proposal gave the newest; nobody relied on it."""
    served = scene.running(6)
    pages = (4, 1, 5, 0, 3, 2)
    touches = served.touch(*pages)
    assert [served.program.fault() for _ in pages] == [served.at(page) for page in pages]
    for page in pages:
        served.program.put(page, page + 1)
    served.program.announce(0, 6)
    assert [touch.result().byte for touch in touches] == [page + 1 for page in pages]


def test_a_read_of_less_than_8_bytes_loses_the_rest_of_the_address(scene: Scene) -> None:
    """The proposal's says EINVAL and the fault stays unread; a socket cannot. It counts as read."""
    served = scene.running()
    (touch,) = served.touch(3)
    assert os.read(served.program.fd, 3) == served.at(3).to_bytes(8, "little")[:3]
    served.waiting(0, 1)

    served.exported.renew()
    served.program.handshake()
    assert served.program.fault() == served.at(3)
    served.program.answer(served.at(3), 1)
    assert touch.result() == there(1)


# -- poll, select and epoll -------------------------------------------------------------------------------------------


def by_poll(fd: int) -> int:
    poll = select.poll()
    poll.register(fd, IN | OUT)
    return dict(poll.poll(0)).get(fd, 0)


def by_select(fd: int) -> int:
    readable, writable, strange = select.select([fd], [fd], [fd], 0)
    assert not strange
    return (IN if readable else 0) | (OUT if writable else 0)


def by_epoll(fd: int) -> int:
    with select.epoll() as epoll:
        epoll.register(fd, IN | OUT)
        return dict(epoll.poll(0)).get(fd, 0)


def by_edge(fd: int) -> int:
    """Ask an epoll that has not told anything of it yet."""
    with select.epoll() as epoll:
        epoll.register(fd, IN | OUT | select.EPOLLET)
        return dict(epoll.poll(0)).get(fd, 0)


WAYS = {"poll": by_poll, "select": by_select, "epoll": by_epoll, "epoll, edges": by_edge}


@pytest.mark.parametrize("ask", WAYS.values(), ids=WAYS)
def test_exported_items_20_and_21_p_all_four_combinations(scene: Scene, ask: Callable[[int], int]) -> None:
    served = scene.fresh()
    fd = served.program.fd

    def becomes(events: int) -> None:
        wait_until(lambda: ask(fd) == events)
        if served.exported.state.name == "RUNNING":
            served.prove()
            assert ask(fd) == events, "it did not stay so"

    becomes(OUT)
    served.program.write(bytes(8))
    becomes(IN)
    os.read(fd, 8)
    becomes(OUT)
    served.program.write(VERSION)
    becomes(IN)
    os.read(fd, 8)
    wait_until(lambda: served.info.state == "RUNNING")
    becomes(0)  # none
    touches = served.touch(0, 1, 2)
    becomes(IN)  # unread only
    first = served.program.fault()
    becomes(IN | OUT)  # both
    served.program.answer(first, 1)
    becomes(IN)
    rest = [served.program.fault(), served.program.fault()]
    becomes(OUT)  # read only
    served.program.answer(rest[0], 1)
    becomes(OUT)
    served.program.answer(rest[1], 1)
    becomes(0)
    assert [touch.result() for touch in touches] == [there(1)] * 3


@pytest.mark.parametrize("wanted", [IN, OUT])
def test_exported_item_21_p_whoever_waits_is_woken(scene: Scene, wanted: int) -> None:
    served = scene.running()
    if wanted == OUT:
        touches = served.touch(0)
        served.prove()
    waiting = scene.stage.call(served.program.poll, 20, wanted)
    if wanted == IN:
        touches = served.touch(0)
        assert waiting.result() == IN
        address = served.program.fault()
    else:
        address = served.program.fault()
        assert waiting.result() == OUT
    served.program.answer(address, 2)
    assert touches[0].result() == there(2)


class Edges:
    """Counts how often an event is told, each time that it is."""

    def __init__(self, fd: int, event: int) -> None:
        self._fd, self._event = fd, event
        self._epoll = select.epoll()
        self._epoll.register(fd, event | select.EPOLLET)

    def more(self) -> int:
        """How many there have been since the last time: 0 or 1, as epoll has it."""
        found = self._epoll.poll(0)
        assert found in ([], [(self._fd, self._event)])
        return len(found)

    def one(self) -> None:
        """Wait for one."""
        assert self._epoll.poll(20) == [(self._fd, self._event)]

    def close(self) -> None:
        self._epoll.close()


def test_exported_item_21_p_edges_are_told_when_it_turns_on_and_at_no_other_time(scene: Scene, soak: bool) -> None:
    """While it is off nothing makes it flicker: not writes that are refused, nor faults that come and are not read."""
    served = scene.running(8)
    edges, faults = Edges(served.program.fd, OUT), Edges(served.program.fd, IN)

    def refuse_some(rounds: int) -> None:
        for data in (b"", b"7 bytes", struct.pack("=QQ", served.at(1), served.at(1)), bytes(16000), bytes(20000)):
            served.refused(errno.ERANGE if len(data) > 7 else errno.EINVAL, data)
        served.prove([struct.pack("=QQ", served.at(0), served.at(8))] * rounds)

    for turn in range(2000 if soak else 60):
        refuse_some(turn % 30)
        assert (edges.more(), faults.more()) == (0, 0), "nobody waits"
        touches = served.touch(0, 1)
        assert faults.more() == 1
        refuse_some(turn % 30)
        assert (edges.more(), faults.more()) == (0, 0), "nothing was read"
        first = served.program.fault()
        edges.one()
        served.waiting(1, 2)
        second = served.program.fault()
        served.waiting(0, 2)
        assert edges.more() == 0, "it was on already"
        for address in (first, second):
            served.program.put((address - served.address) // PAGE_SIZE, 1)
        served.program.announce(0, 8)
        served.waiting(0, 0)
        refuse_some(turn % 30)
        assert (edges.more(), faults.more()) == (0, 0), "nobody waits any more"
        assert [touch.result() for touch in touches] == [there(1)] * 2
        served.program.drop(0, 8)
    edges.close()
    faults.close()


def test_while_it_is_on_a_write_may_be_told_as_an_edge_and_it_is_on(scene: Scene) -> None:
    """A socket tells of room for writing whenever a packet is taken from it. The proposal's would say nothing."""
    served = scene.running(8)
    edges = Edges(served.program.fd, OUT)
    touches = served.touch(0, 1)
    first, second = served.program.fault(), served.program.fault()
    edges.one()
    served.waiting(0, 2)
    for _ in range(50):
        served.refused(errno.ENOENT, struct.pack("=QQ", served.at(4), served.at(8)))
        if edges.more():
            assert served.program.poll() == OUT
    served.program.answer(first, 1)
    served.waiting(0, 1)
    edges.more()
    assert served.program.poll() == OUT
    served.program.answer(second, 1)
    served.program.becomes(0)
    edges.more()
    served.prove()
    assert edges.more() == 0
    assert [touch.result() for touch in touches] == [there(1)] * 2
    edges.close()


def test_edges_of_the_handshake(scene: Scene) -> None:
    served = scene.fresh()
    edges, answers = Edges(served.program.fd, OUT), Edges(served.program.fd, IN)
    edges.one()
    for number_ in range(50):
        served.program.write(struct.pack("=Q", number_))
        answers.one()
        os.read(served.program.fd, 8)
        edges.one()
        wait_until(lambda: served.info.state == "ASK_PROTOCOL")
        assert (edges.more(), answers.more()) == (0, 0)
    served.program.write(VERSION)
    answers.one()
    os.read(served.program.fd, 8)
    wait_until(lambda: served.info.state == "RUNNING")
    served.prove()
    assert (edges.more(), answers.more()) == (0, 0)
    edges.close()
    answers.close()


# -- fdinfo -----------------------------------------------------------------------------------------------------------


def test_exported_item_22_fdinfo_through_one_fault(scene: Scene) -> None:
    served = scene.running()
    assert served.info.waiting == (0, 0)
    (touch,) = served.touch(0)
    assert served.info.waiting == (1, 1)
    address = served.program.fault()
    served.waiting(0, 1)
    served.program.answer(address, 1)
    assert touch.result() == there(1)
    assert served.info.waiting == (0, 0), "who goes on is not counted any more"
    assert served.info.answered == 1


def test_exported_item_22_fdinfo_of_three_of_which_two_are_read(scene: Scene) -> None:
    served = scene.running()
    touches = served.touch(0, 1, 2)
    assert served.info.waiting == (3, 3)
    served.program.fault()
    served.program.fault()
    served.waiting(1, 3)
    assert served.program.fault() == served.at(2)
    for page in range(3):
        served.program.put(page, 4)
    served.program.announce(0, 3)
    assert [touch.result() for touch in touches] == [there(4)] * 3
    assert served.info.answered == 3


# -- many, and system calls -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [64, 200])
def test_a_burst_of_threads(scene: Scene, threads: int) -> None:
    """More than the socket's queue takes at once: POLLOUT is told for each that is read nevertheless."""
    served = scene.running(threads)
    touches = served.touch(*range(threads))
    assert served.info.waiting == (threads, threads)

    first = served.program.fault()
    served.program.becomes(IN | OUT)
    served.waiting(threads - 1, threads)
    served.program.answer(first, 200)
    served.waiting(threads - 1, threads - 1)
    served.program.becomes(IN)
    addresses = [served.program.fault() for _ in range(threads - 1)]
    served.waiting(0, threads - 1)
    assert sorted([first, *addresses]) == [served.at(page) for page in range(threads)]
    for address in addresses:
        served.program.answer(address, 200)

    assert [touch.result() for touch in touches] == [there(200)] * threads
    assert served.info.waiting == (0, 0)
    assert served.info.refused == 0


def test_a_burst_on_one_page_is_answered_by_one_range_write(scene: Scene) -> None:
    served = scene.running()
    touches = [served.touch_at(served.at(2, byte)) for byte in range(64)]
    assert sorted(served.program.fault() for _ in touches) == [served.at(2, byte) for byte in range(64)]
    served.waiting(0, 64)
    served.program.answer(served.at(2), 6)
    assert [touch.result() for touch in touches] == [there(6)] * 64
    assert (served.info.answered, served.info.refused) == (64, 0)


@pytest.mark.parametrize("pages", [1, 3])
def test_exported_item_24_l_a_system_call_waits_and_succeeds(scene: Scene, ground: Ground, pages: int) -> None:
    if ground.pager.user_mode_only:
        pytest.skip("faults inside system calls take CAP_SYS_PTRACE, or vm.unprivileged_userfaultfd = 1")
    served = scene.running(2 * pages)
    length = pages * PAGE_SIZE
    reader, writer = os.pipe()
    source = scene.file(pages)
    os.pwrite(source, b"S" * length, 0)
    try:
        with memory.view(served.at(0), length) as out, memory.view(served.at(pages), length) as into:
            writing = scene.stage.call(os.write, writer, out)
            for page in range(pages):
                address = served.program.fault()
                assert address & -PAGE_SIZE == served.at(page)
                served.program.answer(address, page + 1)
            assert writing.result() == length
            assert os.read(reader, length) == b"".join(page_of(page + 1) for page in range(pages))

            reading = scene.stage.call(os.preadv, source, [into], 0)
            for page in range(pages, 2 * pages):
                address = served.program.fault()
                assert address & -PAGE_SIZE == served.at(page)
                served.program.answer(address, 9)
            assert reading.result() == length
            assert bytes(into) == b"S" * length
    finally:
        os.close(reader)
        os.close(writer)


def waits_again(touch: Background[Touched]) -> bool:
    """Whether every signal of a thread has been handled, and it sleeps in its fault."""
    status = process._fields(f"/proc/self/task/{touch.thread_id}/status")
    return not int(status["SigPnd"], 16) and process.waits_in_user_fault(os.getpid(), touch.thread_id)


def test_a_thread_that_a_signal_interrupts_is_told_once_as_long_as_it_is_unread(scene: Scene) -> None:
    served = scene.running()
    hits: list[int] = []
    with handling(signal.SIGUSR1, lambda *_: hits.append(1)):
        (touch,) = served.touch(1)
        for _ in range(20):
            signal.pthread_kill(touch.ident, signal.SIGUSR1)
        wait_until(lambda: hits and waits_again(touch))
        served.prove()
        assert served.info.waiting == (1, 1)
        address = served.program.fault()
        served.waiting(0, 1)
        assert served.program.poll() & IN == 0
        signal.pthread_kill(touch.ident, signal.SIGUSR1)
        served.waiting(1, 1)  # it asks again, since it waits anew
        assert served.program.fault() == address
        served.program.answer(address, 5)
        assert touch.result() == there(5)
    assert served.info.waiting == (0, 0)
