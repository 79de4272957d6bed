"""Mapping, advice and views, against the real kernel."""

from __future__ import annotations

import array
import mmap
import os
from errno import EBADF, EINVAL, ENOMEM
from typing import TYPE_CHECKING

import pytest

from userfault.errors import KernelError
from userfault.kernel import abi, memfd, memory, process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conformance.conftest import Arena, RunChild

P = memory.PAGE_SIZE


@pytest.fixture
def pidfd() -> Iterator[int]:
    fd = process.pidfd_open(os.getpid())
    yield fd
    os.close(fd)


def test_the_page_size_is_the_kernels() -> None:
    assert os.sysconf("SC_PAGE_SIZE") == P


def test_mapping_and_unmapping() -> None:
    address = memory.map_memory(3 * P)
    assert _flags(address) is not None

    memory.unmap(address, 3 * P)

    assert _flags(address) is None


def _flags(address: int) -> str | None:
    """Return the permissions of a mapping that starts here, from /proc/self/maps."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        for line in maps:
            if int(line.split("-")[0], 16) == address:
                return line.split()[1]
    return None


def test_a_mapping_goes_where_it_is_told_and_nowhere_else() -> None:
    address = memory.map_memory(2 * P)
    memory.unmap(address, 2 * P)
    flags = memory.MAP_PRIVATE | memory.MAP_ANONYMOUS | abi.MAP_FIXED_NOREPLACE

    assert memory.map_memory(2 * P, address=address, flags=flags) == address
    with pytest.raises(KernelError, match=r"mmap: \[Errno 17\]"):
        memory.map_memory(P, address=address, flags=flags)
    memory.unmap(address, 2 * P)


def test_a_file_is_mapped_shared_unless_told_otherwise(arena: Arena) -> None:
    fd = arena.memfd(2)
    shared, private = arena.shared(fd, 1), arena.shared(fd, 1, flags=memory.MAP_PRIVATE)

    memory.view(shared, 4)[:] = b"abcd"
    memory.view(private, 1)[:] = b"X"

    assert os.pread(fd, 4, 0) == b"abcd"
    assert bytes(memory.view(private, 4)) == b"Xbcd"


def test_a_mapping_may_start_inside_a_file(arena: Arena) -> None:
    fd = arena.memfd(2)
    os.pwrite(fd, b"second", P)

    assert arena.peek(arena.shared(fd, 1, offset=P), 6) == b"second"


_REFUSALS: dict[str, tuple[Callable[[], object], str, int]] = {
    "no length": (lambda: memory.map_memory(0), "mmap", EINVAL),
    "no file": (lambda: memory.map_memory(P, fd=9999), "mmap", EBADF),
    "too much": (lambda: memory.map_memory(1 << 60), "mmap", ENOMEM),
    "unmap unaligned": (lambda: memory.unmap(1, P), "munmap", EINVAL),
    "protect unaligned": (lambda: memory.protect(1, P, 0), "mprotect", EINVAL),
    "advise unaligned": (lambda: memory.advise(1, P, abi.MADV_DONTNEED), "madvise", EINVAL),
    "unknown advice": (lambda: memory.advise(0, P, 12345), "madvise", EINVAL),
    "populate nothing": (lambda: memory.populate(0, P), "madvise", ENOMEM),
    "ask unaligned": (lambda: memory.mincore(1, P), "mincore", EINVAL),
    "move unaligned": (lambda: memory.remap(1, P, P), "mremap", EINVAL),
}


@pytest.mark.parametrize("case", _REFUSALS)
def test_a_refused_call_is_named_with_its_errno(case: str) -> None:
    call, syscall, errno = _REFUSALS[case]

    with pytest.raises(KernelError) as caught:
        call()

    assert (caught.value.syscall, caught.value.errno) == (syscall, errno)


def test_protection_is_what_was_asked_for(arena: Arena) -> None:
    page = arena.anonymous(1)

    memory.protect(page, P, memory.PROT_READ)

    assert _flags(page) == "r--p"


def test_a_mapping_can_grow_and_move() -> None:
    old = memory.map_memory(P)
    memory.view(old, 3)[:] = b"abc"

    new = memory.remap(old, P, 64 * P)

    assert bytes(memory.view(new, 3)) == b"abc"
    memory.unmap(new, 64 * P)


def test_terabytes_of_address_space_cost_nothing() -> None:
    address = memory.map_memory(1 << 40)

    assert memory.view(address, 1 << 40).nbytes == 1 << 40
    memory.unmap(address, 1 << 40)


def test_dropped_memory_is_zero_again(arena: Arena) -> None:
    page = arena.anonymous(2, fill=True)

    memory.advise(page, P, abi.MADV_DONTNEED)

    assert (arena.peek(page), arena.peek(page + P)) == (b"\0", b"\2")


def test_populating_brings_pages_in(arena: Arena) -> None:
    page = arena.shared(arena.memfd(4), 4)
    assert memory.mincore(page, 4 * P) == b"\0\0\0\0"

    memory.populate(page + P, 2 * P, write=True)

    assert memory.mincore(page, 4 * P - 1) == b"\0\1\1\0"


def test_advice_for_many_ranges_at_once(arena: Arena, pidfd: int) -> None:
    # More than the kernel takes in one call: the library makes several.
    count = 1500
    page = arena.shared(arena.memfd(2 * count), 2 * count)
    memory.populate(page, 2 * count * P, write=True)
    ranges = [(page + 2 * number * P, P) for number in range(count)]

    done, errno = memory.process_advise(pidfd, ranges, abi.MADV_COLD)

    assert (done, errno) == (count * P, 0)
    assert memory.process_advise(pidfd, [], abi.MADV_COLD) == (0, 0)


def test_advice_that_stops_on_the_way_says_how_far_it_came_and_why(arena: Arena, pidfd: int) -> None:
    page = arena.anonymous(2, fill=True)
    hole = memory.map_memory(P)
    memory.unmap(hole, P)

    ranges = [(page, P), (hole, P), (page + P, P)]

    assert memory.process_advise(pidfd, ranges, abi.MADV_COLD) == (P, ENOMEM)
    assert memory.process_advise(pidfd, ranges[1:], abi.MADV_COLD) == (0, ENOMEM)


def test_advice_that_destroys_is_not_taken_for_another_process(run_child: RunChild) -> None:
    result = run_child("""
        page = memory.map_memory(P)
        memory.view(page, 1)[0] = 1
        pid = os.fork()
        if not pid:
            signal.pause()
        other = process.pidfd_open(pid)
        print(memory.process_advise(other, [(page, P)], abi.MADV_DONTNEED) == (0, errno.EINVAL))
        print(memory.process_advise(other, [(page, P)], abi.MADV_COLD) == (P, 0))
        process.pidfd_send_signal(other, signal.SIGKILL)
        os.waitpid(pid, 0)
    """)

    assert result.stdout == "True\nTrue\n", result.stderr


# -- buffers -------------------------------------------------------------------------------------------------


def test_a_view_is_plain_bytes_and_writes_through(arena: Arena) -> None:
    page = arena.anonymous(1)
    view = memory.view(page, 8)

    view[2:4] = b"hi"

    assert (view.format, view.nbytes, view.readonly, view.contiguous) == ("B", 8, False, True)
    assert arena.peek(page, 5) == b"\0\0hi\0"
    assert memory.address_of(view[2:]) == page + 2
    assert view.cast("I").tolist() == [int.from_bytes(b"\0\0hi", "little"), 0]


def test_a_readonly_view_cannot_be_written(arena: Arena) -> None:
    with pytest.raises(TypeError, match="read-only"):
        memory.view(arena.anonymous(1), 8, readonly=True)[0] = 1


def test_every_buffer_has_an_address() -> None:
    data = b"constant bytes"
    numbers = array.array("d", [1.0, 2.0])
    for buffer in (data, bytearray(data), memoryview(data)[3:], numbers, mmap.mmap(-1, P)):
        address = memory.address_of(buffer)
        assert bytes(memory.view(address, 8)) == bytes(memoryview(buffer).cast("B")[:8])
    assert memory.address_of(numbers) == numbers.buffer_info()[0]


def test_taking_an_address_leaves_nothing_exported() -> None:
    data = bytearray(10)
    memory.address_of(data)

    data.extend(bytes(1000))  # BufferError if an export were left

    with pytest.raises(BufferError):
        memory.address_of(memoryview(data)[::2])
    with pytest.raises(TypeError, match="bytes-like"):
        memory.address_of(5)  # type: ignore[arg-type]


def test_copying_by_address(arena: Arena) -> None:
    page = arena.anonymous(1)
    data = b"copied"

    memory.memmove(page, memory.address_of(data), len(data))

    assert arena.peek(page, 6) == data


# -- memfd ---------------------------------------------------------------------------------------------------


def test_a_memfd_is_sealed_in_size_but_not_against_holes(arena: Arena) -> None:
    fd = arena.memfd(4)

    assert memfd.seals(fd) == memfd.DEFAULT_SEALS == abi.F_SEAL_SHRINK | abi.F_SEAL_GROW | abi.F_SEAL_SEAL
    assert (os.fstat(fd).st_size, os.get_inheritable(fd)) == (4 * P, False)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, P)
    with pytest.raises(KernelError) as caught:
        memfd.seal(fd, abi.F_SEAL_WRITE)
    assert (caught.value.errno, caught.value.syscall) == (1, "fcntl(F_ADD_SEALS)")
    memfd.punch_hole(fd, 0, P)


def test_a_memfd_can_be_sealed_later_or_with_seals_of_ones_own() -> None:
    later, own = memfd.create("later", P, seal=False), memfd.create("own", P, seal=abi.F_SEAL_GROW)
    try:
        assert (memfd.seals(later), memfd.seals(own)) == (0, abi.F_SEAL_GROW)
        memfd.seal(later, abi.F_SEAL_WRITE)
        with pytest.raises(KernelError, match=r"fallocate\(PUNCH_HOLE\).*Operation not permitted"):
            memfd.punch_hole(later, 0, P)
        assert os.readlink(f"/proc/self/fd/{own}").startswith("/memfd:own")
    finally:
        os.close(later)
        os.close(own)


def test_a_memfd_of_an_impossible_size_is_refused_and_not_left_open() -> None:
    before = os.listdir("/proc/self/fd")

    with pytest.raises(KernelError) as caught:
        memfd.create("negative", -1)

    assert caught.value.syscall == "ftruncate"
    assert os.listdir("/proc/self/fd") == before


def test_seals_of_what_has_none_are_refused() -> None:
    end, other = os.pipe()
    with pytest.raises(KernelError, match="F_GET_SEALS"):
        memfd.seals(end)
    os.close(end)
    os.close(other)


def test_extents_are_what_is_not_holes(arena: Arena) -> None:
    fd = arena.memfd(16)
    assert list(memfd.data_extents(fd)) == []
    os.pwrite(fd, bytes(3 * P), 2 * P)
    os.pwrite(fd, b"x", 10 * P)

    assert list(memfd.data_extents(fd)) == [(2 * P, 5 * P), (10 * P, 11 * P)]
    assert list(memfd.data_extents(fd, 3 * P, 4 * P)) == [(3 * P, 4 * P)]
    assert list(memfd.data_extents(fd, 5 * P, 10 * P)) == []
    memfd.punch_hole(fd, 3 * P, P)
    assert list(memfd.data_extents(fd, 0, 8 * P)) == [(2 * P, 3 * P), (4 * P, 5 * P)]


def test_extents_of_what_is_no_file_are_refused() -> None:
    end, other = os.pipe()
    with pytest.raises(KernelError, match="SEEK_DATA"):
        list(memfd.data_extents(end, 0, P))
    os.close(end)
    os.close(other)
