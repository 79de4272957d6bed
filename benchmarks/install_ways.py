"""How a worker should fill a block and make it visible; decides design/fill-and-install.md.

The file is in the page cache, the region is a shared mapping of a memfd, and the worker is another process: a Python
loop on the toucher's core that reads one message at a time and answers it in one of these ways:

    copy-mapping      UFFDIO_COPY straight from a mapping of the file
    copy-staging      preadv into a buffer, UFFDIO_COPY from there
    continue-preadv   preadv into the worker's own mapping of the memfd, UFFDIO_CONTINUE
    continue-pwrite   pwrite into the memfd from a mapping of the file, UFFDIO_CONTINUE

Bulk rows do the same with no faults, block after block; there ``continue-filled`` maps what is in the memfd already.
The ways take turns, several times over. Ratios are taken within one repetition; a first round is not counted. On a
machine that has other work to do, start it with ``chrt -f 10``: then nobody comes between the two.

    python benchmarks/install_ways.py [--quick] [--repetitions N] [--folder DIR] [--output DIR]
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

import installers
from installers import FILLED, WAYS, Job
from measurements import Row
from programs import ReferencePrograms
from userfault.errors import Error
from userfault.kernel import memfd, memory
from userfault.kernel.abi import Feature, RegisterMode
from userfault.kernel.userfaultfd import Userfaultfd

KIB, MIB = 1 << 10, 1 << 20
PAGE = memory.PAGE_SIZE
BLOCKS = (PAGE, 64 * KIB, 2 * MIB)
ORDERS = ("shuffled", "sequential")
BULK = "bulk"
_ROW_TIMEOUT_S = 300


@dataclass(frozen=True)
class Scale:
    """How much one repetition brings in: small blocks fault so often that less memory says as much."""

    small: int
    large: int
    repetitions: int

    def size(self, block: int) -> int:
        """Bytes brought in by a row with this block size."""
        return self.small if block == PAGE else self.large


FULL = Scale(small=32 * MIB, large=256 * MIB, repetitions=9)
QUICK = Scale(small=512 * KIB, large=4 * MIB, repetitions=1)


# -- the toucher ---------------------------------------------------------------------------------------------


class Target:
    """Registered memory of this process that a worker fills."""

    def __init__(self, size: int) -> None:
        self.size, self.fd = size, memfd.create("install-ways", size)
        self.address = memory.map_memory(size, fd=self.fd, prot=memory.PROT_READ)
        self.uffd = Userfaultfd.open(Feature.MISSING_SHMEM | Feature.MINOR_SHMEM)
        self.uffd.register(self.address, size, RegisterMode.MISSING | RegisterMode.MINOR)

    def close(self) -> None:
        """Unmap and close."""
        memory.unmap(self.address, self.size)
        self.uffd.close()
        os.close(self.fd)


class Bench:
    """The rows of one run over one file."""

    def __init__(self, scale: Scale, folder: Path) -> None:
        self.scale = scale
        source = folder / "source.bin"
        source.write_bytes(np.random.default_rng(1).bytes(scale.large))
        self.file = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        os.fsync(self.file)  # no write-back while the clock runs
        self.programs = ReferencePrograms(folder, source)
        self.cpu = min(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {self.cpu})

    def close(self) -> None:
        """Close the file."""
        os.close(self.file)

    def rows(self) -> list[Row]:
        """Every row; the ways of one block size and order stand together."""
        return [
            self._row(way, block, order)
            for block in BLOCKS
            for order in (*ORDERS, BULK)
            for way in (*WAYS, *([FILLED] if order == BULK else []))
        ]

    def _row(self, way: str, block: int, order: str) -> Row:
        size = self.scale.size(block)
        return Row(way, "same core", block, order, size, partial(self._measure, way, block, order, size))

    def _measure(self, way: str, block: int, order: str, size: int) -> tuple[int, int]:
        """Touch every page once, in order; for a bulk row after it was brought in, by the worker's clock."""
        pages = self.programs.order(size, PAGE, shuffled=order == "shuffled")
        target = Target(size)
        try:
            with self._worker(target, way, block, bulk=order == BULK) as said:
                elapsed, total = self.programs.touch(target.address, pages)
                return (int(said) if order == BULK else elapsed), total
        finally:
            target.close()

    @contextmanager
    def _worker(self, target: Target, way: str, block: int, *, bulk: bool) -> Iterator[bytes]:
        """Run a worker; yields its first line: that it is ready, or how long it took."""
        job = Job(way, target.uffd.fd, target.fd, self.file, target.address, target.size, block, self.cpu, bulk)
        command = [sys.executable, installers.__file__, json.dumps(asdict(job))]
        fds = (job.uffd, job.memfd, job.file)
        with subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=fds) as worker:
            assert worker.stdout is not None
            said = worker.stdout.readline()
            if not said:
                raise RuntimeError(f"{way}: the worker ended at once")
            try:
                yield said
            finally:
                worker.kill()

    def expected(self, size: int) -> int:
        """The sum of one byte of each of the first pages of the file."""
        data = np.frombuffer(os.pread(self.file, size, 0), np.uint8)
        return int(data[::PAGE].sum(dtype=np.uint64))


