"""What one page fault costs: our pager, a C pager that does nothing else, and no pager at all.

One run measures, in turn and several times over so that a slow minute of the machine is shared by all:

- the reference pager in C (``reference/pager.c``), as a process and as a thread, on the toucher's core, on
  another core, and where the scheduler puts it;
- ours, through ``userfault.Region`` over a ``FileStore``, with its default placement, touched by the same C
  loop, with the toucher left alone and pinned, and by NumPy;
- ``numpy.memmap`` of the same file; and ``UFFDIO_COPY`` into a memfd with no faults at all, the ceiling.

The file is in the page cache. Each page is touched once, ascending or in a shuffled order. Times on two cores
say much about the machine (the wake-up of an idle CPU) and little about the pager: compare ratios, not
nanoseconds.

    python benchmarks/fault_latency.py --output results [--quick] [--required] [--check]
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

import report
import userfault
from measurements import Check, Row
from programs import Order, ReferencePrograms
from userfault.stores import FileStore

KIB, MIB = 1 << 10, 1 << 20
PAGE = os.sysconf("SC_PAGESIZE")
ORDERS = ("shuffled", "sequential")
FREE = -1
_ROW_TIMEOUT_S = 300


@dataclass(frozen=True)
class Scale:
    """How much one repetition touches: small blocks fault so often that less memory says as much."""

    small: int
    large: int
    repetitions: int

    def size(self, block: int) -> int:
        """Bytes touched by a row with this block size."""
        return self.small if block == PAGE else self.large


FULL = Scale(small=32 * MIB, large=256 * MIB, repetitions=5)
QUICK = Scale(small=512 * KIB, large=4 * MIB, repetitions=1)


@contextmanager
def pinned(cpu: int) -> Iterator[None]:
    """Run this thread on one CPU; `FREE` changes nothing."""
    before = os.sched_getaffinity(0)
    if cpu != FREE:
        os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Bench:
    """The rows of one run over one file."""

    def __init__(self, scale: Scale, folder: Path) -> None:
        self.scale = scale
        self.source = folder / "source.bin"
        self.source.write_bytes(np.random.default_rng(1).bytes(scale.large + 2 * MIB))
        with self.source.open("rb") as file:
            os.fsync(file.fileno())  # no write-back while the clock runs
        self.programs = ReferencePrograms(folder, self.source)
        self.cpus = os.sched_getaffinity(0)
        self.here, self.there = two_cores()

    def rows(self, *, required_only: bool) -> list[Row]:
        """Every row in measuring order: what is compared stands close together."""
        if required_only:
            return [
                self._reference("process", PAGE, "shuffled", self.here),
                self._ours(PAGE, "shuffled", FREE),
                self._ours(PAGE, "shuffled", self.here),
                *([self._reference("process", PAGE, "shuffled", self.there)] if self.there != FREE else []),
                self._bulk(64 * KIB),
                self._ours(64 * KIB, "sequential", FREE),
                self._ours(64 * KIB, "sequential", self.here),
            ]
        return [row for block in (PAGE, 64 * KIB, 2 * MIB) for row in self._block_rows(block)]

    def _block_rows(self, block: int) -> Iterator[Row]:
        for order in ORDERS:
            yield self._reference("process", block, order, self.here)
            yield self._ours(block, order, FREE)
            yield self._ours(block, order, self.here)
            yield self._ours_by_numpy(block, order)
            if order == "sequential":
                yield self._bulk(block)
            if self.there != FREE:
                yield self._reference("process", block, order, self.there)
            yield self._reference("process", block, order, FREE)
            for cpu in (self.here, *([self.there] if self.there != FREE else []), FREE):
                yield self._reference("thread", block, order, cpu)
            if block == PAGE:
                yield self._memmap(order)

    def _reference(self, kind: str, block: int, order: str, cpu: int) -> Row:
        placement = {self.here: "same core", self.there: "other core"}.get(cpu, "unpinned")
        if cpu == FREE:
            placement = "unpinned"
        size = self.scale.size(block)
        cpus = (FREE if cpu == FREE else self.here, cpu)
        measure = partial(self.programs.pager, size, block, kind, cpus, order)
        return Row(f"C {kind}", placement, block, order, size, measure)

    def _bulk(self, call: int) -> Row:
        size = self.scale.size(call)
        return Row(
            "bulk COPY",
            "no faults",
            call,
            "sequential",
            size,
            partial(self.programs.bulk, size, call, self.here),
        )

    def _ours(self, block: int, order: str, cpu: int) -> Row:
        placement = "default" if cpu == FREE else "default, toucher pinned"
        row = Row("userfault", placement, block, order, self.scale.size(block), lambda: (0, 0))
        row.measure = partial(self._through_region, row, cpu, self.programs.touch)
        return row

    def _ours_by_numpy(self, block: int, order: str) -> Row:
        row = Row("userfault, NumPy", "default", block, order, self.scale.size(block), lambda: (0, 0))
        row.measure = partial(self._through_region, row, FREE, None)
        return row

    def _memmap(self, order: str) -> Row:
        size = self.scale.size(PAGE)
        return Row("numpy.memmap", "no pager", PAGE, order, size, partial(self._through_memmap, size, order))

    def _through_region(
        self, row: Row, cpu: int, touch: Callable[[int, Order], tuple[int, int]] | None
    ) -> tuple[int, int]:
        """Open a region, touch its last block untimed (both sides then run), and the rest by the clock."""
        order = self.programs.order(row.size, PAGE, shuffled=row.order == "shuffled")
        store = FileStore(self.source, size=row.size + row.block)
        with pinned(cpu), userfault.Region(store, block_size=row.block) as region:
            self.programs.touch(region.address, np.array([row.size], np.uint64))
            if touch is None:
                measured = index_by_numpy(np.frombuffer(region.memory, np.uint8), order)
            else:
                measured = touch(region.address, order)
            row.notes |= {"placement": region.stats().placement}
        return measured

    def _through_memmap(self, size: int, order: str) -> tuple[int, int]:
        array = np.memmap(self.source, np.uint8, mode="r", shape=(size,))
        return index_by_numpy(array, self.programs.order(size, PAGE, shuffled=order == "shuffled"))

    def expected(self, size: int) -> int:
        """The sum of one byte of each of the first pages of the file."""
        return int(np.fromfile(self.source, np.uint8, size)[::PAGE].sum(dtype=np.uint64))


def index_by_numpy(array: np.ndarray[tuple[int], np.dtype[np.uint8]], order: Order) -> tuple[int, int]:
    """Fancy-index one byte of each page, holding the GIL: nanoseconds, sum."""
    index = order.astype(np.intp)
    start = time.perf_counter_ns()
    values = array[index]
    return time.perf_counter_ns() - start, int(values.sum(dtype=np.uint64))


def two_cores() -> tuple[int, int]:
    """A CPU for the toucher and one on another core, or `FREE` where this process may use one core only."""
    here, *others = sorted(os.sched_getaffinity(0))
    siblings = Path(f"/sys/devices/system/cpu/cpu{here}/topology/core_cpus_list")
    shared = expand(siblings.read_text()) if siblings.exists() else {here}
    return here, next((cpu for cpu in others if cpu not in shared), FREE)


def expand(cpus: str) -> set[int]:
    """The numbers in a kernel CPU list: "0,2-4" is {0, 2, 3, 4}."""
    pairs = (part.partition("-") for part in cpus.strip().split(","))
    return {cpu for first, _, last in pairs for cpu in range(int(first), int(last or first) + 1)}


def run(bench: Bench, rows: list[Row], repetitions: int) -> None:
    """Measure every row once, then the next repetition; a first round, not counted, warms memory and caches.

    Raises:
        RuntimeError: a row read wrong bytes.
    """
    expected = {size: bench.expected(size) for size in {row.size for row in rows}}
    for repetition in range(repetitions + 1):
        for row in rows:
            faulthandler.dump_traceback_later(_ROW_TIMEOUT_S, exit=True)
            elapsed, total = row.measure()
            faulthandler.cancel_dump_traceback_later()
            if total != expected[row.size]:
                raise RuntimeError(f"{row.pager}, {row.placement}: sum {total}, expected {expected[row.size]}")
            if repetition:
                row.nanoseconds.append(elapsed)
        print(
            f"repetition {repetition} of {repetitions} done" if repetition else "warm",
            file=sys.stderr,
            flush=True,
        )


def checks(rows: list[Row]) -> list[Check]:
    """The ratios that the project promises, as far as this run can tell."""
    by_key = {(row.pager, row.placement, row.block, row.order): row.nanoseconds for row in rows}
    random = (PAGE, "shuffled")
    stream = (64 * KIB, "sequential")
    wanted = [
        (
            "4 KiB random: ours / C process on the same core",
            "default",
            ("C process", "same core"),
            random,
            1.6,
        ),
        (
            "4 KiB random: ours / C process on the other core",
            "default",
            ("C process", "other core"),
            random,
            0.5,
        ),
        (
            "64 KiB sequential: bulk UFFDIO_COPY time / ours",
            "default",
            ("bulk COPY", "no faults"),
            stream,
            0.5,
        ),
    ]
    found = []
    for name, placement, other, case, bound in wanted:
        ours, theirs = by_key.get(("userfault", placement, *case)), by_key.get((*other, *case))
        if not ours or not theirs:
            continue
        at_most = other[0] != "bulk COPY"
        pairs = zip(ours, theirs, strict=True)
        found.append(Check(name, [a / b if at_most else b / a for a, b in pairs], bound, at_most))
    return found


def describe_machine(bench: Bench) -> dict[str, str | int]:
    """Where this ran."""
    return {
        "kernel": platform.release(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "cpus": os.cpu_count() or 1,
        "toucher_cpu": bench.here,
        "other_cpu": bench.there,
    }


def parse(arguments: list[str] | None, description: str) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, help="folder for a JSON file with all figures, and a plot")
    parser.add_argument("--quick", action="store_true", help="a few megabytes, once: does it run at all?")
    parser.add_argument("--required", action="store_true", help="only the rows behind the promised ratios")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a promised ratio is missed")
    parser.add_argument("--repetitions", type=int, help="how often each row is measured")
    parser.add_argument("--folder", type=Path, help="where the temporary file is made (default: the usual place)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; return the exit status."""
    options = parse(arguments, "What one page fault costs, against a C pager and numpy.memmap.")
    scale = QUICK if options.quick else FULL
    repetitions = options.repetitions or scale.repetitions
    try:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            bench = Bench(scale, Path(folder))
            rows = bench.rows(required_only=options.required)
            run(bench, rows, repetitions)
    except (RuntimeError, userfault.errors.Error) as error:
        print(f"fault_latency: {error}", file=sys.stderr)
        return 2
    promised = checks(rows)
    machine = describe_machine(bench)
    print(report.table(rows, promised, machine))
    if options.output:
        report.write(options.output / "fault_latency", rows, promised, machine)
    return int(options.check and not all(check.kept for check in promised))


if __name__ == "__main__":
    sys.exit(main())
