"""Exported descriptors: ranges are written. The numbers are those of the checklist of the protocol.

A socket takes every write, so that a refusal is said in words by `fdinfo`, and nothing else happens.
"""

from __future__ import annotations

import os
import select
import socket
import struct
from errno import EINVAL, EMSGSIZE, ENOENT, EPIPE, ERANGE
from typing import TYPE_CHECKING

import pytest
from tests.conformance.exported_tools import IN, OUT, VERSION, make_ground, make_scene  # noqa: F401
from tests.conformance.protocol_tools import there, wait_until

from userfault.errors import KernelError
from userfault.kernel.memory import PAGE_SIZE
from userfault.protocol import Register, Unregister, Wake

if TYPE_CHECKING:
    from tests.conformance.exported_tools import Ground, Scene, Served

TOP = 1 << 64


def words(start: int, end: int) -> bytes:
    return struct.pack("=QQ", start % TOP, end % TOP)


def wake(served: Served, page: int, count: int = 1) -> bytes:
    return Wake(served.at(page), served.at(page + count)).encode()


@pytest.mark.parametrize("length", [0, 1, 8, 15])
def test_exported_item_12_w_too_short(scene: Scene, length: int) -> None:
    served = scene.running()
    (touch,) = served.touch(0)
    served.program.put(0, 1)
    served.program.fault()

    assert f"{length} bytes: a range is two" in served.refused(EINVAL, wake(served, 0)[:length])

    served.waiting(0, 1)
    assert touch.waiting
    served.program.announce(0)
    assert touch.result() == there(1)


def test_exported_item_12_w_empty_or_backwards(scene: Scene) -> None:
    served = scene.running()
    (touch,) = served.touch(1)
    served.program.fault()
    for start, end in ((0, 0), (1, 1), (1, 0), (4, 3)):
        served.refused(ERANGE, words(served.at(start), served.at(end)))
    served.refused(ERANGE, words(served.at(1), 0))
    served.refused(ERANGE, words(-PAGE_SIZE, 0))
    served.refused(ERANGE, bytes(16))
    assert touch.waiting
    served.program.answer(served.at(1), 1)
    assert touch.result() == there(1)
    assert served.info.refused == 7


