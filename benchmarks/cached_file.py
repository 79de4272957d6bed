"""A file to ask about: is it in the page cache? Each candidate of hot_or_cold is a method of ``Subject``."""

from __future__ import annotations

import ctypes
import os
import random
from dataclasses import dataclass, field

from userfault.kernel import memory
from userfault.kernel.abi import MADV_DONTNEED
from userfault.stores import FileStore
from userfault.stores.page_cache import NOWAIT, cached, try_read

KIB, MIB = 1 << 10, 1 << 20
PAGE = memory.PAGE_SIZE


@dataclass
class Subject:
    """One file under test: descriptor, mapping, a buffer to read into, and the candidates that look at it."""

    path: str
    size: int
    fd: int = -1
    base: int = 0
    staging: memoryview = field(default_factory=lambda: memoryview(bytearray(2 * MIB)))

    def __post_init__(self) -> None:
        """Open and map the file."""
        self.fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        self.base = memory.map_memory(self.size, fd=self.fd, prot=memory.PROT_READ)
        self.store = FileStore(self.path)
        self.store.read_into(0, self.staging[:1])  # before its first read a store knows nothing
        self._mincore, self._vector = ctypes.PyDLL(None).mincore, bytearray(512)
        self._address, self._length = ctypes.c_void_p(), ctypes.c_size_t()
        self._answer = ctypes.c_void_p(memory.address_of(self._vector))
        self._byte = bytearray(1)

    def close(self) -> None:
        """Unmap and close."""
        self.store.close()
        memory.unmap(self.base, self.size)
        os.close(self.fd)

    def nothing(self, offset: int, length: int) -> bool:
        """Answer without looking: what the loop and the call themselves cost."""
        del offset, length
        return True

    def mincore(self, offset: int, length: int) -> bool:
        """Ask for each page, in the quickest way that ctypes has."""
        self._address.value, self._length.value = self.base + offset, length
        self._mincore(self._address, self._length, self._answer)
        return self._vector.find(0, 0, length // PAGE) < 0

    def cachestat(self, offset: int, length: int) -> bool:
        """Ask for the number of pages."""
        return cached(self.fd, offset, length) is True

    def probe(self, offset: int, length: int) -> bool:
        """Try to read the last byte without waiting: knows one page of the block."""
        return try_read(self.fd, self._byte, offset + length - 1, NOWAIT) == 1

    def nowait(self, offset: int, length: int) -> bool:
        """Try to read the block without waiting; this is the copy too."""
        return try_read(self.fd, self.staging[:length], offset, NOWAIT) == length

    def pread(self, offset: int, length: int) -> bool:
        """Read the block, and wait for it."""
        return os.preadv(self.fd, (self.staging[:length],), offset) == length

    def locate(self, offset: int, length: int) -> bool:
        """Ask the store as the fault loop does."""
        return bool(self.store.locate(offset, length))

    def store_now(self, offset: int, length: int) -> bool:
        """Ask the store in both ways that do not wait."""
        return bool(self.store.locate(offset, length)) or self.store.read_now(offset, self.staging[:length])


def make_file(path: str, size: int) -> None:
    """Write a file of random bytes: hot, on disk, in large folios where the file system has them."""
    with open(path, "wb") as file:
        chunk = os.urandom(MIB)
        file.writelines(number.to_bytes(8, "little") + chunk[8:] for number in range(size // MIB))
        file.flush()
        os.fsync(file.fileno())


def cool(subject: Subject) -> None:
    """Drop a file from the page cache, which keeps what is mapped; the store begins afresh."""
    subject.store.close()
    memory.advise(subject.base, subject.size, MADV_DONTNEED)
    os.fsync(subject.fd)
    os.posix_fadvise(subject.fd, 0, 0, os.POSIX_FADV_DONTNEED)


def warm(subject: Subject, *, small: bool) -> None:
    """Bring all of a file in: as large folios by reading on, or as single pages by reading at random."""
    cool(subject)
    os.posix_fadvise(subject.fd, 0, 0, os.POSIX_FADV_RANDOM if small else os.POSIX_FADV_SEQUENTIAL)
    step = PAGE if small else MIB
    offsets = list(range(0, subject.size, step))
    if small:
        random.shuffle(offsets)
    for _ in range(2):  # the second time for what was taken away meanwhile
        for offset in offsets:
            subject.pread(offset, step)
    os.posix_fadvise(subject.fd, 0, 0, os.POSIX_FADV_NORMAL)


def offsets_of(subject: Subject, length: int, count: int, order: str) -> list[int]:
    """Return the blocks that one repetition goes through."""
    blocks = subject.size // length
    if order == "random":
        return [number * length for number in random.sample(range(blocks), min(count, blocks))]
    return [number * length for number in range(min(count, blocks))]
