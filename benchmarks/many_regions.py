"""What a fault costs, by the number of regions that share a pager's budget.

For each number of regions the same memory is shared: a budget of 64 MiB for 512 MiB of data in all, in blocks of 4 KiB.
Random touches go over all regions alike, so nearly every one is a fault that drops another block, mostly of another
region. The file descriptors are limited to 1024, hard, as on most machines. Memory comes from small stores in the
pager's own memory, so that nothing but the pager is measured.

Usage: python benchmarks/many_regions.py [--regions 1 10 100 1000] [--touches 20000] [--repetitions 5] [--output FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import userfault
from userfault.stores import MemoryStore

PAGE = 4096
DATA, BUDGET = 512 << 20, 64 << 20
FILES = 1024


@dataclass
class Row:
    """What was measured with one number of regions."""

    regions: int
    opening: float
    """Milliseconds for each region."""
    micros: list[float]
    """µs a fault, of each repetition."""
    faults: list[int]
    resident: float
    """Of the budget, at the end."""
    restarts: int


def measure(count: int, touches: int, repetitions: int) -> Row:
    """Open `count` regions, touch at random, and measure."""
    size = DATA // count // PAGE * PAGE
    with userfault.Pager(budget=BUDGET) as pager, ExitStack() as stack:
        store = MemoryStore(bytes(range(256)) * (size // 256))
        opened = time.perf_counter()
        regions = [
            stack.enter_context(userfault.Region(store, block_size=PAGE, budget=BUDGET, pager=pager))
            for _ in range(count)
        ]
        opened = time.perf_counter() - opened
        views = [stack.enter_context(region.memory) for region in regions]
        rng = random.Random(count)
        micros, faults = [], []
        for _ in range(repetitions + 1):  # the first fills the budget
            places = [(rng.randrange(count), rng.randrange(size)) for _ in range(touches)]
            before = sum(region.stats().faults for region in regions)
            begun = time.perf_counter()
            for number, at in places:
                if views[number][at] != at % 256:
                    raise SystemExit(f"a wrong byte at {at} of region {number}")
            took = time.perf_counter() - begun
            faults.append(sum(region.stats().faults for region in regions) - before)
            micros.append(took / max(1, faults[-1]) * 1e6)
        resident = sum(region.stats().resident_bytes for region in regions)
        restarts = pager.restarts
    return Row(count, 1000 * opened / count, micros[1:], faults[1:], resident / BUDGET, restarts)


def table(rows: list[Row]) -> str:
    """Return the figures as text."""
    lines = [f"{'regions':>8} {'µs a fault: median (min-max)':>30} {'of the first row':>17} {'resident/budget':>16}"]
    reference = statistics.median(rows[0].micros)
    for row in rows:
        middle = statistics.median(row.micros)
        spread = f"{middle:.1f} ({min(row.micros):.1f}-{max(row.micros):.1f})"
        lines.append(f"{row.regions:>8} {spread:>30} {middle / reference:>17.2f} {row.resident:>16.3f}")
    return "\n".join(lines)


def plot(target: Path, rows: list[Row]) -> None:
    """Draw the cost of a fault over the number of regions, where matplotlib is installed."""
    try:
        import matplotlib as mpl
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return
    mpl.use("svg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    counts = [row.regions for row in rows]
    lowest, highest = [min(row.micros) for row in rows], [max(row.micros) for row in rows]
    axes.fill_between(counts, lowest, highest, alpha=0.2, label="min to max")
    axes.plot(counts, [statistics.median(row.micros) for row in rows], marker="o", label="median")
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("regions that share the budget")
    axes.set_ylabel("µs a fault, with eviction")
    axes.legend()
    figure.tight_layout()
    figure.savefig(target)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description="What a fault costs, by the number of regions.")
    parser.add_argument("--regions", type=int, nargs="+", default=[1, 3, 10, 30, 100, 300, 1000])
    parser.add_argument("--touches", type=int, default=20_000)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--output", type=Path, help="folder for many_regions.json and .svg")
    options = parser.parse_args(arguments)
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))
    rows = []
    for count in options.regions:
        rows.append(measure(count, options.touches, options.repetitions))
        print(f"{count} regions done", file=sys.stderr)
    print(f"Linux {os.uname().release}, CPUs {sorted(os.sched_getaffinity(0))}, nobody pinned; {FILES} descriptors")
    print(table(rows))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "many_regions.json").write_text(
            json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8"
        )
        plot(options.output / "many_regions.svg", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
