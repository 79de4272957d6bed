"""Every operation of `ioctl_userfaultfd(2)` on a range: what it does, and each error that it documents."""

from __future__ import annotations

import os
from errno import EAGAIN, EBUSY, EEXIST, EFAULT, EINVAL, ENOENT, EPERM
from fcntl import ioctl
from typing import TYPE_CHECKING

import pytest

from userfault.errors import KernelError
from userfault.kernel import (
    ContinueMode,
    CopyMode,
    Feature,
    Ioctl,
    MoveMode,
    PageFault,
    PoisonMode,
    RegisterMode,
    Remove,
    WriteProtectMode,
    ZeropageMode,
    abi,
    memfd,
    memory,
)

if TYPE_CHECKING:
    from struct import Struct

    from tests.conformance.conftest import Arena, RunChild

MISSING, WP, MINOR = RegisterMode.MISSING, RegisterMode.WP, RegisterMode.MINOR
_SHARED = Feature.MISSING_SHMEM | Feature.MINOR_SHMEM | Feature.WP_HUGETLBFS_SHMEM
_UNKNOWN = 1 << 40


# -- UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WAKE ---------------------------------------------------------


def test_register_tells_what_can_be_done_in_the_range(arena: Arena) -> None:
    uffd = arena.uffd()

    ioctls = Ioctl(uffd.register(arena.anonymous(1), arena.page, MISSING))

    assert {Ioctl.COPY, Ioctl.ZEROPAGE, Ioctl.WAKE, Ioctl.POISON, Ioctl.MOVE} <= set(ioctls)
    assert Ioctl.CONTINUE not in ioctls
    assert Ioctl.WRITEPROTECT not in ioctls


def test_register_for_minor_faults_of_a_memfd_offers_continue(arena: Arena) -> None:
    uffd = arena.uffd(_SHARED)

    ioctls = Ioctl(uffd.register(arena.shared(arena.memfd(1), 1), arena.page, MINOR | WP))

    assert {Ioctl.CONTINUE, Ioctl.WRITEPROTECT} <= set(ioctls)


def test_register_of_a_range_that_another_descriptor_has_is_busy(arena: Arena) -> None:
    page = arena.anonymous(1)
    arena.uffd().register(page, arena.page, MISSING)

    with pytest.raises(KernelError) as caught:
        arena.uffd().register(page, arena.page, MISSING)

    assert (caught.value.errno, caught.value.syscall) == (EBUSY, "ioctl(UFFDIO_REGISTER)")


