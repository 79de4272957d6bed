"""A map from ranges of addresses to values. Pure: it knows nothing of memory.

Neighbours with values that are alike are joined: whoever treats a large range page by page leaves no thousand pieces.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")


class RangeMap(Generic[T]):
    """Values for ranges `[start, end)` that do not overlap. Not for several threads at once.

    Args:
        alike: Whether neighbours with these values may be joined; the value of the lower one stays.
    """

    __slots__ = ("_alike", "_pieces", "_starts")

    def __init__(self, alike: Callable[[T, T], bool]) -> None:
        self._alike = alike
        self._starts: list[int] = []
        self._pieces: list[tuple[int, int, T]] = []

    def __iter__(self) -> Iterator[tuple[int, int, T]]:
        return iter(list(self._pieces))

    def __len__(self) -> int:
        return len(self._pieces)

    def pieces(self, start: int, end: int) -> list[tuple[int, int, T | None]]:
        """Cut a range where values change; parts without one have None. Together they are the range."""
        found: list[tuple[int, int, T | None]] = []
        at, places = start, self._places(start, end)
        for first, stop, value in self._pieces[slice(*places)]:
            if at < first:
                found.append((at, first, None))
            found.append((max(first, start), min(stop, end), value))
            at = min(stop, end)
        if at < end:
            found.append((at, end, None))
        return found

    def replace(self, start: int, end: int, value: T | None) -> None:
        """Give a range a value, or take away what it has (None)."""
        at, after = self._places(start, end)
        old = self._pieces[at:after]
        new = [(first, start, kept) for first, _, kept in old[:1] if first < start]
        if value is not None:
            new.append((start, end, value))
        new += [(end, stop, kept) for _, stop, kept in old[-1:] if stop > end]
        if at and self._pieces[at - 1][1] == start:
            at -= 1
            new.insert(0, self._pieces[at])
        if after < len(self._pieces) and self._pieces[after][0] == end:
            new.append(self._pieces[after])
            after += 1
        new = self._joined(new)
        self._pieces[at:after] = new
        self._starts[at:after] = [first for first, _, _ in new]

    def _joined(self, pieces: list[tuple[int, int, T]]) -> list[tuple[int, int, T]]:
        joined: list[tuple[int, int, T]] = []
        for first, stop, value in pieces:
            if joined and joined[-1][1] == first and self._alike(joined[-1][2], value):
                joined[-1] = (joined[-1][0], stop, joined[-1][2])
            else:
                joined.append((first, stop, value))
        return joined

    def _places(self, start: int, end: int) -> tuple[int, int]:
        """Return the places of the first piece that overlaps and of the one after the last; equal if none does."""
        at = bisect_right(self._starts, start)
        if at and self._pieces[at - 1][1] > start:
            at -= 1
        return at, bisect_left(self._starts, end, at)
