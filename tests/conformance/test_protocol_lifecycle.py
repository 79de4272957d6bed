"""System calls into the memory, close, several descriptors, and death (items 24 to 27, 29)."""

from __future__ import annotations

import errno
import os
import signal
from typing import TYPE_CHECKING

import pytest
from tests.conformance.protocol_tools import (
    handling,
    number,
    page_of,
    sigbus,
    there,
    wait_until,
    waiters,
)

from userfault.errors import KernelError
from userfault.kernel import fdinfo, memory, process
from userfault.protocol import UFFD_CLOEXEC

if TYPE_CHECKING:
    from subprocess import Popen

    from tests.conformance.conftest import RunChild, StartChild
    from tests.conformance.protocol_tools import Stage, Touched

    from userfault.protocol import Descriptor

KINDS = pytest.mark.parametrize("shared", [False, True])


def receive(fd: int, address: int, length: int = 8) -> int:
    """Read from a descriptor into memory."""
    with memory.view(address, length) as view:
        return os.readv(fd, [view])


def send(fd: int, address: int, length: int = 8) -> int:
    """Write memory to a descriptor."""
    with memory.view(address, length) as view:
        return os.write(fd, view)


def ends(touched: Touched) -> tuple[int, int]:
    """Return the signal and its address; a thread that waited may see either code of SIGBUS."""
    return touched.signal, touched.address


# -- the checklist -----------------------------------------------------------------------------------------------


@KINDS
def test_item_24_l_a_read_2_into_the_memory_waits_and_succeeds(stage: Stage, shared: bool) -> None:
    reader, writer = stage.pipe()
    descriptor = stage.descriptor(user_mode_only=False)
    page = stage.marked(1, descriptor, shared=shared)
    os.write(writer, b"received")

    call = stage.call(receive, reader, page + 16)
    assert stage.fault(descriptor) == page + 16
    assert call.waiting
    stage.answer(descriptor, page, 7)

    assert call.result() == 8
    assert stage.bytes_at(page + 15, 10) == b"\7received\7"


@KINDS
def test_item_24_l_a_write_2_from_the_memory_waits_and_succeeds(stage: Stage, shared: bool) -> None:
    reader, writer = stage.pipe()
    descriptor = stage.descriptor(user_mode_only=False)
    page = stage.marked(1, descriptor, shared=shared)

    call = stage.call(send, writer, page + 16)
    assert stage.fault(descriptor) == page + 16
    assert call.waiting
    stage.answer(descriptor, page, 7)

    assert call.result() == 8
    assert os.read(reader, 100) == b"\7" * 8


@KINDS
def test_item_25_l_close_releases_every_thread_with_sigbus(stage: Stage, shared: bool) -> None:
    descriptor = stage.descriptor()
    page = stage.marked(6, descriptor, shared=shared)
    addresses = [page + place * stage.page + place for place in range(6)]
    touches = stage.start_reads(descriptor, addresses[:4])
    touches += [stage.start_write(address) for address in addresses[4:]]
    wait_until(lambda: waiters(descriptor)[1] == 6)
    stage.faults(descriptor, 2)

    descriptor.close()

    assert [ends(touch.result()) for touch in touches] == [(signal.SIGBUS, address) for address in addresses]
    assert [stage.read(address) for address in addresses] == [sigbus(address) for address in addresses]
    assert stage.there(page, 6) == [False] * 6


@KINDS
def test_item_25_l_close_lets_a_thread_go_on_whose_page_was_placed_and_not_woken(stage: Stage, shared: bool) -> None:
    descriptor = stage.descriptor()
    page = stage.marked(3, descriptor, shared=shared)
    touches = stage.start_reads(descriptor, [page, page + stage.page, page + 2 * stage.page])
    stage.faults(descriptor, 2)  # the last one is unread
    descriptor.place(page, page_of(7))
    descriptor.place(page + 2 * stage.page, page_of(9))

    descriptor.close()

    first, second, third = (touch.result() for touch in touches)
    assert (first, third) == (there(7), there(9))
    assert ends(second) == (signal.SIGBUS, page + stage.page)


