"""The specification's checklist against the kernel: opening, the handshake, fdinfo (items 1 to 6, 23, 28).

Here and in the other `test_protocol_*` files a test that is named after an item has the form of October 2014 ("V2")
where that of July differs, and says so.
"""

from __future__ import annotations

import array
import fcntl
import os
import select
import struct
from errno import EAGAIN, EBADF, EFAULT, EINVAL
from typing import TYPE_CHECKING

import pytest
from tests.conformance.protocol_tools import kernel_errno, protocol_errno, sigbus

from userfault import madvise
from userfault.errors import KernelError
from userfault.kernel import memory, process
from userfault.protocol import (
    MADV_USERFAULT,
    UFFD_CLOEXEC,
    UFFD_NONBLOCK,
    USERFAULTFD_PROTOCOL,
    Descriptor,
    State,
    Version,
    Wake,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conformance.conftest import RunChild
    from tests.conformance.protocol_tools import Stage

MAGIC = struct.pack("=Q", 0xAA)
ONES = b"\xff" * 8


# -- the checklist -----------------------------------------------------------------------------------------------


def test_item_1_h_a_fresh_descriptor_polls_out_and_cannot_be_read(stage: Stage) -> None:
    fresh = stage.fresh()

    assert fresh.poll() == select.POLLOUT
    assert protocol_errno(fresh.read, 8) == EINVAL
    assert protocol_errno(fresh.read, 7) == EINVAL


def test_item_2_h_a_version_takes_eight_bytes_and_the_rest_is_ignored(stage: Stage) -> None:
    one, other = stage.fresh(), stage.fresh()

    assert protocol_errno(one.write, MAGIC[:7]) == EINVAL
    assert one.write(MAGIC) == 8
    assert other.write(MAGIC + ONES) == 8
    assert other.read() == MAGIC


def test_item_3_h_the_magic_is_acknowledged_and_then_it_runs(stage: Stage) -> None:
    fresh = stage.fresh()

    assert fresh.write(MAGIC) == 8
    assert (fresh.state, fresh.poll()) == (State.ACK_PROTOCOL, select.POLLIN)
    assert protocol_errno(fresh.write, MAGIC) == EINVAL
    assert protocol_errno(fresh.write, MAGIC * 2) == EINVAL
    assert protocol_errno(fresh.read, 7) == EINVAL
    assert fresh.state is State.ACK_PROTOCOL
    assert fresh.read(8) == MAGIC
    assert (fresh.state, fresh.poll()) == (State.RUNNING, 0)


def test_item_4_h_another_version_is_refused_by_ones_and_the_magic_still_works(stage: Stage) -> None:
    fresh = stage.fresh()

    assert fresh.write(Version(0xAB).encode()) == 8
    assert fresh.poll() == select.POLLIN
    assert fresh.read(8) == ONES
    assert (fresh.state, fresh.poll()) == (State.ASK_PROTOCOL, select.POLLOUT)
    assert fresh.handshake()


def test_item_5_h_several_versions_are_refused_in_a_row(stage: Stage) -> None:
    fresh = stage.fresh()

    assert [fresh.handshake(version) for version in (0, 1, 0xA9, 0xAB, 1 << 63, (1 << 64) - 1)] == [False] * 6
    assert fresh.handshake(USERFAULTFD_PROTOCOL)


def test_item_6_h_a_write_while_a_refusal_is_unread_is_einval(stage: Stage) -> None:
    # In both versions of the code that was posted it stopped the machine.
    fresh = stage.fresh()
    fresh.write(Version(1).encode())

    for data in (b"", MAGIC, MAGIC * 2, Wake(0, 4096).encode()):
        assert protocol_errno(fresh.write, data) == EINVAL

    assert fresh.read() == ONES
    assert fresh.handshake()


def test_item_23_fdinfo_shows_the_protocol(stage: Stage) -> None:
    assert stage.fresh().fdinfo() == "pending:\t0\ntotal:\t0\nprotocols:\taa\n"
    assert stage.descriptor().fdinfo() == "pending:\t0\ntotal:\t0\nprotocols:\taa\n"
    assert stage.fresh(versions=(0xAB, 0xAA)).fdinfo().endswith("protocols:\taa ab\n")


@pytest.mark.parametrize("flag", [1, os.O_APPEND, os.O_RDWR, 1 << 40, UFFD_NONBLOCK | 1])
def test_item_28_l_other_flags_are_einval(flag: int) -> None:
    before = os.listdir("/proc/self/fd")

    with pytest.raises(KernelError) as caught:
        Descriptor(flag)

    assert (caught.value.errno, caught.value.syscall) == (EINVAL, "userfaultfd")
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("nonblock", [0, UFFD_NONBLOCK])
@pytest.mark.parametrize("cloexec", [0, UFFD_CLOEXEC])
def test_item_28_l_cloexec_and_nonblock_are_honoured(stage: Stage, cloexec: int, nonblock: int) -> None:
    fd = stage.fresh(cloexec | nonblock).fileno()

    assert bool(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC) == bool(cloexec)
    assert bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK) == bool(nonblock)


def test_item_28_l_fcntl_switches_between_waiting_and_not(stage: Stage) -> None:
    descriptor = stage.descriptor(0)
    page = stage.marked(1, descriptor)

    os.set_blocking(descriptor.fileno(), False)
    with pytest.raises(BlockingIOError) as caught:
        descriptor.read()
    os.set_blocking(descriptor.fileno(), True)
    reader = stage.call(descriptor.read)
    stage.start_read(page)

    assert caught.value.errno == EAGAIN
    assert reader.result() == struct.pack("=Q", page)


