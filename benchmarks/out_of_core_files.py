"""The files of out_of_core: made, taken out of the page cache or brought into it, and summed up."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from userfault.kernel import memory

if TYPE_CHECKING:
    from numpy.typing import NDArray

MIB = 1 << 20
PAGE = memory.PAGE_SIZE
WORDS = PAGE // 8
"""Items of 64 bits in a page."""
ZIPF = 0.99
_TRIES = 3


def make(path: Path, size: int) -> None:
    """Write a file of random 64-bit keys, to the disk."""
    random = np.random.default_rng(size)
    with path.open("wb") as file:
        for start in range(0, size, 8 * MIB):
            file.write(random.bytes(min(8 * MIB, size - start)))
        file.flush()
        os.fsync(file.fileno())


def cached_pages(path: Path) -> int:
    """How many pages of the file are in the page cache, by `mincore`."""
    size = path.stat().st_size
    descriptor = os.open(path, os.O_RDONLY)
    address = memory.map_memory(size, fd=descriptor, prot=memory.PROT_READ)
    try:
        answer = np.frombuffer(memory.mincore(address, size), np.uint8)
        return int(np.count_nonzero(answer & 1))
    finally:
        memory.unmap(address, size)
        os.close(descriptor)


def cool(path: Path) -> None:
    """Take the file out of the page cache.

    Raises:
        RuntimeError: some of it stayed.
    """
    for _ in range(_TRIES):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
        if not cached_pages(path):
            return
    raise RuntimeError(f"{cached_pages(path)} pages of {path} stay in the page cache: is it mapped somewhere?")


def warm(path: Path) -> None:
    """Bring all of the file into the page cache, at this process's expense: out it goes first, in it comes here.

    Raises:
        RuntimeError: it does not stay there.
    """
    cool(path)
    checksum(path)
    if not is_hot(path):
        raise RuntimeError(f"only {cached_pages(path)} pages of {path} stay in the page cache: too little memory")


def is_hot(path: Path) -> bool:
    """Tell whether all of it is in the page cache."""
    return cached_pages(path) == -(-path.stat().st_size // PAGE)


def checksum(path: Path) -> int:
    """The CRC-32 of the file, read by this process."""
    value, buffer = 0, bytearray(MIB)
    with path.open("rb", buffering=0) as file:
        while got := file.readinto(buffer):
            value = zlib.crc32(memoryview(buffer)[:got], value)
    return value


def checksum_in_order(path: Path) -> int:
    """The CRC-32 of a file of 64-bit keys.

    Raises:
        RuntimeError: the keys are not in order.
    """
    keys = np.memmap(path, np.uint64, mode="r")
    step = MIB
    for start in range(0, len(keys), step):
        piece = keys[start : start + step + 1]
        if not np.all(piece[:-1] <= piece[1:]):
            raise RuntimeError(f"{path.name} is not in order near key {start}")
    return checksum(path)


def read_ahead(path: Path) -> str:
    """KiB that the kernel reads ahead on the device below, or `"?"`."""
    device = path.stat().st_dev
    setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    return setting.read_text(encoding="ascii").strip() if setting.exists() else "?"


def order(kind: str, size: int, count: int) -> NDArray[np.int64]:
    """Choose `count` items of a file, each by its page: uniformly, or by Zipf's law, the hot pages scattered."""
    random = np.random.default_rng(1)
    pages = size // PAGE
    if kind == "zipf":
        weights = np.cumsum(np.arange(1, pages + 1, dtype=np.float64) ** -ZIPF)
        ranks = np.searchsorted(weights, random.random(count) * weights[-1])
        chosen = random.permutation(pages)[ranks]
    else:
        chosen = random.integers(0, pages, count)
    return np.asarray(chosen * WORDS + random.integers(0, WORDS, count), np.int64)
