"""A userfaultfd descriptor: having one, shaking hands, and giving it back."""

from __future__ import annotations

import gc
import os
import select
from errno import EINVAL
from typing import TYPE_CHECKING

import pytest

from userfault.errors import KernelError, UnsupportedError
from userfault.kernel import (
    Feature,
    Ioctl,
    RegisterMode,
    Userfaultfd,
    abi,
    fdinfo,
    memory,
    opening,
    process,
)

if TYPE_CHECKING:
    from tests.conformance.conftest import Arena, RunChild, StartChild

needs_privilege = pytest.mark.skipif(
    not process.has_capability(process.CAP_SYS_PTRACE), reason="needs CAP_SYS_PTRACE: run the tests as root"
)


@needs_privilege
def test_open_with_privilege_takes_the_system_call(arena: Arena) -> None:
    uffd = arena.uffd()

    assert (uffd.via, uffd.user_mode_only, uffd.features) == ("syscall", False, 0)
    assert Ioctl(uffd.ioctls) >= Ioctl.API | Ioctl.REGISTER | Ioctl.UNREGISTER
    assert os.get_inheritable(uffd.fd) is False


@pytest.mark.parametrize("via", ["syscall", "device"])
@pytest.mark.parametrize("user_mode_only", [False, True])
@needs_privilege
def test_both_ways_in_give_both_kinds(arena: Arena, via: str, user_mode_only: bool) -> None:
    uffd = arena.uffd(via=via, user_mode_only=user_mode_only)
    page = arena.anonymous(1)
    uffd.register(page, arena.page, RegisterMode.MISSING)

    assert (uffd.via, uffd.user_mode_only) == (via, user_mode_only)
    if user_mode_only:
        with pytest.raises(KernelError, match="Bad address"):  # a fault inside a system call is not served
            memory.populate(page, arena.page)
    else:
        populating = arena.call(memory.populate, page, arena.page)
        arena.events(uffd)
        uffd.zeropage(page, arena.page)
        populating.result()


def test_open_refuses_a_way_that_is_none() -> None:
    with pytest.raises(ValueError, match="'sysfs'"):
        Userfaultfd.open(via="sysfs")


def test_open_enables_what_was_asked_for_and_tells_what_there_is(arena: Arena) -> None:
    uffd = arena.uffd(Feature.THREAD_ID | Feature.EXACT_ADDRESS)

    info = uffd.fdinfo()

    assert uffd.features == Feature.THREAD_ID | Feature.EXACT_ADDRESS == info.features
    assert uffd.features & uffd.available == uffd.features < uffd.available
    assert (info.initialized, info.api, info.pending, info.total) == (True, abi.UFFD_API, 0, 0)
    assert Ioctl.COPY in info.ioctls


def test_copies_of_a_descriptor_are_told_from_other_descriptors(arena: Arena, start_child: StartChild) -> None:
    one, other = arena.uffd(), arena.uffd(nonblock=False)
    copy = arena.keep(Userfaultfd(os.dup(one.fd)))
    child = start_child(f"os.set_inheritable({one.fd}, False); print(flush=True); sys.stdin.read()", pass_fds=(one.fd,))
    assert child.stdout is not None
    child.stdout.readline()

    there = fdinfo.read_fdinfo(one.fd, child.pid)

    infos = [uffd.fdinfo() for uffd in (one, copy, other)]
    assert infos[0].inode == infos[1].inode == there.inode != infos[2].inode
    assert [bool(info.flags & os.O_NONBLOCK) for info in infos] == [True, True, False]
    assert bool(there.flags & os.O_CLOEXEC) is True


def test_every_feature_up_to_move_is_offered_or_refused_by_name(arena: Arena) -> None:
    available = arena.uffd().available

    for feature in Feature:
        if feature & available:
            assert feature in Feature(arena.uffd(feature).features)
        else:
            with pytest.raises(UnsupportedError, match=str(feature.name)):
                Userfaultfd.open(feature)


def test_asynchronous_protection_brings_protection_of_unpopulated_pages(arena: Arena) -> None:
    uffd = arena.uffd(Feature.WP_ASYNC)

    assert uffd.features == Feature.WP_ASYNC | Feature.WP_UNPOPULATED == uffd.fdinfo().features


def test_a_feature_that_the_kernel_lacks_is_named_and_nothing_is_left_open() -> None:
    before = os.listdir("/proc/self/fd")

    with pytest.raises(UnsupportedError) as caught:
        Userfaultfd.open(Feature.THREAD_ID | 1 << 60)

    assert caught.value.capability == "userfaultfd feature 0x1000000000000000 (no name known)"
    assert os.listdir("/proc/self/fd") == before


