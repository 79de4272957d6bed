"""What a thread of the soak has done, whether it was right, and how long each thing took."""

from __future__ import annotations

import math
import time
import zlib
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tests.crash.programs.common import say

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.crash.programs.soak_patches import Patch

LONG_S = 0.005
"""What takes longer is written down with its beginning and its end: it may have met a death."""
FINE = 8
"""Steps of the histogram in each octave."""


class Tally:
    """One thread's. `words` is memory that the test looks into, and `index` the word that counts its steps."""

    def __init__(self, name: str, words: memoryview, index: int) -> None:
        self.name = name
        self._words, self._index = words, index
        self.counts: Counter[str] = Counter()
        self.histogram: Counter[int] = Counter()
        self.long: list[tuple[float, float, str, str]] = []
        self.bytes = 0
        self.wrong: list[str] = []
        self._got = self._due = 0

    @contextmanager
    def timed(self, what: str, where: str = "") -> Iterator[None]:
        """Count a step, in the patch `where`, and how long it took."""
        begun = time.monotonic()
        yield
        ended = time.monotonic()
        self.counts[what] += 1
        self.histogram[math.ceil(math.log2(max(ended - begun, 1e-9)) * FINE)] += 1
        if ended - begun > LONG_S:
            self.long.append((begun, ended, what, where))
        self._words[self._index] += 1

    def check(self, patch: Patch, what: str, at: int, got: bytes, due: bytes | bytearray) -> None:
        """Compare what a thread has read with what it should have, byte by byte, and in the sum of all."""
        self.bytes += len(due)
        self._got, self._due = zlib.crc32(got, self._got), zlib.crc32(due, self._due)
        if got != due:
            first = next((i for i, pair in enumerate(zip(got, due, strict=False)) if pair[0] != pair[1]), len(got))
            block = (at + first) // patch.kind.block_size
            state = patch.region.residency()[block]
            self.complain(
                f"{patch.name}: {what} of {len(due)} bytes at {at}: {len(got)} came, wrong from {first} on, "
                f"{got.count(0)} are zero, block {block} is in state {state}"
            )

    def complain(self, complaint: str) -> None:
        """Say at once what is wrong: there may be no later."""
        say("WRONG", f"{self.name}:", complaint)
        self.wrong.append(complaint)

    def results(self) -> dict[str, Any]:
        """Return all of it as JSON can say it."""
        return {
            "name": self.name,
            "counts": self.counts,
            "histogram": self.histogram,
            "long": self.long,
            "bytes": self.bytes,
            "wrong": self.wrong,
            "checksums": [self._got, self._due],
        }
