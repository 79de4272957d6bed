"""Disks and files that fail while there are changes: a typed error, nothing lost, and all is well when they are mended.

Quotas are not here: the kernel does not hold the superuser to them, and these tests mount what they need.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

from userfault import BlockState, FileStore, Pager, Region, RetryPolicy, StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BLOCK = 65536
SIZE = 24 * BLOCK + 100
ONCE = RetryPolicy(attempts=1)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts are the superuser's")


@pytest.fixture
def pager() -> Iterator[Pager]:
    """A pager that is gone before the disk is."""
    with Pager() as pager:
        yield pager


class Mount:
    """A file system of our own."""

    def __init__(self, folder: Path, *what: str) -> None:
        self.folder = folder
        folder.mkdir()
        subprocess.run(["mount", *what, str(folder)], check=True, capture_output=True)

    def change(self, options: str) -> None:
        """Mount it anew, with other options."""
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.folder)], check=True)

    def close(self) -> None:
        """Unmount it."""
        subprocess.run(["umount", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Mount]:
    """A file system with room for half of the file."""
    with contextlib.closing(Mount(tmp_path / "disk", "-t", "tmpfs", "-o", f"size={SIZE // 2}", "tmpfs")) as mount:
        yield mount


@pytest.fixture
def failing_disk(tmp_path: Path) -> Iterator[tuple[Path, Mount]]:
    """A file system on a device that fails beyond its first 5 MiB, which is found out when bytes get there."""
    with contextlib.closing(Mount(tmp_path / "below", "-t", "tmpfs", "-o", "size=5m", "tmpfs")) as below:
        image = below.folder / "image"
        image.touch()
        os.truncate(image, 32 << 20)
        try:
            subprocess.run(["mkfs.ext2", "-q", "-b", "4096", str(image)], check=True, capture_output=True)
            above = Mount(tmp_path / "disk", "-o", "loop", str(image))
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no file system on a loop device here: {error}")
        with contextlib.closing(above):
            yield above.folder / "data", below


def make(path: Path, size: int = SIZE) -> bytearray:
    """Make a sparse file; return what it holds."""
    path.touch()
    os.truncate(path, size)
    return bytearray(size)


def open_file(path: Path, pager: Pager, **options: object) -> Region:
    store = FileStore(path, writable=True)
    return Region(store, "r+", retry_policy=ONCE, pager=pager, **options)  # type: ignore[arg-type]  # a test's


def change(region: Region, model: bytearray, data: bytes, step: int = BLOCK) -> None:
    """Write to each block."""
    with region.memory as memory:
        for at in range(0, len(model) - len(data), step):
            memory[at : at + len(data)] = model[at : at + len(data)] = data


def assert_kept(region: Region, model: bytearray, elsewhere: Path) -> None:
    """All changes are in memory, and can be saved."""
    with region.memory as memory:
        assert memory == model
    region.save(elsewhere)
    assert elsewhere.read_bytes() == model


def flush_at_last(region: Region, path: Path, model: bytearray) -> None:
    """Flush, when the cause is gone: what happened in the background may be told once more before."""
    with contextlib.suppress(StoreError):
        region.flush()
    region.flush()
    assert path.read_bytes() == model
    assert not set(region.residency()) & {BlockState.DIRTY, BlockState.FLUSHING}


@pytest.mark.parametrize("budget", ["8MiB", "512KiB"])
def test_a_full_disk_on_which_room_is_made(disk: Mount, pager: Pager, tmp_path: Path, budget: str) -> None:
    """Also where more is changed than the budget holds: then it is exceeded, since nothing may be dropped."""
    path, filler = disk.folder / "data", disk.folder / "filler"
    filler.write_bytes(b"f" * (SIZE // 2 - 4 * BLOCK))
    model = make(path)
    with open_file(path, pager, budget=budget) as region:
        change(region, model, b"full")
        with pytest.raises(StoreError, match="No space left on device") as caught:
            region.flush()
        assert str(path) in str(caught.value)
        change(region, model, b"fuller", 2 * BLOCK)
        assert_kept(region, model, tmp_path / "saved")
        filler.unlink()
        disk.change(f"size={2 * SIZE}")
        flush_at_last(region, path, model)
    assert path.read_bytes() == model


def test_a_device_that_fails_beneath_the_file_system(
    failing_disk: tuple[Path, Mount], pager: Pager, tmp_path: Path
) -> None:
    """The kernel takes the bytes and fails when it writes them: `fsync` says so once, and forgets."""
    path, below = failing_disk
    model = make(path, 12 << 20)
    with open_file(path, pager) as region:
        change(region, model, b"lost?" * 800, 4096)
        with pytest.raises(StoreError, match=r"cannot be made durable: .*No space left"):
            region.flush()
        assert BlockState.DIRTY in region.residency(), "what may be lost is dirty again"
        assert_kept(region, model, tmp_path / "saved")
        below.change("size=64m")
        flush_at_last(region, path, model)
    drop_caches(path)
    assert path.read_bytes() == model


def drop_caches(path: Path) -> None:
    """Have what is read from now on come from the device."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def test_a_file_that_cannot_be_written_to_cannot_be_opened_for_it(disk: Mount) -> None:
    path = disk.folder / "data"
    make(path)
    disk.change("ro")
    with pytest.raises(OSError, match="Read-only file system") as caught:
        FileStore(path, writable=True)
    assert (caught.value.errno, caught.value.filename) == (errno.EROFS, str(path))


def test_a_file_system_that_becomes_read_only(disk: Mount, pager: Pager, tmp_path: Path) -> None:
    """As the kernel makes it after an error. While a file is open for writing it refuses, so the worker dies first."""
    disk.change(f"size={2 * SIZE}")
    path = disk.folder / "data"
    model = make(path)
    with open_file(path, pager) as region:
        change(region, model, b"kept")
        end_process(pager.worker_pid)
        disk.change("ro")
        with pytest.raises(StoreError, match="Read-only file system"):
            region.flush()
        assert_kept(region, model, tmp_path / "saved")
        disk.change("rw")
        flush_at_last(region, path, model)


def end_process(pid: int) -> None:
    """Kill a process, and wait until it is gone."""
    fd = os.pidfd_open(pid)
    signal.pidfd_send_signal(fd, signal.SIGKILL)
    select.select([fd], [], [])
    os.close(fd)


@pytest.mark.parametrize("how", ["replaced", "removed"])
def test_a_file_that_is_another_now(disk: Mount, pager: Pager, tmp_path: Path, how: str) -> None:
    """Nothing is written to what is not ours; when ours is back, all is."""
    disk.change(f"size={4 * SIZE}")
    path, aside = disk.folder / "data", disk.folder / "aside"
    model = make(path)
    with open_file(path, pager) as region:
        change(region, model, b"mine")
        path.rename(aside)
        if how == "replaced":
            make(path)
        with pytest.raises(StoreError, match=r"changed beneath us|No such file"):
            region.flush()
        assert not any(aside.read_bytes())
        assert how == "removed" or not any(path.read_bytes())
        assert_kept(region, model, tmp_path / "saved")
        aside.rename(path)
        flush_at_last(region, path, model)
