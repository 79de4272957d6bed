"""What the demo shows, step by step."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING

import numpy as np

from userfault import default_pager, open_array
from userfault.cli import drawing, figures
from userfault.cli.command import NO, YES
from userfault.cli.sample import COLUMNS, ROW, Sample
from userfault.kernel.memory import PAGE_SIZE
from userfault.kernel.process import memory_available

if TYPE_CHECKING:
    from userfault import PagedArray, Pager
    from userfault.cli.screen import Screen

_TOUCHES = 1000
_SEED = 0x12345


class Show:
    """One run over one sample. It takes the file away again if it has made it."""

    def __init__(self, screen: Screen, sample: Sample, *, keep: bool) -> None:
        self.screen = screen
        self.sample = sample
        self.keep = keep
        self.numbers = choose_rows(sample.rows)
        self.read = np.zeros((len(self.numbers), COLUMNS))
        self.pager: Pager

    def run(self) -> int:
        """Do all of it, and return the exit status."""
        started = time.perf_counter()
        self.pager = default_pager()  # first, because it is what may not work here
        pager_s = time.perf_counter() - started
        found = self.sample.is_there()
        if not found:
            self.sample.check_room()
        try:
            self.make(found=found)
            array = self.open(pager_s)
            try:
                self.touch(array)
                self.look(array)
            finally:
                with contextlib.suppress(BufferError):  # an interrupted step may hold a row
                    array.close()
            return self.compare()
        finally:
            if not found and not self.keep:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(self.sample.path)

    # -- the steps ------------------------------------------------------------------------------------------------

    def make(self, *, found: bool) -> None:
        """Make the file, unless it is there."""
        self.screen.heading("1. A file")
        rows = f"{figures.count(self.sample.rows, 'row')} of {figures.size(ROW)}"
        what = f"{figures.size(self.sample.nbytes)} of float64, {rows}"
        if found:
            self.screen.line(f"  {what}, made by an earlier run")
        else:
            started = time.perf_counter()
            with self.screen.progress("making it", self.sample.nbytes) as advance:
                self.sample.make(advance)
            self.screen.line(f"  {what}, made in {figures.duration(time.perf_counter() - started)}")
        self.screen.line(f"  {self.sample.path}")

    def open(self, pager_s: float) -> PagedArray:
        """Open it, and compare with loading it."""
        self.screen.heading("2. Opening it")
        started = time.perf_counter()
        array = open_array(self.sample.path)
        open_s = time.perf_counter() - started
        load_s = self.load()
        loaded = "not tried: too little memory" if load_s is None else f"{figures.duration(load_s)}, everything read"
        sooner = "" if load_s is None else f", {load_s / open_s:,.0f} times sooner"
        self.screen.facts(
            [
                ("numpy.load", loaded),
                ("userfault.open_array", f"{figures.duration(open_s)}, nothing read{sooner}"),
                ("the pager behind it", f"{figures.duration(pager_s)} to start, once in a process"),
            ]
        )
        return array

    def load(self) -> float | None:
        """Return how long `numpy.load` takes; None if there is no memory to try."""
        if memory_available() < self.sample.nbytes * 5 // 4:
            return None
        started = time.perf_counter()
        try:
            np.load(self.sample.path)
        except MemoryError:
            return None
        return time.perf_counter() - started

    def touch(self, array: PagedArray) -> None:
        """Read the rows, and kill the worker when half of them are read."""
        half = len(self.numbers) // 2
        self.screen.heading(f"3. Touching {figures.count(len(self.numbers), 'row')} scattered over it")
        took, _ = self.read_rows(array, 0, half)
        self.screen.line(f"  {figures.count(half, 'row')} in {figures.duration(took)}")
        array.region.stats()  # has the worker write its counters down, before
        killed = self.pager.worker_pid
        os.kill(killed, signal.SIGKILL)
        self.screen.line(f"  worker {killed} killed with SIGKILL", "bold red")
        took, slowest = self.read_rows(array, half, len(self.numbers))
        waited = f"one of them waited {figures.duration(slowest)} for the next worker, {self.pager.worker_pid}"
        self.screen.line(f"  {figures.count(len(self.numbers) - half, 'row')} in {figures.duration(took)}; {waited}")

    def read_rows(self, array: PagedArray, first: int, stop: int) -> tuple[float, float]:
        """Copy some of the rows; return the seconds for all and for the slowest."""
        clock, slowest = time.perf_counter, 0.0
        before = begin = clock()
        for i in range(first, stop):
            self.read[i] = array[self.numbers[i]]
            now = clock()
            slowest, before = max(slowest, now - before), now
        return before - begin, slowest

    def look(self, array: PagedArray) -> None:
        """Say what came in, how long it took, and where it is."""
        region, screen = array.region, self.screen
        stats = region.stats()
        screen.heading("4. What came in")
        pages = -(-stats.bytes_read // PAGE_SIZE)
        part = figures.share(stats.bytes_read, region.size)
        core = "any core" if stats.worker_cpu is None else f"core {stats.worker_cpu}"
        screen.facts(
            [
                ("faults", f"{figures.count(stats.faults)}, each a block of {figures.size(region.block_size)}"),
                ("brought in", f"{figures.count(pages, 'page')}, {figures.size(stats.bytes_read)}: {part} of the file"),
                ("workers", f"{1 + self.pager.restarts}, the last one now on {core}"),
            ]
        )
        half, most = (figures.duration(stats.latency.percentile(percent)) for percent in (50, 99))
        screen.line()
        screen.line(f"  Faults by the time the pager took: half within {half}, 99 % within {most}")
        for text in drawing.histogram(stats.latency, unicode=screen.unicode):
            screen.line(f"    {text}", "green")
        screen.line()
        screen.line("  The file, from its first block to its last")
        *picture, legend = drawing.residency_map(region.residency(), unicode=screen.unicode)
        for text in picture:
            screen.line(f"    {text}", "green")
        screen.line(f"    {legend}", "dim")

    def compare(self) -> int:
        """Compare what was read with what the file holds, read in the ordinary way."""
        self.screen.heading("5. Compared with the file")
        wrong = 0
        with open(self.sample.path, "rb", buffering=0) as file:
            start = os.fstat(file.fileno()).st_size - self.sample.nbytes
            for number, values in zip(self.numbers, self.read, strict=True):
                wrong += os.pread(file.fileno(), ROW, start + number * ROW) != values.tobytes()
        if wrong:
            self.screen.line(f"  {figures.count(wrong, 'row')} of {len(self.numbers)} differ from the file", "bold red")
            return NO
        self.screen.line(f"  all {figures.count(len(self.numbers), 'row')} equal, byte for byte", "bold green")
        self.screen.line("  For a local file in the page cache, as this one, numpy.memmap is the better tool.", "dim")
        if self.keep:
            self.screen.line(f"  kept: {self.sample.path}")
        return YES


def choose_rows(rows: int) -> list[int]:
    """Return the rows to touch, in no order: most near three places, the others anywhere."""
    random = np.random.default_rng(_SEED)
    near = random.normal(random.random(3)[:, np.newaxis], 0.02, (3, _TOUCHES // 4)).ravel()
    places = np.concatenate([near, random.random(_TOUCHES - near.size)]) % 1.0
    random.shuffle(places)
    chosen: list[int] = (places * rows).astype(np.int64).tolist()
    return chosen