@KINDS
def test_item_25_l_close_ends_a_system_call_that_waits_with_efault(stage: Stage, shared: bool) -> None:
    descriptor = stage.descriptor(user_mode_only=False)
    page = stage.marked(2, descriptor, shared=shared)

    def call(writer: int, address: int) -> int | None:
        try:
            return send(writer, address)
        except OSError as error:
            return error.errno

    calls = [stage.call(call, stage.pipe()[1], page)]
    stage.fault(descriptor)
    calls.append(stage.call(call, stage.pipe()[1], page + stage.page))
    wait_until(lambda: waiters(descriptor) == (1, 2))
    descriptor.close()

    assert [call.result() for call in calls] == [errno.EFAULT] * 2


@KINDS
def test_item_26_l_without_a_descriptor_a_touch_is_sigbus_and_a_system_call_efault(stage: Stage, shared: bool) -> None:
    reader, writer = stage.pipe()
    page = stage.marked(1, shared=shared)
    os.write(writer, b"received")

    assert [stage.read(page + 77), stage.write(page + 78)] == [sigbus(page + 77), sigbus(page + 78)]
    for call, fd in ((receive, reader), (send, writer)):
        with pytest.raises(OSError, match="Bad address") as caught:
            call(fd, page)
        assert caught.value.errno == errno.EFAULT
    assert stage.there(page) == [False]


def test_item_26_l_a_descriptor_for_user_mode_only_serves_touches_and_no_system_calls(stage: Stage) -> None:
    reader, writer = stage.pipe()
    descriptor = stage.descriptor(user_mode_only=True)
    page = stage.marked(1, descriptor)
    os.write(writer, b"received")

    assert descriptor.user_mode_only
    for call, fd in ((receive, reader), (send, writer)):
        with pytest.raises(OSError, match="Bad address"):
            call(fd, page)
    assert waiters(descriptor) == (0, 0)
    (touch,) = stage.start_reads(descriptor, [page])
    stage.answer(descriptor, stage.fault(descriptor), 7)
    assert touch.result() == there(7)
    assert receive(reader, page) == 8


def test_item_27_l_there_may_be_any_number_of_descriptors(stage: Stage) -> None:
    # In July a second one was EBUSY, until the first was closed.
    descriptors = [stage.descriptor() for _ in range(50)]

    assert len({descriptor.fileno() for descriptor in descriptors}) == 50


BLOCKED = """
    import ctypes, mmap
    import userfault
    from userfault.protocol import *
    descriptor = userfault.userfaultfd(UFFD_CLOEXEC)
    descriptor.handshake()
    mm = mmap.mmap(-1, P)
    descriptor.register(mm)
    userfault.madvise(mm, MADV_USERFAULT)
    print(descriptor.fileno(), flush=True)
"""
TOUCH = "mm[0]"
SYSTEM_CALL = "os.write(os.pipe()[1], mm)"
IN_A_THREAD = "threading.Thread(target=memory.fetch, args=(memory.address_of(mm), 8)).start()"


@pytest.mark.parametrize("way", [TOUCH, SYSTEM_CALL, IN_A_THREAD])
@pytest.mark.parametrize("killer", [signal.SIGKILL, signal.SIGTERM])
def test_item_29_l_a_process_whose_thread_is_blocked_can_be_killed(
    start_child: StartChild, way: str, killer: signal.Signals
) -> None:
    child: Popen[str] = start_child(f"{BLOCKED}    {way}\n")
    assert child.stdout is not None
    fd = int(child.stdout.readline())
    wait_until(lambda: fdinfo.read_fdinfo(fd, child.pid).total == 1)

    child.send_signal(killer)

    assert child.wait(20) == -killer


# -- several descriptors -------------------------------------------------------------------------------------------


