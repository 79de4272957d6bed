"""Sort a file of 64-bit keys that is larger than the memory it may use.

Pieces that fit into memory are sorted one by one, and written to a second file as *runs*; then the runs are merged into
a third. Both steps know nothing of files: they take arrays, of whatever kind, and use little memory of their own.
What they touch comes in by itself, and what they write goes out by itself, within the budget.

    python external_sort.py [MEGABYTES]
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

import userfault

Keys: TypeAlias = NDArray[np.uint64]
BUDGET = "4MiB"
RUN = 1 << 18
"""Keys that are sorted at once: 2 MiB."""


def sort_runs(source: Keys, runs: Keys, length: int) -> None:
    """Sort each `length` keys of `source` into the same place of `runs`."""
    for start in range(0, len(source), length):
        runs[start : start + length] = np.sort(source[start : start + length])


def merge(runs: Keys, target: Keys, length: int) -> None:
    """Merge sorted runs of `length` keys into `target`, some of each run at a time, `length` keys in all."""
    ends = [min(start + length, len(runs)) for start in range(0, len(runs), length)]
    places = list(range(0, len(runs), length))
    window = max(1, length // max(1, len(places)))
    done = 0
    while places:
        stops = [min(place + window, end) for place, end in zip(places, ends, strict=True)]
        last = min(runs[stop - 1] for stop in stops)  # what is not greater than this is in sight in every run
        for number, stop in enumerate(stops):
            stops[number] = places[number] + int(np.searchsorted(runs[places[number] : stop], last, side="right"))
        count = sum(stops) - sum(places)
        target[done : done + count] = _in_order([runs[place:stop] for place, stop in zip(places, stops, strict=True)])
        done += count
        left = [(stop, end) for stop, end in zip(stops, ends, strict=True) if stop < end]
        places, ends = [stop for stop, _ in left], [end for _, end in left]


def _in_order(pieces: list[Keys]) -> Keys:
    """Put pieces together in ordinary memory, and sort them there."""
    keys = np.concatenate(pieces)
    keys.sort()
    return keys


def is_sorted(keys: Keys, step: int = RUN) -> bool:
    """Tell whether no key is less than the one before it, looking at a piece at a time."""
    pieces = (keys[start : start + step + 1] for start in range(0, len(keys), step))
    return all(bool(np.all(piece[:-1] <= piece[1:])) for piece in pieces)


def tell(name: str, array: userfault.PagedArray) -> None:
    """Write changes back, and print what the pager did for an array."""
    array.flush()
    stats = array.region.stats()
    mega = {"read": stats.bytes_read, "written": stats.bytes_written, "in memory": stats.resident_bytes}
    print(f"{name}: {stats.faults} faults, " + ", ".join(f"{value >> 20} MiB {what}" for what, value in mega.items()))


def sort_file(source: Path, target: Path) -> None:
    """Sort the keys of one file into another. The runs lie beside it for a while."""
    between = target.with_suffix(".runs")
    count = source.stat().st_size // 8
    with userfault.open_array(between, mode="w+", dtype=np.uint64, shape=count, budget=BUDGET) as runs:
        with userfault.open_array(source, dtype=np.uint64, budget=BUDGET) as keys:
            sort_runs(keys, runs, RUN)
            tell("keys  ", keys)  # nothing to write back
        with userfault.open_array(target, mode="w+", dtype=np.uint64, shape=count, budget=BUDGET) as merged:
            merge(runs, merged, RUN)
            tell("runs  ", runs)
            tell("sorted", merged)
    between.unlink()


def main() -> None:
    """Make keys, sort them, and check."""
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 32
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "keys", Path(folder) / "sorted"
        keys = np.random.default_rng(0).integers(0, 1 << 63, megabytes << 17, dtype=np.uint64)
        keys.tofile(source)
        total = int(keys.sum())
        del keys

        started = time.perf_counter()
        sort_file(source, target)
        took = time.perf_counter() - started
        with userfault.open_array(target, dtype=np.uint64, budget=BUDGET) as result:
            right = is_sorted(result) and int(result.sum()) == total
        print(f"{megabytes} MiB sorted in {took:.1f} s, at most {BUDGET} of each file in memory; right: {right}")


if __name__ == "__main__":
    main()