@pytest.mark.parametrize(
    ("offset", "length", "mode"),
    [
        (1, 4096, MISSING),
        (0, 100, MISSING),
        (0, 0, MISSING),
        (0, 4096, 0),
        (0, 4096, _UNKNOWN),
        (0, 4096, MINOR),
    ],
    ids=[
        "unaligned address",
        "unaligned length",
        "no length",
        "no mode",
        "unknown mode",
        "minor on anonymous",
    ],
)
def test_register_refuses_what_makes_no_sense(arena: Arena, offset: int, length: int, mode: int) -> None:
    page = arena.anonymous(2)

    with pytest.raises(KernelError) as caught:
        arena.uffd(_SHARED).register(page + offset, length * arena.page // 4096, mode)

    assert caught.value.errno == EINVAL
    assert f"{page + offset:#x}" in str(caught.value)


def test_register_refuses_what_is_not_mapped(arena: Arena) -> None:
    page = memory.map_memory(arena.page)
    memory.unmap(page, arena.page)

    with pytest.raises(KernelError, match="Invalid argument"):
        arena.uffd().register(page, arena.page, MISSING)


def test_register_refuses_a_shared_mapping_of_a_file_that_is_open_for_reading(arena: Arena) -> None:
    # A file that could not be written by itself must not be filled through a userfaultfd.
    fd = arena.memfd(1)
    readonly = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    try:
        page = arena.shared(readonly, 1, prot=memory.PROT_READ)
    finally:
        os.close(readonly)

    with pytest.raises(KernelError) as caught:
        arena.uffd(_SHARED).register(page, arena.page, MISSING)

    assert caught.value.errno == EPERM


def test_a_private_mapping_of_a_memfd_can_be_served_too(arena: Arena) -> None:
    uffd = arena.uffd(_SHARED)
    page = arena.shared(arena.memfd(1), 1, flags=memory.MAP_PRIVATE)
    uffd.register(page, arena.page, MISSING)

    assert uffd.copy(page, arena.source(7), arena.page) == (arena.page, 0)
    assert arena.peek(page) == b"\7"


def test_unregister_wakes_the_waiting_thread_which_finds_zeros(arena: Arena) -> None:
    uffd, page = arena.uffd(), arena.anonymous(1)
    uffd.register(page, arena.page, MISSING)
    touch = arena.read(page)
    arena.events(uffd)

    uffd.unregister(page, arena.page)

    assert touch.result() == bytes(8)


@pytest.mark.parametrize("operation", ["unregister", "wake"])
@pytest.mark.parametrize(("offset", "length"), [(1, 4096), (0, 1), (0, 0)])
def test_unregister_and_wake_refuse_what_is_not_aligned(arena: Arena, operation: str, offset: int, length: int) -> None:
    page = arena.anonymous(2)

    with pytest.raises(KernelError) as caught:
        getattr(arena.uffd(), operation)(page + offset, length)

    assert (caught.value.errno, caught.value.syscall) == (EINVAL, f"ioctl(UFFDIO_{operation.upper()})")


def test_unregister_refuses_what_is_not_mapped(arena: Arena) -> None:
    page = memory.map_memory(arena.page)
    memory.unmap(page, arena.page)

    with pytest.raises(KernelError, match=r"UFFDIO_UNREGISTER.*Invalid argument"):
        arena.uffd().unregister(page, arena.page)


def test_wake_without_a_page_makes_the_thread_fault_anew(arena: Arena) -> None:
    uffd, page = arena.uffd(), arena.anonymous(1)
    uffd.register(page, arena.page, MISSING)
    touch = arena.read(page)

    first = arena.events(uffd)
    uffd.wake(page, arena.page)
    second = arena.events(uffd)

    assert first == second
    assert touch.waiting


# -- UFFDIO_COPY ---------------------------------------------------------------------------------------------


def test_copy_installs_the_page_and_wakes_the_thread(arena: Arena) -> None:
    uffd, page = arena.uffd(), arena.anonymous(2)
    uffd.register(page, 2 * arena.page, MISSING)
    touch = arena.read(page + arena.page, 8)
    arena.events(uffd)

    done = uffd.copy(page, arena.source(5, 6), 2 * arena.page)

    assert done == (2 * arena.page, 0)
    assert touch.result() == b"\6" * 8


def test_copy_takes_its_source_from_any_address(arena: Arena) -> None:
    uffd, page = arena.uffd(), arena.anonymous(1)
    uffd.register(page, arena.page, MISSING)
    data = os.urandom(arena.page + 3)

    assert uffd.copy(page, memory.address_of(data) + 3, arena.page) == (arena.page, 0)

    assert arena.peek(page, arena.page) == data[3:]


def test_copy_without_waking_lets_the_thread_wait_for_wake(arena: Arena) -> None:
    uffd, page = arena.uffd(), arena.anonymous(1)
    uffd.register(page, arena.page, MISSING)
    touch = arena.read(page)
    arena.events(uffd)

    assert uffd.copy(page, arena.source(9), arena.page, CopyMode.DONTWAKE) == (arena.page, 0)
    assert (uffd.fdinfo().total, touch.waiting) == (1, True)
    uffd.wake(page, arena.page)

    assert touch.result() == b"\t" * 8


def test_copy_with_protection_reports_the_first_write(arena: Arena) -> None:
    uffd, page = arena.uffd(), arena.anonymous(1)
    uffd.register(page, arena.page, MISSING | WP)
    uffd.copy(page, arena.source(1), arena.page, CopyMode.WP)

    touch = arena.write(page, b"\2")
    (event,) = arena.events(uffd)

    assert isinstance(event, PageFault)
    assert (event.is_wp, event.is_write) == (True, True)
    assert uffd.write_protect(page, arena.page, 0) == 0
    touch.result()
    assert arena.peek(page) == b"\2"


def test_copy_over_a_page_that_is_there_says_so(arena: Arena) -> None:
    uffd, page = arena.uffd(), arena.anonymous(1)
    uffd.register(page, arena.page, MISSING)
    uffd.copy(page, arena.source(1), arena.page)

    assert uffd.copy(page, arena.source(2), arena.page) == (0, EEXIST)
    assert arena.peek(page) == b"\1"


def test_copy_over_a_page_that_is_there_wakes_nobody(arena: Arena) -> None:
    uffd, page = arena.uffd(), arena.anonymous(1)
    uffd.register(page, arena.page, MISSING)
    touch = arena.read(page)
    arena.events(uffd)
    uffd.copy(page, arena.source(1), arena.page, CopyMode.DONTWAKE)

    assert uffd.copy(page, arena.source(2), arena.page) == (0, EEXIST)
    assert (uffd.fdinfo().total, touch.waiting) == (1, True)
    uffd.wake(page, arena.page)

    assert touch.result() == b"\1" * 8


def test_copy_that_stops_on_the_way_says_how_far_it_came(arena: Arena) -> None:
    uffd, page = arena.uffd(), arena.anonymous(4)
    uffd.register(page, 4 * arena.page, MISSING)
    uffd.copy(page + 2 * arena.page, arena.source(9), arena.page)
    source = arena.source(1, 2, 3, 4)

    assert uffd.copy(page, source, 4 * arena.page) == (2 * arena.page, EAGAIN)
    # The next call, from where it stopped, tells the reason.
    assert uffd.copy(page + 2 * arena.page, source, 2 * arena.page) == (0, EEXIST)


@pytest.mark.parametrize(
    ("request_number", "layout"),
    [
        (abi.UFFDIO_COPY, abi.UFFDIO_COPY_STRUCT),
        (abi.UFFDIO_ZEROPAGE, abi.UFFDIO_ZEROPAGE_STRUCT),
        (abi.UFFDIO_POISON, abi.UFFDIO_POISON_STRUCT),
    ],
    ids=["COPY", "ZEROPAGE", "POISON"],
)
def test_the_result_field_is_a_negative_errno_when_nothing_was_done(
    arena: Arena, request_number: int, layout: Struct
) -> None:
    # What a reader of an unsigned field takes for 18 exabytes.
    uffd, page = arena.uffd(), arena.anonymous(1)
    uffd.register(page, arena.page, MISSING)
    uffd.copy(page, arena.source(1), arena.page)
    head = (page, arena.source(2)) if request_number == abi.UFFDIO_COPY else (page,)
    argument = bytearray(layout.pack(*head, arena.page, 0, 0))

    with pytest.raises(FileExistsError):
        ioctl(uffd.fd, request_number, argument)

    assert layout.unpack(argument)[-1] == -EEXIST


@pytest.mark.parametrize(("offset", "length", "mode"), [(8, 4096, 0), (0, 8, 0), (0, 0, 0), (0, 4096, _UNKNOWN)])
@pytest.mark.parametrize("operation", ["copy", "zeropage", "move", "continue_", "poison", "write_protect"])
def test_every_operation_refuses_what_is_not_aligned_or_unknown(
    arena: Arena, operation: str, offset: int, length: int, mode: int
) -> None:
    uffd, page = arena.uffd(), arena.anonymous(2)
    uffd.register(page, 2 * arena.page, MISSING | WP)
    length = length * arena.page // 4096
    source = (arena.source(1),) if operation in {"copy", "move"} else ()

    answer = getattr(uffd, operation)(page + offset, *source, length, mode)

    assert answer == (EINVAL if operation == "write_protect" else (0, EINVAL))


@pytest.mark.parametrize("operation", ["copy", "zeropage", "move", "continue_", "poison", "write_protect"])
def test_every_operation_refuses_a_range_that_is_not_registered(arena: Arena, operation: str) -> None:
    uffd, page = arena.uffd(Feature.MOVE), arena.anonymous(1)
    source = (arena.anonymous(1, fill=True),) if operation in {"copy", "move"} else ()

    answer = getattr(uffd, operation)(page, *source, arena.page, 0)

    # MOVE alone calls a destination that nobody has registered an invalid argument.
    assert answer == (ENOENT if operation == "write_protect" else (0, EINVAL if operation == "move" else ENOENT))


def test_copy_from_where_nothing_can_be_read_says_so(arena: Arena) -> None:
    uffd, page = arena.uffd(), arena.anonymous(1)
    uffd.register(page, arena.page, MISSING)
    unmapped = memory.map_memory(arena.page)
    memory.unmap(unmapped, arena.page)

    assert uffd.copy(page, unmapped, arena.page) == (0, EFAULT)


def test_a_queued_event_makes_every_operation_say_again(arena: Arena) -> None:
    uffd, page = arena.uffd(Feature.EVENT_REMOVE), arena.anonymous(2)
    uffd.register(page, 2 * arena.page, MISSING | WP)
    source = arena.source(3)
    dropping = arena.call(memory.advise, page, arena.page, abi.MADV_DONTNEED)
    arena.wait_pending(uffd)

    assert uffd.copy(page, source, arena.page) == (0, EAGAIN)
    assert uffd.zeropage(page, arena.page) == (0, EAGAIN)
    assert uffd.move(page, arena.anonymous(1, fill=True), arena.page) == (0, EAGAIN)
    assert uffd.continue_(page, arena.page) == (0, EAGAIN)
    assert uffd.poison(page, arena.page) == (0, EAGAIN)
    assert uffd.write_protect(page, arena.page, WriteProtectMode.WP) == EAGAIN

    assert uffd.read() == [Remove(page, page + arena.page)]
    dropping.result()
    assert uffd.copy(page, source, arena.page) == (arena.page, 0)


def test_an_event_that_comes_in_the_middle_leaves_a_partial_result(arena: Arena) -> None:
    # The source's third page is itself missing, and served by a second descriptor: the copy has done two
    # pages and sleeps in its # third when the application drops memory.
    uffd, page = arena.uffd(Feature.EVENT_REMOVE), arena.anonymous(4)
    uffd.register(page, 4 * arena.page, MISSING)
    of_source, source = arena.uffd(), arena.anonymous(4, fill=True)
    memory.advise(source + 2 * arena.page, arena.page, abi.MADV_DONTNEED)
    of_source.register(source + 2 * arena.page, arena.page, MISSING)

    copying = arena.call(uffd.copy, page, source, 4 * arena.page)
    arena.events(of_source)
    dropping = arena.call(memory.advise, page, arena.page, abi.MADV_DONTNEED)
    arena.wait_pending(uffd)
    of_source.copy(source + 2 * arena.page, arena.source(3), arena.page)

    assert copying.result() == (2 * arena.page, EAGAIN)
    assert uffd.read() == [Remove(page, page + arena.page)]
    dropping.result()
    assert uffd.copy(page + 2 * arena.page, source, 2 * arena.page) == (2 * arena.page, 0)


# -- UFFDIO_ZEROPAGE -----------------------------------------------------------------------------------------


def test_zeropage_installs_zeros(arena: Arena) -> None:
    uffd, page = arena.uffd(), arena.anonymous(1)
    uffd.register(page, arena.page, MISSING)
    touch = arena.read(page)
    arena.events(uffd)

    assert uffd.zeropage(page, arena.page, ZeropageMode.DONTWAKE) == (arena.page, 0)
    assert touch.waiting
    uffd.wake(page, arena.page)

    assert touch.result() == bytes(8)


def test_zeropage_works_for_a_memfd_and_stops_at_what_is_there(arena: Arena) -> None:
    uffd, fd = arena.uffd(_SHARED), arena.memfd(3)
    page = arena.shared(fd, 3)
    uffd.register(page, 3 * arena.page, MISSING)
    uffd.copy(page + arena.page, arena.source(1), arena.page)

    assert uffd.zeropage(page, 3 * arena.page) == (arena.page, EAGAIN)
    assert uffd.zeropage(page + arena.page, arena.page) == (0, EEXIST)


# -- UFFDIO_MOVE ---------------------------------------------------------------------------------------------


def test_move_takes_the_page_away_from_its_source(arena: Arena) -> None:
    uffd, page, source = arena.uffd(Feature.MOVE), arena.anonymous(2), arena.anonymous(2, fill=True)
    uffd.register(page, 2 * arena.page, MISSING)
    touch = arena.read(page + arena.page)
    arena.events(uffd)

    assert uffd.move(page, source, 2 * arena.page) == (2 * arena.page, 0)

    assert touch.result() == b"\2" * 8
    assert arena.peek(source, 1) == b"\0"


def test_move_out_of_a_registered_range_makes_its_next_touch_a_fault(arena: Arena) -> None:
    uffd, page, staging = arena.uffd(Feature.MOVE), arena.anonymous(1, fill=True), arena.anonymous(1)
    uffd.register(page, arena.page, MISSING)
    uffd.register(staging, arena.page, MISSING)

    assert uffd.move(staging, page, arena.page, MoveMode.DONTWAKE) == (arena.page, 0)
    touch = arena.read(page)
    (event,) = arena.events(uffd)

    assert event == PageFault(page, abi.FaultFlag(0), 0)
    assert uffd.move(page, staging, arena.page) == (arena.page, 0)
    assert touch.result() == b"\1" * 8


def test_move_stops_at_a_hole_in_the_source_unless_holes_are_allowed(arena: Arena) -> None:
    uffd, page, source = arena.uffd(Feature.MOVE), arena.anonymous(3), arena.anonymous(3, fill=True)
    uffd.register(page, 3 * arena.page, MISSING)
    memory.advise(source + arena.page, arena.page, abi.MADV_DONTNEED)

    assert uffd.move(page, source, 3 * arena.page) == (arena.page, EAGAIN)
    rest = page + arena.page, source + arena.page, 2 * arena.page
    assert uffd.move(*rest) == (0, ENOENT)
    assert uffd.move(*rest, MoveMode.ALLOW_SRC_HOLES) == (2 * arena.page, 0)
    assert arena.peek(page + 2 * arena.page) == b"\3"


def test_move_onto_a_page_that_is_there_says_so(arena: Arena) -> None:
    uffd, page, source = arena.uffd(Feature.MOVE), arena.anonymous(1), arena.anonymous(1, fill=True)
    uffd.register(page, arena.page, MISSING)
    uffd.zeropage(page, arena.page)

    assert uffd.move(page, source, arena.page) == (0, EEXIST)


def test_move_refuses_shared_memory(arena: Arena) -> None:
    uffd, page = arena.uffd(Feature.MOVE | _SHARED), arena.anonymous(1)
    uffd.register(page, arena.page, MISSING)
    source = arena.shared(arena.memfd(1), 1)
    memory.populate(source, arena.page, write=True)

    assert uffd.move(page, source, arena.page) == (0, EINVAL)


def test_move_of_a_page_that_a_child_has_seen_is_busy_until_written_again(run_child: RunChild) -> None:
    result = run_child("""
        uffd = Userfaultfd.open(Feature.MOVE)
        page, source = memory.map_memory(P), memory.map_memory(P)
        uffd.register(page, P, RegisterMode.MISSING)
        view = memory.view(source, P)
        view[0] = 1
        child = os.fork()
        if not child:
            os._exit(0)
        os.waitpid(child, 0)
        first = uffd.move(page, source, P)
        view[0] = 2
        print(first == (0, errno.EBUSY), uffd.move(page, source, P) == (P, 0), memory.view(page, P)[0])
    """)

    assert (result.returncode, result.stdout) == (0, "True True 2\n")


# -- UFFDIO_WRITEPROTECT -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["anonymous", "memfd"])
def test_write_protect_reports_a_write_and_lets_reads_pass(arena: Arena, kind: str) -> None:
    uffd = arena.uffd(_SHARED)
    page = arena.anonymous(1) if kind == "anonymous" else arena.shared(arena.memfd(1), 1)
    memory.populate(page, arena.page, write=True)
    uffd.register(page, arena.page, WP)

    assert uffd.write_protect(page, arena.page, WriteProtectMode.WP) == 0
    assert arena.read(page).result() == bytes(8)
    touch = arena.write(page, b"new")
    (event,) = arena.events(uffd)
    assert uffd.write_protect(page, arena.page, WriteProtectMode.DONTWAKE) == 0
    assert touch.waiting
    uffd.wake(page, arena.page)

    assert isinstance(event, PageFault)
    assert (event.is_wp, event.is_missing) == (True, False)
    touch.result()
    assert arena.peek(page, 3) == b"new"


def test_write_protect_passes_over_pages_that_are_not_there_unless_the_feature_says_otherwise(
    arena: Arena,
) -> None:
    plain, page = arena.uffd(), arena.anonymous(1)
    plain.register(page, arena.page, WP)
    plain.write_protect(page, arena.page, WriteProtectMode.WP)
    arena.write(page, b"unseen").result()

    thorough, other = arena.uffd(Feature.WP_UNPOPULATED), arena.anonymous(1)
    thorough.register(other, arena.page, WP)
    thorough.write_protect(other, arena.page, WriteProtectMode.WP)
    touch = arena.write(other, b"seen")
    (event,) = arena.events(thorough)

    assert plain.read() == []
    assert isinstance(event, PageFault)
    assert event.is_wp
    assert touch.waiting


def test_write_protect_cannot_protect_and_leave_asleep_at_once(arena: Arena) -> None:
    uffd, page = arena.uffd(), arena.anonymous(1)
    uffd.register(page, arena.page, WP)

    assert uffd.write_protect(page, arena.page, WriteProtectMode.WP | WriteProtectMode.DONTWAKE) == EINVAL


def test_write_protect_wants_a_range_registered_for_it(arena: Arena) -> None:
    uffd, page = arena.uffd(), arena.anonymous(1)
    uffd.register(page, arena.page, MISSING)

    assert uffd.write_protect(page, arena.page, WriteProtectMode.WP) == ENOENT


# -- UFFDIO_CONTINUE -----------------------------------------------------------------------------------------


def test_continue_maps_what_is_in_the_file(arena: Arena) -> None:
    uffd, fd = arena.uffd(_SHARED), arena.memfd(2)
    page = arena.shared(fd, 2)
    uffd.register(page, 2 * arena.page, MINOR)
    os.pwrite(fd, b"content", arena.page)
    touch = arena.read(page + arena.page, 7)
    (event,) = arena.events(uffd)

    assert uffd.continue_(page + arena.page, arena.page, ContinueMode.DONTWAKE) == (arena.page, 0)
    assert touch.waiting
    uffd.wake(page + arena.page, arena.page)

    assert isinstance(event, PageFault)
    assert (event.is_minor, event.address) == (True, page + arena.page)
    assert touch.result() == b"content"


def test_continue_of_a_hole_says_that_there_is_nothing(arena: Arena) -> None:
    uffd, page = arena.uffd(_SHARED), arena.shared(arena.memfd(1), 1)
    uffd.register(page, arena.page, MINOR)

    assert uffd.continue_(page, arena.page) == (0, EFAULT)


def test_continue_stops_at_a_page_that_is_mapped(arena: Arena) -> None:
    uffd, fd = arena.uffd(_SHARED), arena.memfd(2)
    page = arena.shared(fd, 2)
    os.pwrite(fd, bytes(2 * arena.page), 0)
    uffd.register(page, 2 * arena.page, MINOR)
    uffd.continue_(page + arena.page, arena.page)

    assert uffd.continue_(page, 2 * arena.page) == (arena.page, EAGAIN)
    assert uffd.continue_(page, 2 * arena.page) == (0, EEXIST)


def test_continue_with_protection_reports_the_first_write(arena: Arena) -> None:
    uffd, fd = arena.uffd(_SHARED), arena.memfd(1)
    page = arena.shared(fd, 1)
    os.pwrite(fd, b"old", 0)
    uffd.register(page, arena.page, MINOR | WP)
    uffd.continue_(page, arena.page, ContinueMode.WP)

    touch = arena.write(page, b"new")
    (event,) = arena.events(uffd)

    assert isinstance(event, PageFault)
    assert event.is_wp
    assert touch.waiting


def test_one_range_can_report_holes_as_missing_and_filled_pages_as_minor(arena: Arena) -> None:
    uffd, fd = arena.uffd(_SHARED), arena.memfd(2)
    page = arena.shared(fd, 2)
    os.pwrite(fd, b"filled", arena.page)
    uffd.register(page, 2 * arena.page, MISSING | MINOR)

    arena.read(page)
    (hole,) = arena.events(uffd)
    arena.read(page + arena.page)
    (filled,) = arena.events(uffd)

    assert isinstance(hole, PageFault)
    assert isinstance(filled, PageFault)
    assert (hole.is_missing, filled.is_minor) == (True, True)


def test_a_hole_punched_in_the_file_is_missing_again_in_every_mapping(arena: Arena) -> None:
    uffd, fd = arena.uffd(_SHARED | Feature.EVENT_REMOVE), arena.memfd(1)
    pages = [arena.shared(fd, 1), arena.shared(fd, 1)]
    for page in pages:
        uffd.register(page, arena.page, MISSING)
    uffd.copy(pages[0], arena.source(1), arena.page)
    assert arena.read(pages[1]).result() == b"\1" * 8

    memfd.punch_hole(fd, 0, arena.page)  # in this thread: it waits for nobody, and sends no message

    assert uffd.read() == []
    for page in pages:
        arena.read(page)
        assert arena.events(uffd) == [PageFault(page, abi.FaultFlag(0), 0)]


# -- UFFDIO_POISON, the SIGBUS feature, huge pages -----------------------------------------------------------


def test_poison_kills_the_toucher_fails_system_calls_and_yields_to_copy(run_child: RunChild) -> None:
    result = run_child("""
        uffd = Userfaultfd.open(Feature.POISON, nonblock=True)
        page = memory.map_memory(3 * P)
        uffd.register(page, 3 * P, RegisterMode.MISSING)
        uffd.copy(page + 2 * P, memory.address_of(bytes(P)), P)
        print(uffd.poison(page, 3 * P, PoisonMode.DONTWAKE), uffd.poison(page + 2 * P, P))
        end, other = os.pipe()
        try:
            os.write(other, memory.view(page, 8))
        except OSError as error:
            print(errno.errorcode[error.errno])
        try:
            memory.populate(page, P)
        except KernelError as error:
            print(error.errno == abi.EHWPOISON)
        uffd.unregister(page, 3 * P)
        uffd.register(page, 3 * P, RegisterMode.MISSING)
        source = b"x" * P
        print(uffd.copy(page, memory.address_of(source), P), bytes(memory.view(page, 1)))
        sys.stdout.flush()
        memory.view(page + P, P)[0]
    """)

    page = memory.PAGE_SIZE
    assert result.stdout.splitlines() == [
        f"{(2 * page, EAGAIN)} {(0, EEXIST)}",
        "EFAULT",
        "True",
        f"{(page, 0)} b'x'",
    ]
    assert result.returncode == -7  # SIGBUS: the marker outlived unregistration


def test_poison_ends_a_wait_with_sigbus(run_child: RunChild) -> None:
    result = run_child("""
        uffd = Userfaultfd.open(Feature.POISON)
        page = memory.map_memory(P)
        uffd.register(page, P, RegisterMode.MISSING)
        threading.Thread(target=memory.memmove, args=(memory.map_memory(P), page, 1), daemon=True).start()
        uffd.read()
        print("poisoned", flush=True)
        uffd.poison(page, P)
        signal.pause()
    """)

    assert (result.returncode, result.stdout) == (-7, "poisoned\n")


def test_the_sigbus_feature_sends_a_signal_instead_of_a_message(run_child: RunChild) -> None:
    result = run_child("""
        uffd = Userfaultfd.open(Feature.SIGBUS, nonblock=True)
        page = memory.map_memory(2 * P)
        uffd.register(page, 2 * P, RegisterMode.MISSING)
        end, other = os.pipe()
        try:
            os.write(other, memory.view(page, 8))
        except OSError as error:
            print(errno.errorcode[error.errno], uffd.read())
        source = b"y" * P
        uffd.copy(page, memory.address_of(source), P)
        print(bytes(memory.view(page, 1)), flush=True)
        memory.view(page + P, P)[0]
    """)

    assert (result.returncode, result.stdout) == (-7, "EFAULT []\nb'y'\n")


def test_huge_pages_that_nobody_reserved_fail_when_mapped_and_of_no_size_when_made(arena: Arena) -> None:
    with pytest.raises(KernelError) as caught:
        memfd.create("huge", hugetlb=1 << 13)  # no architecture has huge pages of 8 KiB
    assert caught.value.syscall == "memfd_create"

    fd = memfd.create("huge", 1 << 40, hugetlb=True)  # more than any machine reserves
    try:
        with pytest.raises(KernelError) as caught:
            memory.map_memory(1 << 40, fd=fd)
    finally:
        os.close(fd)
    assert (caught.value.syscall, caught.value.strerror) == ("mmap", "Cannot allocate memory")


def test_a_mode_that_only_newer_kernels_know_is_passed_on(arena: Arena) -> None:
    # The flag classes keep unknown bits: it is the kernel that refuses.
    assert int(PoisonMode(_UNKNOWN)) == _UNKNOWN
    assert arena.uffd().poison(arena.anonymous(1), arena.page, PoisonMode(_UNKNOWN)) == (0, EINVAL)