# -- buffers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "buffer",
    [
        bytearray(MAGIC),
        memoryview(MAGIC),
        array.array("Q", [0xAA]),
        memoryview(MAGIC + ONES)[:8],
        bytearray(MAGIC + ONES),
    ],
)
def test_a_version_may_be_any_buffer(stage: Stage, buffer: bytearray) -> None:
    fresh = stage.fresh()

    assert fresh.write(buffer) == 8
    assert fresh.read() == MAGIC


@pytest.mark.parametrize("running", [False, True])
def test_a_buffer_that_cannot_be_read_is_efault_and_changes_nothing(stage: Stage, running: bool) -> None:
    descriptor = stage.descriptor() if running else stage.fresh()
    nothing = stage.anonymous(1, prot=memory.PROT_NONE)
    before = descriptor.state, descriptor.poll()

    with memory.view(nothing, 16) as buffer:
        assert kernel_errno(descriptor.write, buffer) == EFAULT

    assert (descriptor.state, descriptor.poll()) == before


def test_a_buffer_half_of_which_cannot_be_read_is_efault(stage: Stage) -> None:
    fresh, pages = stage.fresh(), stage.anonymous(2)
    memory.protect(pages + stage.page, stage.page, memory.PROT_NONE)

    with memory.view(pages + stage.page - 4, 8) as buffer:
        assert kernel_errno(fresh.write, buffer) == EFAULT

    assert fresh.state is State.ASK_PROTOCOL


def test_a_buffer_in_marked_memory_that_nobody_serves_is_efault(stage: Stage) -> None:
    fresh, page = stage.fresh(), stage.marked(1)

    with memory.view(page, 8) as buffer:
        assert kernel_errno(fresh.write, buffer) == EFAULT

    assert fresh.state is State.ASK_PROTOCOL


@pytest.mark.parametrize("wrong", ["\xaa" * 8, 0xAA, None, [0xAA] * 8])
def test_what_is_no_buffer_is_a_type_error(stage: Stage, wrong: object) -> None:
    fresh = stage.fresh()

    with pytest.raises(TypeError):
        fresh.write(wrong)  # type: ignore[arg-type]

    assert fresh.state is State.ASK_PROTOCOL


# -- closed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("running", [False, True])
def test_a_closed_descriptor_is_ebadf_for_everything(stage: Stage, running: bool) -> None:
    descriptor, page = stage.descriptor() if running else stage.fresh(), stage.anonymous(1)
    descriptor.close()
    descriptor.close()
    calls: list[tuple[Callable[..., object], tuple[object, ...]]] = [
        (descriptor.read, (8,)),
        (descriptor.write, (MAGIC * 2,)),
        (descriptor.poll, ()),
        (descriptor.wait, (0,)),
        (descriptor.fdinfo, ()),
        (descriptor.fileno, ()),
        (descriptor.handshake, ()),
        (descriptor.register, ((page, stage.page),)),
        (descriptor.unregister, ((page, stage.page),)),
        (descriptor.place, (page, bytes(stage.page))),
    ]

    assert [kernel_errno(call, *args) for call, args in calls] == [EBADF] * len(calls)
    assert descriptor.closed


def test_a_forgotten_descriptor_is_warned_about_and_closed(stage: Stage) -> None:
    page = stage.anonymous(1)
    descriptor = Descriptor(UFFD_CLOEXEC)
    descriptor.register((page, stage.page))
    held, number = process.userfaultfds(), descriptor.fileno()

    with pytest.warns(ResourceWarning, match=r"<Descriptor fd=\d+ ASK_PROTOCOL> was never closed"):
        del descriptor

    assert process.userfaultfds() == [fd for fd in held if fd != number]


def test_the_memory_of_a_forgotten_descriptor_is_no_zeros(stage: Stage) -> None:
    page = stage.anonymous(1)
    descriptor = Descriptor(UFFD_CLOEXEC)
    descriptor.register((page, stage.page))
    madvise((page, stage.page), MADV_USERFAULT)

    with pytest.warns(ResourceWarning, match="was never closed"):
        del descriptor

    assert stage.read(page) == sigbus(page)


def test_a_forgotten_descriptor_is_closed_where_warnings_are_errors(run_child: RunChild) -> None:
    result = run_child(
        """
        import gc, warnings
        from userfault import Reservation, userfaultfd
        warnings.simplefilter("error")
        reservation, descriptor = Reservation(P), userfaultfd()
        address, held = reservation.address, process.userfaultfds()
        del reservation, descriptor
        gc.collect()
        print(len(held), process.userfaultfds(), any(entry.start == address for entry in maps.read_maps()))
        """
    )

    assert result.stdout == "1 [] False\n"
    assert "<UserfaultFD fd=3 ASK_PROTOCOL> was never closed" in result.stderr


def test_a_descriptor_says_what_it_is(stage: Stage) -> None:
    fresh = stage.fresh()
    assert repr(fresh) == f"<UserfaultFD fd={fresh.fileno()} ASK_PROTOCOL>"

    with stage.descriptor() as running:
        assert repr(running) == f"<UserfaultFD fd={running.fileno()} RUNNING>"
    assert repr(running) == "<UserfaultFD closed RUNNING>"