def test_exported_item_30_x_unaligned_or_both_bits(scene: Scene) -> None:
    served = scene.running()
    (touch,) = served.touch(1)
    served.program.put(1, 1)
    served.program.fault()
    start, end = served.at(1), served.at(2)
    for first, last in (
        (start + 4, end),
        (start + PAGE_SIZE // 2, end),
        (start - 1, end),
        (start, end + 1),
        (start, end - 1),
        (start | 1, end + 8),
        (start | 2, end + 8),
        (start | 3, end),
        (start | 3 | 8, end),
        (3, 0),
    ):
        served.refused(EINVAL, words(first, last))
    assert touch.waiting
    served.program.announce(1)
    assert touch.result() == there(1)


def test_exported_item_13_w_nobody_waits(scene: Scene) -> None:
    served = scene.running()
    assert "nobody waits" in served.refused(ENOENT, wake(served, 0))
    served.refused(ENOENT, wake(served, 0, 4))
    served.refused(ENOENT, words(0, -PAGE_SIZE))
    served.refused(ENOENT, words(PAGE_SIZE, 2 * PAGE_SIZE))
    served.refused(ENOENT, words(1 << 63, -PAGE_SIZE))
    assert served.info.refused == 5
    assert served.program.poll() == 0


def test_exported_item_14_w_an_unread_fault_stays(scene: Scene) -> None:
    served = scene.running()
    (touch,) = served.touch(2)

    for _ in range(3):
        served.refused(ENOENT, wake(served, 0, 4))

    assert touch.waiting
    assert served.info.waiting == (1, 1)
    assert served.program.poll() == IN
    served.program.answer(served.program.fault(), 1)
    assert touch.result() == there(1)


def test_exported_item_14_w_an_unread_fault_stays_though_its_page_is_there(scene: Scene) -> None:
    """Announced before it was read: the page can be seen, and who waits for it has to be let go by a second write."""
    served = scene.running()
    (touch,) = served.touch(2)
    served.program.put(2, 1)
    served.refused(ENOENT, wake(served, 2))
    assert scene.stage.read(served.at(2, 9)) == there(1), "whoever comes now finds it"

    served.prove()
    assert touch.waiting
    assert served.info.waiting == (1, 1)
    assert served.program.fault() == served.at(2)
    served.program.becomes(OUT)
    served.program.announce(2)

    assert touch.result() == there(1)
    assert (served.info.answered, served.info.refused) == (1, 2)


def test_exported_item_15_w_a_range_that_ends_at_the_fault_does_not_cover_it(scene: Scene) -> None:
    served = scene.running()
    (touch,) = served.touch(2)
    served.program.put(2, 1)
    address = served.program.fault()

    served.refused(ENOENT, words(served.at(0), address))
    served.refused(ENOENT, words(address + PAGE_SIZE, served.at(4)))
    assert touch.waiting
    served.program.write(words(address, address + PAGE_SIZE))

    assert touch.result() == there(1)


@pytest.mark.parametrize("beyond", [False, True], ids=["", "larger than the memory"])
def test_exported_item_16_w_one_range_covers_several(scene: Scene, beyond: bool) -> None:
    served = scene.running(6)
    touches = served.touch(0, 2, 5)
    for page in (0, 2, 5):
        served.program.put(page, page + 1)
    for _ in touches:
        served.program.fault()
    served.waiting(0, 3)

    served.program.write(words(0, -PAGE_SIZE) if beyond else wake(served, 0, 6))

    assert [touch.result().byte for touch in touches] == [1, 3, 6]
    assert (served.info.answered, served.info.refused) == (3, 0)
    assert served.program.poll() == 0


def test_exported_item_17_w_without_the_page_the_same_fault_appears_again(scene: Scene) -> None:
    served = scene.running()
    touch = served.touch_at(served.at(1, 17))
    for turn in range(1, 6):
        assert served.program.fault() == served.at(1, 17)
        served.program.announce(1)
        wait_until(lambda turn=turn: served.info.answered == turn)  # type: ignore[misc]
        served.waiting(1, 1)
    assert touch.waiting
    served.program.answer(served.program.fault(), 3)
    assert touch.result() == there(3)
    assert (served.info.answered, served.info.refused) == (6, 0)


def test_exported_item_18_w_the_same_range_twice(scene: Scene) -> None:
    served = scene.running()
    (touch,) = served.touch(1)
    served.program.answer(served.program.fault(), 3)
    assert touch.result() == there(3)
    served.refused(ENOENT, wake(served, 1))


def test_exported_item_19_w_a_range_that_also_covers_unread_faults_wakes_only_the_read_ones(scene: Scene) -> None:
    served = scene.running(6)
    first, second, third = served.touch(0, 1, 2)
    for page in range(3):
        served.program.put(page, page + 1)
    assert served.program.fault() == served.at(0)
    served.waiting(2, 3)

    served.program.write(wake(served, 0, 6))

    assert first.result() == there(1)
    served.prove()
    assert served.info.waiting == (2, 2)
    assert second.waiting
    assert third.waiting
    assert served.program.fault() == served.at(1)
    served.waiting(1, 2)
    served.program.write(wake(served, 0, 6))
    assert second.result() == there(2)
    served.prove()
    assert third.waiting
    assert served.program.fault() == served.at(2)
    served.program.write(wake(served, 0, 6))
    assert third.result() == there(3)


def test_item_19_does_not_hold_within_a_page(scene: Scene) -> None:
    """The kernel of today wakes everybody on a page. Who was unread goes on; its fault is read, and answered, after."""
    served = scene.running()
    touches = [served.touch_at(served.at(1, byte)) for byte in (3, 4)]
    assert served.program.fault() == served.at(1, 3)
    served.waiting(1, 2)

    served.program.answer(served.at(1), 8)

    assert [touch.result() for touch in touches] == [there(8)] * 2
    served.waiting(1, 1)
    served.program.becomes(IN)
    assert served.program.fault() == served.at(1, 4)
    served.program.becomes(OUT)
    served.program.announce(1)
    served.waiting(0, 0)
    assert (served.info.answered, served.info.refused) == (2, 0)


# -- registration: it is fixed ----------------------------------------------------------------------------------------


def test_exported_item_31_x_what_is_registered_is_fixed(scene: Scene) -> None:
    served = scene.running()
    (touch,) = served.touch(1)
    inside, beyond = (served.at(0), served.at(4)), (served.at(0), served.at(5))

    served.program.write(Register(*inside).encode())
    served.prove()
    assert served.info.refused == 1, "it is registered already: that is no error"
    for command in (Register(*beyond), Unregister(*inside), Unregister(*beyond), Register(0, PAGE_SIZE)):
        before = served.info.refused
        served.program.write(command.encode())
        wait_until(lambda before=before: served.info.refused > before)  # type: ignore[misc]
        assert "is fixed" in served.info.refusal

    assert touch.waiting
    served.program.answer(served.program.fault(), 1)
    assert touch.result() == there(1)


def test_exported_item_32_x_each_sees_only_its_own_faults(scene: Scene) -> None:
    one, other = scene.running(), scene.running()
    (mine,), (theirs,) = one.touch(1), other.touch(2)

    one.refused(ENOENT, wake(other, 0, 4))
    assert one.program.fault() == one.at(1)
    assert other.program.fault() == other.at(2)
    one.prove([wake(other, 0, 4)])
    assert theirs.waiting
    one.program.answer(one.at(1), 1)
    other.program.answer(other.at(2), 2)

    assert (mine.result(), theirs.result()) == (there(1), there(2))
    assert (one.info.refused, other.info.refused) == (3, 0)


# -- what only a socket has to fear -----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [17, 24, 1000, 15999, 16000, 16001, 16640, 40000])
def test_what_is_written_behind_the_range_is_ignored(scene: Scene, length: int) -> None:
    """Also if it is exactly as long as what the worker parks in the socket."""
    served = scene.running()
    for filling in (b"\0", b"\xff"):
        (touch,) = served.touch(1)
        served.program.put(1, 5)
        assert served.program.fault() == served.at(1)
        served.program.write(wake(served, 1).ljust(length, filling))
        assert touch.result() == there(5)
        served.program.becomes(0)
        served.program.drop(1)
    served.refused(ERANGE, bytes(length))
    assert served.program.poll() == 0


def test_a_write_that_does_not_fit_into_the_socket_is_refused_by_it(scene: Scene) -> None:
    served = scene.running()
    with pytest.raises(OSError, match="Message too long") as caught:
        os.write(served.program.fd, wake(served, 0).ljust(100_000))
    assert caught.value.errno == EMSGSIZE
    served.prove()
    assert served.info.refused == 1


def test_empty_writes_are_heard_each(scene: Scene) -> None:
    served = scene.running()
    served.prove([b""] * 30)
    (touch,) = served.touch(0)
    served.prove([b""] * 30)
    assert served.program.poll() == IN
    served.program.answer(served.program.fault(), 1)
    assert touch.result() == there(1)
    served.program.becomes(0)


@pytest.mark.parametrize("waits", ["nobody", "unread", "read"])
def test_hundreds_of_range_writes_in_a_row(scene: Scene, waits: str) -> None:
    """More than the socket's buffer takes: the writes wait for the worker, who hears each of them."""
    served = scene.running()
    touches = served.touch(1) if waits != "nobody" else []
    if waits == "read":
        served.program.fault()
        served.waiting(0, 1)

    for _ in range(500):
        served.program.write(wake(served, 3))
    wait_until(lambda: served.info.refused == 500)

    served.program.becomes({"nobody": 0, "unread": IN, "read": OUT}[waits])
    if waits == "unread":
        served.program.fault()
    if waits != "nobody":
        served.program.answer(served.at(1), 3)
        assert touches[0].result() == there(3)
        served.program.becomes(0)


def test_several_threads_write_more_than_fits(scene: Scene) -> None:
    """Nobody sleeps for ever for want of room, and whoever looks for POLLOUT in the end sees what it should be."""
    served = scene.running()
    (touch,) = served.touch(1)

    def write_often() -> None:
        for _ in range(400):
            os.write(served.program.fd, wake(served, 3))

    writers = [scene.stage.call(write_often) for _ in range(4)]
    for writer in writers:
        writer.result()
    wait_until(lambda: served.info.refused == 1600)
    served.program.becomes(IN)
    served.program.answer(served.program.fault(), 3)
    assert touch.result() == there(3)
    served.program.becomes(0)


def test_a_write_that_would_wait_says_eagain_if_it_does_not_block(scene: Scene) -> None:
    """The proposal's never waits, nor says so."""
    served = scene.running()
    os.set_blocking(served.program.fd, False)
    written = refused = 0
    for _ in range(2000):
        try:
            written += os.write(served.program.fd, wake(served, 3))
        except BlockingIOError:  # EAGAIN
            refused += 1
    os.set_blocking(served.program.fd, True)
    wait_until(lambda: served.info.refused == written // 16)
    assert written // 16 + refused == 2000
    served.program.becomes(0)


HALVES = {"reading": socket.SHUT_RD, "writing": socket.SHUT_WR, "both": socket.SHUT_RDWR}


@pytest.mark.parametrize("half", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("when", ["fresh", "idle", "unread", "read"])
def test_a_program_that_shuts_its_end_down(scene: Scene, ground: Ground, half: int, when: str) -> None:
    """That cannot be taken back. The worker neither dies nor spins, and `close` lets go of whoever waits."""
    served = scene.fresh() if when == "fresh" else scene.running()
    touches = served.touch(0, 1) if when in ("unread", "read") else []
    if when == "read":
        served.program.fault()
        served.waiting(1, 2)
    with socket.socket(fileno=os.dup(served.program.fd)) as end:
        end.shutdown(half)

    touches += served.touch(2)
    if half != socket.SHUT_RD:
        with pytest.raises(OSError, match="pipe") as caught:
            os.write(served.program.fd, VERSION)
        assert caught.value.errno == EPIPE
    else:
        served.program.write(wake(served, 3))
    if half != socket.SHUT_WR:
        assert served.program.poll() & IN
    if half == socket.SHUT_RDWR:
        assert ground.rests(0.1)
    with pytest.raises(KernelError, match="shut the descriptor down") as renewed:
        served.exported.renew()
    assert renewed.value.errno == EPIPE
    served.exported.close()
    assert all(touch.result().signal for touch in touches)


def test_a_program_that_closes_its_copy(scene: Scene) -> None:
    """It is not the only one: nothing happens, and another may go on with another copy."""
    served = scene.running()
    copy = os.dup(served.program.fd)
    touches = served.touch(0, 1)
    assert int.from_bytes(os.read(copy, 8), "little") == served.at(0)
    os.close(copy)

    served.program.answer(served.at(0), 1)
    assert touches[0].result() == there(1)
    served.program.answer(served.program.fault(), 2)
    assert touches[1].result() == there(2)


def test_descriptors_that_are_sent_along_are_let_go(scene: Scene) -> None:
    served = scene.running()
    reader, writer = os.pipe()
    with socket.socket(fileno=os.dup(served.program.fd)) as end:
        socket.send_fds(end, [wake(served, 0)], [writer])
    os.close(writer)
    assert select.select([reader], [], [], 20)[0], "the worker keeps it"
    os.close(reader)
    served.prove()
    assert served.info.refused == 2
