"""The worker of install_ways: a process that brings blocks in, in one way, and does nothing else.

    python installers.py JOB

JOB is a `Job` as JSON. A bulk job prints its nanoseconds; any other prints a line when it is ready, and then answers
faults until it is killed.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from userfault.kernel import memory
from userfault.kernel.abi import UFFD_MSG_PAGEFAULT_STRUCT, UFFDIO_COPY_MODE_DONTWAKE
from userfault.kernel.userfaultfd import Userfaultfd

if TYPE_CHECKING:
    from collections.abc import Callable

WAYS = ("copy-mapping", "copy-staging", "continue-preadv", "continue-pwrite")
FILLED = "continue-filled"
_FILL = 1 << 20


@dataclass(frozen=True)
class Job:
    """What a worker is told: numbers of descriptors that it inherits, and where the region is."""

    way: str
    uffd: int
    memfd: int
    file: int
    address: int
    size: int
    block: int
    cpu: int
    bulk: bool


class Installer:
    """Brings blocks in, in the way of its job."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.uffd = Userfaultfd(job.uffd)
        self.file = memoryview(mmap.mmap(job.file, job.size, prot=mmap.PROT_READ))
        self.source = memory.address_of(self.file)
        self.staging = memoryview(mmap.mmap(-1, job.block))
        self.staged = memory.address_of(self.staging)
        self.own = memoryview(mmap.mmap(job.memfd, job.size))

    def way(self) -> Callable[[int, int], object]:
        """Return the method that installs the block at an offset, in a mode: 0, or without waking."""
        return {
            "copy-mapping": self.copy_mapping,
            "copy-staging": self.copy_staging,
            "continue-preadv": self.continue_preadv,
            "continue-pwrite": self.continue_pwrite,
            FILLED: self.map_filled,
        }[self.job.way]

    def copy_mapping(self, offset: int, mode: int) -> tuple[int, int]:
        """COPY from the file's mapping."""
        return self.uffd.copy(self.job.address + offset, self.source + offset, self.job.block, mode)

    def copy_staging(self, offset: int, mode: int) -> tuple[int, int]:
        """Read, then COPY."""
        os.preadv(self.job.file, (self.staging,), offset)
        return self.uffd.copy(self.job.address + offset, self.staged, self.job.block, mode)

    def continue_preadv(self, offset: int, mode: int) -> tuple[int, int]:
        """Read into the memfd's mapping, then map it for the application too."""
        os.preadv(self.job.file, (self.own[offset : offset + self.job.block],), offset)
        return self.map_filled(offset, mode)

    def continue_pwrite(self, offset: int, mode: int) -> tuple[int, int]:
        """Write to the memfd, then map it for the application."""
        os.pwrite(self.job.memfd, self.file[offset : offset + self.job.block], offset)
        return self.map_filled(offset, mode)

    def map_filled(self, offset: int, mode: int) -> tuple[int, int]:
        """Map what is in the memfd."""
        return self.uffd.continue_(self.job.address + offset, self.job.block, mode)

    def answer(self) -> None:
        """Answer faults until killed."""
        way, fd, unpack = self.way(), self.job.uffd, UFFD_MSG_PAGEFAULT_STRUCT.unpack
        address, mask, size = self.job.address, -self.job.block, UFFD_MSG_PAGEFAULT_STRUCT.size
        while True:
            _event, _flags, fault, _thread = unpack(os.read(fd, size))
            way(fault - address & mask, 0)

    def install_all(self) -> int:
        """Install every block, waking nobody; return nanoseconds."""
        if self.job.way == FILLED:
            for offset in range(0, self.job.size, _FILL):
                os.pwrite(self.job.memfd, self.file[offset : offset + _FILL], offset)
        way, mode = self.way(), UFFDIO_COPY_MODE_DONTWAKE
        start = time.perf_counter_ns()
        for offset in range(0, self.job.size, self.job.block):
            way(offset, mode)
        return time.perf_counter_ns() - start


def work(job: Job) -> None:
    """Be the worker."""
    os.sched_setaffinity(0, {job.cpu})
    installer = Installer(job)
    if job.bulk:
        print(installer.install_all(), flush=True)
    else:
        print("ready", flush=True)
        installer.answer()


if __name__ == "__main__":
    work(Job(**json.loads(sys.argv[1])))