def test_two_libraries_in_one_process_never_see_each_others_faults(stage: Stage) -> None:
    pages = 256
    start = stage.anonymous(pages)
    libraries = [stage.descriptor(UFFD_CLOEXEC), stage.descriptor(UFFD_CLOEXEC)]
    for place in range(pages):
        libraries[place % 2].register((start + place * stage.page, stage.page))
    stage.mark(start, pages)

    def serve(descriptor: Descriptor, byte: int) -> list[int]:
        served: list[int] = []
        while True:
            try:
                served.append(number(descriptor.read()))
            except KernelError:  # EBADF: it has been closed
                return served
            stage.answer(descriptor, served[-1], byte)

    pagers = [stage.call(serve, descriptor, byte) for byte, descriptor in enumerate(libraries, 1)]
    quarters = [range(start + place * stage.page, start + pages * stage.page, 4 * stage.page) for place in range(4)]
    walkers = [stage.call(lambda quarter: [stage.read(page).byte for page in quarter], quarter) for quarter in quarters]

    assert [walker.result() for walker in walkers] == [[1] * 64, [2] * 64, [1] * 64, [2] * 64]
    stage.unmark(start, pages)
    for descriptor in libraries:
        descriptor.close()
    assert [sorted(pager.result()) for pager in pagers] == [
        list(range(start + place * stage.page, start + pages * stage.page, 2 * stage.page)) for place in (0, 1)
    ]


@KINDS
def test_a_range_passes_from_one_descriptor_to_the_next_with_its_pages(stage: Stage, shared: bool) -> None:
    page = stage.marked(8, shared=shared)

    for place in range(8):
        with stage.descriptor() as descriptor:
            descriptor.register((page, 8 * stage.page))
            (touch,) = stage.start_reads(descriptor, [page + place * stage.page])
            stage.answer(descriptor, stage.fault(descriptor), place + 1)
            assert touch.result() == there(place + 1)

    found = [stage.read(page + place * stage.page) for place in range(8)]
    assert found == [there(place + 1) for place in range(8)]


def test_an_open_descriptor_costs_one_file_and_the_guard_another_while_memory_is_marked(stage: Stage) -> None:
    counts = [len(process.userfaultfds())]
    descriptor = stage.descriptor()
    counts.append(len(process.userfaultfds()))
    page = stage.marked(1, descriptor)
    counts.append(len(process.userfaultfds()))
    descriptor.close()
    counts.append(len(process.userfaultfds()))
    stage.unmark(page)
    counts.append(len(process.userfaultfds()))

    assert counts == [0, 1, 1, 1, 0]


def test_a_descriptor_that_cannot_be_had_leaves_nothing(run_child: RunChild) -> None:
    result = run_child(
        """
        import resource
        import userfault
        userfault.userfaultfd().close()
        held = len(os.listdir("/proc/self/fd")) - 1
        resource.setrlimit(resource.RLIMIT_NOFILE, (held, held))
        try:
            userfault.userfaultfd()
        except KernelError as error:
            print(errno.errorcode[error.errno], error.syscall)
        """
    )

    assert (result.stdout, result.stderr) == ("EMFILE userfaultfd\n", "")


READER = """
    import ctypes, struct
    readv = ctypes.CDLL(None, use_errno=True).process_vm_readv
    data = ctypes.create_string_buffer(8)
    local, remote = struct.pack("@PN", ctypes.addressof(data), 8), struct.pack("@PN", {address}, 8)
    print(readv({pid}, local, 1, remote, 1, 0), data.raw)
"""


def test_another_process_that_reads_the_memory_waits_as_a_thread_does(stage: Stage, start_child: StartChild) -> None:
    # And it is not forgotten when a thread is: one that a signal interrupts, so that its first fault is out of date.
    descriptor = stage.descriptor(user_mode_only=False)
    page = stage.marked(2, descriptor)
    child = start_child(READER.format(address=page, pid=os.getpid()))
    assert stage.fault(descriptor) == page
    (touch,) = stage.start_reads(descriptor, [page + stage.page])
    stage.fault(descriptor)
    with handling(signal.SIGUSR1, lambda *_: None):
        signal.pthread_kill(touch.ident, signal.SIGUSR1)
        wait_until(lambda: waiters(descriptor) == (1, 2))

    stage.answer(descriptor, page, 7)

    assert child.communicate(timeout=20)[0] == "8 " + repr(b"\7" * 8) + "\n"
    stage.answer(descriptor, stage.fault(descriptor), 8)
    assert touch.result() == there(8)
