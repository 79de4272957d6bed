"""One measured run of out_of_core: a process that is in its cgroup already, told by JSON what to do.

    python out_of_core_child.py '{"workload": "scan", ...}'

It prints what it measured, as JSON. `examples/` must be in PYTHONPATH.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

import out_of_core_workloads as workloads
import userfault
from memory_cgroup import MemoryCgroup
from out_of_core_workloads import Opener, Order, Words
from userfault.stores import MemoryStore


@dataclass(frozen=True)
class Job:
    """What to measure."""

    workload: str
    path: str
    folder: str
    order: str
    """File with the items that are read or changed; empty where there are none."""
    cgroup: str
    block_size: int
    """Of a region; 0 means `numpy.memmap`."""
    advice: str
    """What a memmap is told by madvise: `"random"`, or nothing."""
    budget: int
    """Bytes, for all regions together."""
    run: int
    """Bytes that the sort has in ordinary memory."""


@dataclass
class Measured:
    """What one run took. Bytes, seconds, numbers of events."""

    seconds: float = 0.0
    """Until all changes were on the disk."""
    flush_s: float = 0.0
    """Of these, for the writing back at the end."""
    checksum: int = 0
    faults: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    evictions: int = 0
    placement: str = ""
    application_cpu_s: float = 0.0
    pager_cpu_s: float = 0.0
    minor_faults: int = 0
    major_faults: int = 0
    anonymous: int = 0
    kernel: int = 0
    region: int = 0
    page_cache: int = 0
    """Counted in the cgroup when the work on an array was done, before it was written back and closed; the most."""
    peak: int = 0
    kills: int = 0


@dataclass
class Paged:
    """Opens files with userfault. The pager runs before the clock does."""

    block_size: int
    budgets: Iterator[int]
    measured: Measured
    cgroup: MemoryCgroup
    first: userfault.Region = field(default_factory=lambda: userfault.Region(MemoryStore(bytes(mmap.PAGESIZE))))

    def open(self, path: Path, mode: str, items: int) -> Words:
        """Open a file."""
        shape = items if mode == "w+" else None
        return userfault.open_array(
            path, mode=mode, dtype=np.uint64, shape=shape, block_size=self.block_size, budget=next(self.budgets)
        )

    def close(self, array: Words) -> None:
        """Write back, count, close."""
        assert isinstance(array, userfault.PagedArray)
        _note_use(self.measured, self.cgroup)
        _timed_flush(self.measured, array)
        stats = array.region.stats()
        self.measured.faults += stats.faults
        self.measured.bytes_read += stats.bytes_read
        self.measured.bytes_written += stats.bytes_written
        self.measured.evictions += stats.evictions
        self.measured.placement = stats.placement
        array.close()

    def end(self) -> None:
        """Close what held the pager."""
        self.first.close()


@dataclass
class Mapped:
    """Opens files with numpy.memmap."""

    advice: str
    measured: Measured
    cgroup: MemoryCgroup

    def open(self, path: Path, mode: str, items: int) -> Words:
        """Open a file."""
        array: Words = np.memmap(path, np.uint64, mode=mode, shape=(items,))  # type: ignore[call-overload]  # any mode
        if self.advice == "random":
            mapping: object = array.base
            assert isinstance(mapping, mmap.mmap)
            mapping.madvise(mmap.MADV_RANDOM)
        return array

    def close(self, array: Words) -> None:
        """Write back; the mapping goes with the last reference."""
        assert isinstance(array, np.memmap)
        _note_use(self.measured, self.cgroup)
        _timed_flush(self.measured, array)

    def end(self) -> None:
        """Nothing is left to close."""


def _timed_flush(measured: Measured, array: userfault.PagedArray | np.memmap[tuple[int], np.dtype[np.uint64]]) -> None:
    started = time.perf_counter()
    array.flush()
    measured.flush_s += time.perf_counter() - started


def _budgets(job: Job) -> Iterator[int]:
    """The whole budget for one region, or a half each for the two that a sort has open."""
    while True:
        yield job.budget // 2 if job.workload == "sort" else job.budget


@contextmanager
def _clock(measured: Measured, cgroup: MemoryCgroup) -> Iterator[None]:
    """Measure time and what the processes did."""
    before, pager = resource.getrusage(resource.RUSAGE_SELF), _pager_cpu(cgroup)
    started = time.perf_counter()
    yield
    measured.seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF)
    measured.pager_cpu_s = _pager_cpu(cgroup) - pager
    measured.application_cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    measured.minor_faults, measured.major_faults = (
        after.ru_minflt - before.ru_minflt,
        after.ru_majflt - before.ru_majflt,
    )


def _pager_cpu(cgroup: MemoryCgroup) -> float:
    """Processor seconds of all but this process in the cgroup: supervisor and worker."""
    ticks = 0
    for pid in set(cgroup.processes()) - {os.getpid()}:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended just now
            text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
            user, system = text.rpartition(")")[2].split()[11:13]  # proc_pid_stat(5)
            ticks += int(user) + int(system)
    return ticks / os.sysconf("SC_CLK_TCK")


def run(job: Job) -> Measured:
    """Do it, and measure."""
    measured, cgroup = Measured(), MemoryCgroup(Path(job.cgroup))
    opener: Opener
    if job.block_size:
        opener = Paged(job.block_size, _budgets(job), measured, cgroup)
    else:
        opener = Mapped(job.advice, measured, cgroup)
    order: Order = np.load(job.order) if job.order else np.empty(0, np.int64)
    path = Path(job.path)
    with _clock(measured, cgroup):
        if job.workload == "sort":
            workloads.sort(opener, path, Path(job.folder), job.run)
        else:
            array = opener.open(path, "r+" if job.workload == "change" else "r", path.stat().st_size // 8)
            measured.checksum = workloads.READING[job.workload](array, order)
            opener.close(array)
    opener.end()
    return measured


def _note_use(measured: Measured, cgroup: MemoryCgroup) -> None:
    use = cgroup.use()
    measured.anonymous, measured.kernel = max(measured.anonymous, use.anonymous), max(measured.kernel, use.kernel)
    measured.region, measured.page_cache = max(measured.region, use.shared), max(measured.page_cache, use.page_cache)


if __name__ == "__main__":
    print(json.dumps(asdict(run(Job(**json.loads(sys.argv[1]))))))