def test_nothing_works_before_the_handshake_and_it_is_done_once(arena: Arena) -> None:
    raw = arena.keep(Userfaultfd(opening.open_by_syscall(os.O_CLOEXEC | os.O_NONBLOCK)))
    page = arena.anonymous(1)

    assert raw.fdinfo().initialized is False
    with pytest.raises(KernelError) as caught:
        raw.read()
    assert (caught.value.errno, caught.value.syscall) == (EINVAL, "read(userfaultfd)")
    with pytest.raises(KernelError) as caught:
        raw.register(page, arena.page, RegisterMode.MISSING)
    assert caught.value.errno == EINVAL
    assert opening.handshake(raw.fd, 0, "syscall", False)[0] == arena.uffd().available
    with pytest.raises(KernelError, match=r"ioctl\(UFFDIO_API\)"):
        opening.handshake(raw.fd, 0, "syscall", False)


def test_adopting_asks_the_kernel_nothing(arena: Arena) -> None:
    uffd = arena.keep(Userfaultfd(os.dup(arena.uffd(Feature.THREAD_ID).fd), features=Feature.THREAD_ID))

    assert (uffd.via, uffd.features, uffd.available) == ("adopted", Feature.THREAD_ID, 0)


def test_closing_twice_is_fine_and_using_it_afterwards_is_not() -> None:
    with Userfaultfd.open() as uffd:
        fd = uffd.fileno()
        assert not uffd.closed
    uffd.close()

    assert (uffd.closed, uffd.fd) == (True, -1)
    assert "closed" in repr(uffd)
    with pytest.raises(ValueError, match="closed"):
        uffd.fileno()
    with pytest.raises(ValueError, match="negative"):
        uffd.wake(0, memory.PAGE_SIZE)
    with pytest.raises(ValueError, match="closed"):
        uffd.read()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_detaching_gives_the_descriptor_away() -> None:
    uffd = Userfaultfd.open()

    fd = uffd.detach()
    uffd.close()

    assert process.userfaultfds().count(fd) == 1
    os.close(fd)


def test_a_forgotten_one_is_closed_by_the_collector() -> None:
    before = process.userfaultfds()
    Userfaultfd.open()
    gc.collect()

    assert process.userfaultfds() == before


def test_reading_without_waiting_returns_nothing(arena: Arena) -> None:
    assert arena.uffd().read() == []
    assert arena.uffd().read_raw() == b""


def test_a_blocking_descriptor_cannot_be_polled(arena: Arena) -> None:
    poll = select.poll()
    poll.register(arena.uffd(nonblock=False), select.POLLIN)

    assert [events for _fd, events in poll.poll(0)] == [select.POLLERR]


def test_a_blocking_descriptor_waits_in_read(arena: Arena) -> None:
    uffd, page = arena.uffd(nonblock=False), arena.anonymous(1)
    uffd.register(page, arena.page, RegisterMode.MISSING)
    reading = arena.call(uffd.read)

    arena.read(page)

    assert len(reading.result()) == 1  # type: ignore[arg-type]


def test_a_full_descriptor_table_is_not_a_matter_of_rights(run_child: RunChild) -> None:
    result = run_child("""
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
        try:
            Userfaultfd.open()
        except KernelError as error:
            print(error)
    """)

    assert result.stdout == "userfaultfd: [Errno 24] Too many open files\n", result.stderr


def test_the_state_of_something_else_is_refused(arena: Arena) -> None:
    with pytest.raises(ValueError, match="not the fdinfo of a userfaultfd"):
        fdinfo.read_fdinfo(arena.memfd(1))
    with pytest.raises(KernelError, match="No such file"):
        fdinfo.read_fdinfo(1 << 20)


def test_the_state_of_a_waiting_thread_shows(arena: Arena) -> None:
    uffd, page = arena.uffd(), arena.anonymous(1)
    uffd.register(page, arena.page, RegisterMode.MISSING)
    arena.read(page)
    arena.wait_pending(uffd)

    assert (uffd.fdinfo().pending, uffd.fdinfo().total) == (1, 1)
    uffd.read()
    assert (uffd.fdinfo().pending, uffd.fdinfo().total) == (0, 1)
    assert fdinfo.read_fdinfo(uffd.fd, os.getpid()) == uffd.fdinfo()
