"""Which blocks a part of an array lies in, and pinning them.

The items of a strided view are enumerated piece by piece, where a piece is as much as can be told without looking at
single items: **gaps shorter than a block hide no block**, so that whatever is separated by nothing larger touches every
block between its first and its last byte.  A column of an array with short rows is one piece, a column of one with long
rows a piece for each row.
"""

from __future__ import annotations

import numpy as np

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import ExitStack

    from numpy.typing import NDArray

    from userfault.region import Region

AHEAD = 64
"""Runs that are asked for before they are waited for: a store has 8 reads in flight unless it says otherwise."""


def block_runs(
    offset: int, shape: Sequence[int], strides: Sequence[int], itemsize: int, block_size: int
) -> list[tuple[int, int]]:
    """Return the runs `(first, stop)` of the blocks that the items of a view touch, in order; none twice.

    Args:
        offset: Of the item whose indices are all 0, in bytes from the first block on.
        shape: Items in each dimension.
        strides: Bytes from one item to the next, in each dimension; negative and 0 as well.
        itemsize: Bytes.
        block_size: Bytes.
    """
    if not itemsize or 0 in shape:
        return []
    lowest = offset + sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True) if stride < 0)
    steps = sorted((abs(stride), count) for count, stride in zip(shape, strides, strict=True) if stride and count > 1)
    length, outer = _piece(itemsize, steps, block_size)
    starts = np.array([lowest], np.int64)
    for stride, count in _merged(outer):
        starts = (starts[:, None] + np.arange(count, dtype=np.int64) * stride).ravel()
    starts.sort()
    return _joined(starts // block_size, (starts + (length - 1)) // block_size + 1)


def _piece(length: int, steps: list[tuple[int, int]], block_size: int) -> tuple[int, list[tuple[int, int]]]:
    """Return the bytes of a piece, and the steps between pieces that are left."""
    for number, (stride, count) in enumerate(steps):
        if stride - length >= block_size:
            return length, steps[number:]
        length += (count - 1) * stride
    return length, []


def _merged(steps: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Make one step of two that have common multiples without a gap: rows of rows, or windows that overlap."""
    merged: list[tuple[int, int]] = []
    for stride, count in steps:
        smaller, fewer = merged[-1] if merged else (0, 0)
        if smaller and not stride % smaller and stride // smaller <= fewer:
            merged[-1] = smaller, fewer + stride // smaller * (count - 1)
        else:
            merged.append((stride, count))
    return merged


def _joined(firsts: NDArray[np.int64], stops: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Join runs that meet or overlap; both arrays are sorted."""
    breaks = np.flatnonzero(firsts[1:] > stops[:-1])
    return list(
        zip(
            firsts[np.concatenate(([0], breaks + 1))].tolist(),
            stops[np.concatenate((breaks, [-1]))].tolist(),
            strict=True,
        )
    )


def pin(pins: ExitStack, region: Region, runs: list[tuple[int, int]], write: bool) -> None:
    """Pin runs of blocks until `pins` is left: all of them, or an exception.

    Raises:
        StoreError, ValueError, PagerLostError, RegionClosedError: as `Region.pinned`.
    """
    size = region.block_size
    blocks = sum(stop - first for first, stop in runs)
    if region.budget is not None and blocks > region.budget // size:  # before anything is read in vain
        raise ValueError(
            f"this part lies in {blocks} blocks of {size} bytes, more than the budget of {region.budget} bytes holds "
            "at once; ask for less, or open the array with a larger budget="
        )
    ranges = [(first * size, min(stop * size, region.size) - first * size) for first, stop in runs]
    for begin in ranges[1:AHEAD]:
        region.prefetch(*begin)
    for number, (offset, length) in enumerate(ranges):
        for begin in ranges[number + AHEAD : number + AHEAD + 1]:
            region.prefetch(*begin)
        pins.enter_context(region.pinned(offset, length, write))
