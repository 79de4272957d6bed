"""A map from ranges of addresses to values. Pure: it knows nothing of memory."""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")


class RangeMap(Generic[T]):
    """Values for ranges `[start, end)` that do not overlap. Not for several threads at once."""

    __slots__ = ("_pieces", "_starts")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._pieces: list[tuple[int, int, T]] = []

    def __iter__(self) -> Iterator[tuple[int, int, T]]:
        return iter(list(self._pieces))

    def __len__(self) -> int:
        return len(self._pieces)

    def pieces(self, start: int, end: int) -> list[tuple[int, int, T | None]]:
        """Cut a range where values change; parts without one have None. Together they are the range."""
        found: list[tuple[int, int, T | None]] = []
        at = start
        for first, stop, value in self._overlapping(start, end):
            if at < first:
                found.append((at, first, None))
            found.append((max(first, start), min(stop, end), value))
            at = min(stop, end)
        if at < end:
            found.append((at, end, None))
        return found

    def replace(self, start: int, end: int, value: T | None) -> None:
        """Give a range a value, or take away what it has (None)."""
        old = self._overlapping(start, end)
        new = [(first, start, kept) for first, _, kept in old[:1] if first < start]
        if value is not None:
            new.append((start, end, value))
        new += [(end, stop, kept) for _, stop, kept in old[-1:] if stop > end]
        at = self._first(start, end)
        self._pieces[at : at + len(old)] = new
        self._starts[at : at + len(old)] = [first for first, _, _ in new]

    def _overlapping(self, start: int, end: int) -> list[tuple[int, int, T]]:
        at = self._first(start, end)
        stop = at
        while stop < len(self._pieces) and self._pieces[stop][0] < end:
            stop += 1
        return self._pieces[at:stop]

    def _first(self, start: int, end: int) -> int:
        """Return the place of the first piece that overlaps, or where it would stand."""
        at = max(bisect_right(self._starts, start) - 1, 0)
        while at < len(self._pieces) and self._pieces[at][1] <= start:
            at += 1
        return at
