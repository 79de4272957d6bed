"""Exported descriptors: how one ends, and what becomes of the memory, the waiting threads and the program."""

from __future__ import annotations

import mmap
import os
import select
import signal
import socket
import struct
from errno import EPIPE
from typing import TYPE_CHECKING

import pytest
from tests.conformance.exported_tools import IN, OUT, make_ground, make_scene, shared_mapping  # noqa: F401
from tests.conformance.protocol_tools import page_of, sigbus, there

import userfault
from userfault import madvise, userfaultfd
from userfault.kernel.memory import PAGE_SIZE
from userfault.protocol import MADV_NOUSERFAULT, MADV_USERFAULT, UFFD_CLOEXEC, UFFD_NONBLOCK
from userfault.testing import run_child
from userfault.testing import touch as touch_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conformance.exported_tools import Scene, Served


def close_it(served: Served) -> None:
    served.exported.close()


def close_its_owner(served: Served) -> None:
    served.exported._owner.close()


def leave_its_context(served: Served) -> None:
    with served.exported:
        pass


def leave_its_owner_s_context(served: Served) -> None:
    with served.exported._owner:
        pass


CLOSINGS = {
    "close": close_it,
    "close the UserfaultFD": close_its_owner,
    "leave the context": leave_its_context,
    "leave the UserfaultFD's context": leave_its_owner_s_context,
}


@pytest.mark.parametrize("close", CLOSINGS.values(), ids=CLOSINGS)
def test_exported_item_25_l_close_while_threads_wait(scene: Scene, close: Callable[[Served], None]) -> None:
    """Whoever waits gets SIGBUS and never a zero, read or not; nor does what was not announced become visible."""
    served = scene.running(8)
    answered, read, unread, written, half = served.touch(0, 1, 2, 3, 4)
    served.program.answer(served.program.fault(), 9)
    assert answered.result() == there(9)
    assert served.program.fault() == served.at(1)
    served.waiting(3, 4)
    served.program.put(3, 7)
    os.pwrite(served.program.memory_fd, b"half", 4 * PAGE_SIZE)
    served.program.put(5, 7)
    fd = os.dup(served.program.fd)

    close(served)

    for touch in (read, unread, written, half):
        assert touch.result().signal == signal.SIGBUS
    assert os.read(fd, 8) == b"", "the program reads the end of the file"
    assert scene.stage.read(served.at(0)) == there(9)
    for page in range(1, 8):
        assert scene.stage.read(served.at(page)) == sigbus(served.at(page)), page
        assert scene.stage.write(served.at(page)) == sigbus(served.at(page)), page
    assert served.exported.closed
    assert served.exported._owner.closed
    assert scene.pager.regions == 0
    close(served)
    os.close(fd)


@pytest.mark.parametrize("state", ["fresh", "asked", "running", "unread", "read", "written"])
def test_the_program_reads_the_end_of_the_file_and_nothing_else(scene: Scene, state: str) -> None:
    """Whatever it has not read, or the worker has not heard: no fault that nobody waits for, no ECONNRESET."""
    served = scene.fresh(2) if state in ("fresh", "asked") else scene.running(2)
    if state == "asked":
        served.program.write(bytes(8))
    touches = served.touch(0, 1) if state in ("unread", "read", "written") else []
    if state in ("read", "written"):
        served.program.fault()
    if state == "written":
        for _ in range(30):
            served.program.write(struct.pack("=QQ", served.at(1), served.at(2)))
        for data in (b"", bytes(1000), b""):
            served.program.write(data)
    fd = os.dup(served.program.fd)
    served.exported.close()

    for _ in range(3):
        assert os.read(fd, 8) == b""
    poll = select.poll()
    poll.register(fd, IN | OUT)
    assert dict(poll.poll(0))[fd] & (IN | select.POLLHUP) == IN | select.POLLHUP
    with pytest.raises(OSError, match="pipe") as caught:  # and no SIGPIPE, which would have killed us
        os.write(fd, bytes(16))
    assert caught.value.errno == EPIPE
    os.close(fd)
    assert [touch.result().signal for touch in touches] == [signal.SIGBUS] * len(touches)


