"""What long tests have measured, in lines that a reader takes in at once."""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

POINTS = (50, 90, 99, 99.9, 100)
Span = tuple[float, float]


def percentiles(values: Iterable[float], points: Sequence[float] = POINTS, digits: int = 0) -> str:
    """Return some percentiles, such as `50 %: 3, 100 %: 17`."""
    ordered = sorted(values) or [0.0]
    chosen = [ordered[min(int(len(ordered) * point / 100), len(ordered) - 1)] for point in points]
    return ", ".join(f"{point:g} %: {value:.{digits}f}" for point, value in zip(points, chosen, strict=True))


def of_histogram(counts: Mapping[float, int], points: Sequence[float] = POINTS, digits: int = 3) -> str:
    """Return the same of values that were only counted: `counts` says how many did not exceed a bound."""
    total, seen, left, said = sum(counts.values()), 0, list(points), []
    for bound, count in sorted(counts.items()):
        seen += count
        while left and seen >= total * left[0] / 100:
            said.append(f"{left.pop(0):g} %: {bound:.{digits}f}")
    return ", ".join(said)


def pauses(kills: Sequence[float], steps: Iterable[Span]) -> list[float]:
    """Return for each kill how long the steps lasted from then on that were under way: the longest of each.

    Args:
        kills: Moments, in order.
        steps: Beginning and end of each step that was long enough to have met a kill; others were not held up.
    """
    longest = [0.0] * len(kills)
    for begun, ended in steps:
        for kill in range(bisect.bisect_left(kills, begun), bisect.bisect_right(kills, ended)):
            longest[kill] = max(longest[kill], ended - kills[kill])
    return longest


def in_words(counts: Mapping[str, int]) -> str:
    """Return counts as one line, the largest first."""
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))
