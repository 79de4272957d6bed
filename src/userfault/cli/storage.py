"""Where a file lies and how much of it is in memory: the facts behind the advice of `userfault info`."""

from __future__ import annotations

import os
from dataclasses import dataclass

from userfault.errors import KernelError
from userfault.kernel.memory import PAGE_SIZE, address_of
from userfault.kernel.syscalls import libc_syscall

_NR_CACHESTAT = 451  # Linux 6.5; the same on every architecture
_FAR = frozenset(["9p", "afs", "beegfs", "ceph", "cifs", "lustre", "nfs", "nfs4", "smb3", "virtiofs"])
"""File systems whose bytes come over a network, or from a host."""


@dataclass(frozen=True, slots=True)
class FileSystem:
    """Where a file lies.

    Attributes:
        kind: Such as `"ext4"`; empty if unknown.
    """

    kind: str

    @property
    def far(self) -> bool:
        """Whether reading it may mean a network."""
        return self.kind in _FAR or self.kind.startswith("fuse")

    @property
    def memory(self) -> bool:
        """Whether it is memory itself."""
        return self.kind in {"tmpfs", "ramfs", "hugetlbfs"}


def file_system(path: str) -> FileSystem:
    """Return the file system that a file lies on."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
        for line in mounts:
            left, _, right = line.partition(" - ")
            if left.split()[2] == wanted:
                return FileSystem(right.split()[0])
    return FileSystem("")


def cached_bytes(path: str) -> int | None:
    """Return how many bytes of a file are in the page cache; None: the kernel does not say.

    It does not before Linux 6.5, nor for a file that the caller neither owns nor may write.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        whole = os.fstat(fd).st_size
        span, answer = memoryview(bytearray(16)).cast("Q"), memoryview(bytearray(40)).cast("Q")
        span[0], span[1] = 0, whole
        libc_syscall("cachestat", _NR_CACHESTAT, fd, address_of(span), address_of(answer), 0)
        return min(answer[0] * PAGE_SIZE, whole)
    except KernelError:
        return None
    finally:
        os.close(fd)