def test_a_program_that_waits_is_woken(scene: Scene) -> None:
    served = scene.running(1)
    fd = os.dup(served.program.fd)
    reading = scene.stage.call(os.read, fd, 8)
    polling = scene.stage.call(select.select, [fd], [], [])
    served.exported.close()
    assert reading.result() == b""
    assert polling.result() == ([fd], [], [])
    os.close(fd)


def test_a_program_that_writes_without_end_ends_with_it(scene: Scene) -> None:
    served = scene.running(2)
    fd = os.dup(served.program.fd)
    served.touch(0)

    def write_on() -> int:
        try:
            while True:
                os.write(fd, struct.pack("=QQ", served.at(1), served.at(2)))
        except OSError as error:
            return error.errno or -1

    writing = [scene.stage.call(write_on) for _ in range(2)]
    served.exported.close()
    assert [thread.result() for thread in writing] == [EPIPE] * 2
    os.close(fd)


def test_exported_item_26_l_a_system_call_fails_afterwards(scene: Scene) -> None:
    served = scene.running(2)
    reader, writer = os.pipe()
    served.exported.close()
    with (
        userfault.kernel.memory.view(served.address, PAGE_SIZE) as view,
        pytest.raises(OSError, match="Bad address"),
    ):
        os.write(writer, view)
    os.close(reader)
    os.close(writer)


def test_afterwards_it_can_be_ordinary_memory_again(scene: Scene) -> None:
    served = scene.running(4)
    served.program.put(1, 7)
    (touch,) = served.touch(0)
    served.program.answer(served.program.fault(), 9)
    assert touch.result() == there(9)
    served.exported.close()
    assert scene.stage.read(served.at(1)) == sigbus(served.at(1))

    madvise((served.address, 4 * PAGE_SIZE), MADV_NOUSERFAULT)

    assert touch_bytes(served.address, 4 * PAGE_SIZE) == page_of(9) + page_of(7) + page_of(0) * 2


def test_afterwards_it_can_be_exported_anew(scene: Scene) -> None:
    """What was announced stays visible, what was not has to be, and what is not in the file is asked for."""
    served = scene.running(4)
    for page in (0, 1):
        served.program.put(page, page + 1)
    (touch,) = served.touch(0)
    served.program.fault()
    served.program.announce(0)
    assert touch.result() == there(1)
    for round_ in range(10):
        served.exported.close()
        descriptor = userfaultfd(UFFD_NONBLOCK | UFFD_CLOEXEC)
        scene.stage.keep(descriptor)
        descriptor.register((served.address, 4 * PAGE_SIZE))
        served = scene.served(descriptor.export(pager=scene.pager))
        served.program.handshake()
        assert scene.stage.read(served.at(0)) == there(1)
        if not round_:
            (touch,) = served.touch(1)
            assert served.program.fault() == served.at(1)
            served.program.announce(1)
            assert touch.result() == there(2)
        assert scene.stage.read(served.at(1)) == there(2)
    (touch,) = served.touch(2)
    served.program.answer(served.program.fault(), 3)
    assert touch.result() == there(3)


def test_its_last_fdinfo_can_be_read(scene: Scene) -> None:
    served = scene.running(1)
    served.prove()
    served.exported.close()
    assert (served.info.state, served.info.refused) == ("RUNNING", 1)


