"""What out_of_core measures: each workload takes an array of 64-bit items, of whatever kind, and knows no more.

What they return or leave in a file must be the same for every kind of array.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Words: TypeAlias = NDArray[np.uint64]
Order: TypeAlias = NDArray[np.int64]

CHUNK = 1 << 17
"""Items that a scan sums up at once: 1 MiB."""
BATCH = 64
"""Items that one NumPy expression reads or changes, in random order."""
_FLIP = np.uint64(0x9E3779B97F4A7C15)


class Opener(Protocol):
    """Opens files as arrays of one kind, and closes them, having written back what was changed."""

    def open(self, path: Path, mode: str, items: int) -> Words:
        """Open a file in mode `r`, `r+` or `w+`."""

    def close(self, array: Words) -> None:
        """Write back, count, and close."""

    def end(self) -> None:
        """Close what is left."""


def scan(array: Words) -> int:
    """Sum everything up, a chunk at a time."""
    total = 0
    for start in range(0, len(array), CHUNK):
        total += int(array[start : start + CHUNK].sum())
    return total & (1 << 64) - 1


def read(array: Words, order: Order) -> int:
    """Sum up the items that `order` names."""
    total = 0
    for start in range(0, len(order), BATCH):
        total += int(array[order[start : start + BATCH]].sum())
    return total & (1 << 64) - 1


def change(array: Words, order: Order) -> int:
    """Change the items that `order` names. Done a second time, it undoes what it did.

    What an item becomes depends on what it was, so that a lost change, and one that is made twice, show in the file.
    """
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        array[chosen] ^= _FLIP
    return 0


def sort(opener: Opener, path: Path, folder: Path, run: int) -> int:
    """Sort the file into `folder/sorted`, in runs of so many bytes."""
    from external_sort import merge, sort_runs  # in examples/, where the measured process looks

    items, length = path.stat().st_size // 8, run // 8
    source, runs = opener.open(path, "r", items), opener.open(folder / "runs", "w+", items)
    sort_runs(source, runs, length)
    opener.close(source)
    del source
    target = opener.open(folder / "sorted", "w+", items)
    merge(runs, target, length)
    opener.close(runs)
    opener.close(target)
    return 0


READING: dict[str, Callable[[Words, Order], int]] = {
    "scan": lambda array, _: scan(array),
    "uniform probe": read,
    "uniform": read,
    "zipf": read,
    "change": change,
}
