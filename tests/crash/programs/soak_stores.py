"""Stores of the soak. They run in the worker, and are no better than the world."""

from __future__ import annotations

import random
import time

from userfault.testing import PatternStore


class MoodyStore(PatternStore):
    """Fails, gives too little or takes its time, at random; else the bytes of a `PatternStore`.

    Args:
        size: Bytes.
        seed: Of the pattern.
        failing: The share of reads that raise.
        short: The share of reads that fill one half, and say nothing.
        slow: The share of reads that take a few milliseconds more.
    """

    def __init__(
        self, size: int, seed: int = 0, *, failing: float = 0.0, short: float = 0.0, slow: float = 0.0
    ) -> None:
        super().__init__(size, seed)
        self.failing, self.short, self.slow = failing, short, slow

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if random.random() < self.slow:
            time.sleep(random.uniform(0.001, 0.01))
        mood = random.random()
        if mood < self.failing:
            raise OSError("not in the mood")
        if mood < self.failing + self.short:
            buffer = buffer[: len(buffer) // 2]
        super().read_into(offset, buffer)