def test_closing_races_with_touches(scene: Scene, soak: bool) -> None:
    """Threads touch, a program answers, and in the middle it is closed: the right byte or SIGBUS, and never another."""
    pages = 64
    for _ in range(100 if soak else 8):
        served = scene.running(pages)
        fd, memory_fd = os.dup(served.program.fd), os.dup(served.program.memory_fd)

        def serve(served: Served = served, fd: int = fd, memory_fd: int = memory_fd) -> None:
            try:
                while data := os.read(fd, 8):
                    page = (int.from_bytes(data, "little") - served.address) // PAGE_SIZE
                    os.pwrite(memory_fd, page_of(7), page * PAGE_SIZE)
                    os.write(fd, struct.pack("=QQ", served.at(page), served.at(page + 1)))
            except OSError as error:
                assert error.errno == EPIPE  # noqa: PT017  # closed between its read and its write

        program = scene.stage.call(serve)
        often = [
            scene.stage.background(scene.stage.toucher.start_often(served.address, pages, 7, first=first, step=3))
            for first in range(3)
        ]
        while sum(thread.touches for thread in often) < pages // 2:
            pass
        served.exported.close()
        for thread in often:
            thread.stop()
        for thread in often:
            tally = thread.result()
            assert (tally.zeros, tally.others, tally.sigsegv) == (0, 0, 0), tally
            assert tally.right + tally.sigbus == tally.touches
        program.result()
        os.close(fd)
        os.close(memory_fd)


# -- other processes --------------------------------------------------------------------------------------------------


def be_served_by_a_fork(who_closes: str) -> tuple[bytes, int, int]:
    """Fork a child that is the program; return what was read, how the child ended, and what its copies could do."""
    pages = 8
    with shared_mapping(pages) as shared, userfault.Pager() as pager:
        madvise(shared, MADV_USERFAULT)
        descriptor = userfaultfd(UFFD_NONBLOCK | UFFD_CLOEXEC)
        descriptor.register(shared)
        exported = descriptor.export(pager=pager)
        child = os.fork()
        if not child:
            os._exit(serve_in_child(exported, pages))
        found = bytes(shared[page * PAGE_SIZE] for page in range(pages))
        if who_closes == "Exported":
            exported.close()
        else:
            descriptor.close()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        refused = int(exported.fdinfo().partition("refused:\t")[2].partition("\n")[0])
        madvise(shared, MADV_NOUSERFAULT)
    return found, status, refused


def serve_in_child(exported: userfault.Exported, pages: int) -> int:
    fd, memory = os.dup(exported.fileno()), mmap.mmap(exported.memory_fd, pages * PAGE_SIZE)
    try:
        exported.renew()
        return 1
    except userfault.PagerLostError:  # it is the parent's
        pass
    address = exported.address
    exported.close()  # this process's copies only
    os.write(fd, (0xAA).to_bytes(8, "little"))
    if os.read(fd, 8)[0] != 0xAA:
        return 2
    while data := os.read(fd, 8):
        start = int.from_bytes(data, "little") & -PAGE_SIZE
        offset = start - address
        memory[offset : offset + PAGE_SIZE] = page_of(offset // PAGE_SIZE + 1)
        os.write(fd, struct.pack("=QQ", start, start + PAGE_SIZE))
    return 0


@pytest.mark.parametrize("who_closes", ["Exported", "UserfaultFD"])
def test_a_forked_child_may_be_the_program(who_closes: str) -> None:
    """Its touches from Python hold the GIL: the program is another process."""
    assert run_child(be_served_by_a_fork, who_closes).check().value == (bytes(range(1, 9)), 0, 0)


def test_it_can_be_sent_to_another_process(scene: Scene) -> None:
    served = scene.running(2)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        socket.send_fds(ours, [b"x"], [served.exported.fileno(), served.exported.memory_fd])
        _, (fd, memory_fd), _, _ = socket.recv_fds(theirs, 1, 2)
    (touch,) = served.touch(1)
    assert int.from_bytes(os.read(fd, 8), "little") == served.at(1)
    os.pwrite(memory_fd, page_of(4), PAGE_SIZE)
    os.write(fd, struct.pack("=QQ", served.at(1), served.at(2)))
    assert touch.result() == there(4)
    os.close(fd)
    os.close(memory_fd)