def run(bench: Bench, rows: list[Row], repetitions: int, *, warm: bool) -> None:
    """Measure all rows, then the next repetition, those of one case in a fresh order each time; `warm`: one more first.

    Raises:
        RuntimeError: a row read wrong bytes.
    """
    expected = {size: bench.expected(size) for size in {row.size for row in rows}}
    for repetition in range(0 if warm else 1, repetitions + 1):
        for row in sorted(random.sample(rows, len(rows)), key=_case):
            faulthandler.dump_traceback_later(_ROW_TIMEOUT_S, exit=True)
            elapsed, total = row.measure()
            faulthandler.cancel_dump_traceback_later()
            if total != expected[row.size]:
                raise RuntimeError(f"{row.pager}, {row.order}: sum {total}, expected {expected[row.size]}")
            if repetition:
                row.nanoseconds.append(elapsed)
        print(f"repetition {repetition} of {repetitions} done" if repetition else "warm", file=sys.stderr, flush=True)


# -- the table -----------------------------------------------------------------------------------------------


def _case(row: Row) -> tuple[int, str]:
    return row.block, row.order


def ratios(row: Row, rows: list[Row]) -> list[float]:
    """How many times as long as copying from the mapping, in each repetition."""
    first = next(other for other in rows if _case(other) == _case(row) and other.pager == WAYS[0])
    return [ours / theirs for ours, theirs in zip(row.nanoseconds, first.nanoseconds, strict=True)]


def line(row: Row, rows: list[Row]) -> str:
    """One row of the table, as Markdown."""
    pages = row.block / PAGE
    found = sorted(value / 1000 / pages for value in row.per_fault)
    micros = f"{statistics.median(found):.2f} ({found[0]:.2f}-{found[-1]:.2f})"
    times = sorted(ratios(row, rows))
    ratio = f"{statistics.median(times):.2f} ({times[0]:.2f}-{times[-1]:.2f})"
    size = f"{row.block // KIB} KiB" if row.block < MIB else f"{row.block // MIB} MiB"
    return f"| {size} | {row.order} | {row.pager} | {micros} | {row.megabytes_per_s:.0f} | {ratio} |"


def table(rows: list[Row]) -> str:
    """The run as a Markdown table."""
    head = "| block | order | way | µs a page: median (min-max) | MB/s | x copy-mapping |\n|---|---|---|---|---|---|"
    return "\n".join([head, *(line(row, rows) for row in rows)])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="How a worker should fill a block and make it visible.")
    parser.add_argument("--quick", action="store_true", help="a few megabytes, once: does it run at all?")
    parser.add_argument("--repetitions", type=int, help="how often each row is measured")
    parser.add_argument("--folder", type=Path, help="where the temporary file is made (default: the usual place)")
    parser.add_argument("--output", type=Path, help="folder for install_ways.json")
    return parser.parse_args(arguments)


def write(folder: Path, rows: list[Row], machine: str) -> None:
    """Write every figure as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("pager", "placement", "block", "order", "size", "nanoseconds")
    document = {"machine": machine, "rows": [{name: getattr(row, name) for name in names} for row in rows]}
    (folder / "install_ways.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; return the exit status."""
    options = parse(arguments)
    scale = QUICK if options.quick else FULL
    try:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            bench = Bench(scale, Path(folder))
            rows = bench.rows()
            run(bench, rows, options.repetitions or scale.repetitions, warm=not options.quick)
            bench.close()
    except (RuntimeError, Error) as error:
        print(f"install_ways: {error}", file=sys.stderr)
        return 2
    policy = " under SCHED_FIFO" if os.sched_getscheduler(0) == os.SCHED_FIFO else ""
    machine = (
        f"Linux {platform.release()}, Python {platform.python_version()}; placement: toucher and worker "
        f"both pinned to CPU {bench.cpu} of {os.cpu_count()}{policy}; load {os.getloadavg()[0]:.1f}"
    )
    print(machine, table(rows), sep="\n\n")
    if options.output:
        write(options.output, rows, machine)
    return 0


if __name__ == "__main__":
    sys.exit(main())
