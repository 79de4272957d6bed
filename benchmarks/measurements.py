"""What a benchmark measures and concludes: rows of nanoseconds, and ratios between them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Row:
    """One line of the table: who answers the faults, from where, and what each repetition measured."""

    pager: str
    placement: str
    block: int
    order: str
    size: int
    measure: Callable[[], tuple[int, int]]
    nanoseconds: list[int] = field(default_factory=list)
    notes: dict[str, float | str] = field(default_factory=dict)

    @property
    def per_fault(self) -> list[float]:
        """Nanoseconds for each block, by repetition."""
        return [value / (self.size / self.block) for value in self.nanoseconds]

    @property
    def megabytes_per_s(self) -> float:
        """Median bandwidth, every byte of a block counted."""
        return self.size * 1000 / statistics.median(self.nanoseconds)


@dataclass(frozen=True)
class Check:
    """A ratio between two rows of one run, and the bound that it has to keep, if it has one."""

    name: str
    ratios: list[float]
    bound: float | None = None
    at_most: bool = True

    @property
    def ratio(self) -> float:
        """The median of the ratios of each repetition: both sides of one were measured within seconds."""
        return statistics.median(self.ratios)

    @property
    def kept(self) -> bool:
        """Whether the ratio is within its bound."""
        if self.bound is None:
            return True
        return self.ratio <= self.bound if self.at_most else self.ratio >= self.bound
