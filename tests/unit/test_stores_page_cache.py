"""What the kernel says about the page cache; as it may take pages away at any time, tests ask again."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from userfault.stores.page_cache import CANNOT, NOWAIT, PLAIN, cached, reading_mode, try_read
from userfault.testing import run_child

PAGE = os.sysconf("SC_PAGESIZE")
SIZE = 40 * PAGE + 100


def cool(fd: int) -> None:
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def soon(question: Callable[[], bool], fd: int) -> bool:
    """Read the file and ask, until the answer is yes; a page may be gone at once, but not each time."""
    for _ in range(20):
        os.pread(fd, SIZE, 0)
        if question():
            return True
    return False


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "data"
    path.write_bytes(bytes(range(256)) * (SIZE // 256) + bytes(SIZE % 256))
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.fixture
def on_disk(fd: int) -> None:
    if reading_mode(fd) != NOWAIT or cached(fd, 0, 1) is None:
        pytest.skip("needs Linux 6.5, and a file system with a disk: pass --basetemp on one")


def test_a_hot_file_is_cached(fd: int, on_disk: None) -> None:
    assert soon(lambda: bool(cached(fd, 0, SIZE)), fd)
    assert soon(lambda: bool(cached(fd, PAGE - 1, 2)), fd)
    assert soon(lambda: bool(cached(fd, SIZE - 1, 1)), fd)


def test_a_cold_file_is_not_and_asking_changes_nothing(fd: int, on_disk: None) -> None:
    cool(fd)

    assert [cached(fd, 0, SIZE) for _ in range(3)] == [False] * 3
    assert cached(fd, 0, 1) is False


def test_a_range_past_the_end_is_not_cached(fd: int, on_disk: None) -> None:
    os.pread(fd, SIZE, 0)

    assert cached(fd, 0, SIZE + PAGE) is False


def test_half_a_range_is_not_enough(fd: int, on_disk: None) -> None:
    cool(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    os.pread(fd, 1, 0)

    assert cached(fd, 0, 2 * PAGE) is False


def test_the_kernel_does_not_say_for_what_is_no_file() -> None:
    read, write = os.pipe()
    try:
        assert not cached(read, 0, 1)
    finally:
        os.close(read)
        os.close(write)
    assert cached(-1, 0, 1) is None


def test_trying_reads_what_is_hot(fd: int, on_disk: None) -> None:
    buffer = bytearray(SIZE)

    assert soon(lambda: try_read(fd, buffer, 0, NOWAIT) == SIZE, fd)
    assert buffer[:256] == bytes(range(256))


def test_trying_does_not_raise_when_it_cannot(fd: int) -> None:
    assert try_read(-1, bytearray(1), 0, NOWAIT) == 0
    assert try_read(fd, bytearray(1), SIZE, PLAIN) == 0


def test_memory_file_systems_are_read_plainly() -> None:
    fd = os.memfd_create("test")
    try:
        os.write(fd, bytes(100))
        assert reading_mode(fd) in (PLAIN, NOWAIT)  # newer kernels may know NOWAIT there too
        assert cached(fd, 0, 100) in (True, None)
    finally:
        os.close(fd)


def test_files_of_the_kernel_cannot_be_read_without_waiting() -> None:
    fd = os.open("/proc/self/status", os.O_RDONLY)
    try:
        assert reading_mode(fd) == CANNOT
    finally:
        os.close(fd)


def ask_as_somebody_else(path: str) -> list[object]:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    fd = os.open(path, os.O_RDONLY)
    return [cached(fd, 0, 1), reading_mode(fd)]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_a_file_of_somebody_else_is_never_called_hot_by_mistake() -> None:
    with tempfile.TemporaryDirectory() as folder:  # tmp_path is not for others to enter
        os.chmod(folder, 0o755)
        path = Path(folder) / "data"
        path.write_bytes(b"x" * 100)
        fd = os.open(path, os.O_RDONLY)
        cool(fd)
        os.close(fd)
        answer, _mode = run_child(ask_as_somebody_else, str(path)).check().value

    assert not answer  # None where the kernel refuses, False where it does not
