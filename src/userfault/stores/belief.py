"""How long to believe that a chunk of a file is in the page cache.

Asking the kernel takes as long as a third of a small fault, so an answer must serve for many. But the kernel
may take a page away at any time: in a cgroup that is full, half of what was there is gone after 10 ms; on an
idle machine it stays for days. A fixed time would be wrong on both. So **a chunk is believed for as long
again as it has been seen to last**, from 5 ms to 1 s; and the first chunk that disappoints takes everybody's
credit away.

Examining a chunk costs up to ten times as much as examining one block, so a chunk is examined only at the
fourth touch, or at once for a block that is large itself: that is never more than twice what the better of
the two would have cost.

A belief that is wrong costs one wait for the disk in the fault loop. It never costs a wrong byte.

Pure bookkeeping: the clock is handed in. One thread at a time; a race would only make a belief wrong.
"""

from __future__ import annotations

__all__ = ["CHUNK", "CHUNK_SHIFT", "FIRST_S", "LONGEST_S", "Belief"]

CHUNK_SHIFT = 21
CHUNK = 1 << CHUNK_SHIFT
"""2 MiB: the largest block, so that a block lies in one chunk. One answer serves 32 usual faults."""

FIRST_S = 0.005
"""Credit of a chunk seen for the first time: time enough to go through it once, in blocks of one page."""
LONGEST_S = 1.0

_TOUCHES = 4
_LARGE = CHUNK // 8
_MOST = 1 << 14
"""Chunks to keep account of (32 GiB); beyond, start afresh: a table for 1 TiB would take 100 MB."""


class Belief:
    """Which chunks are in the page cache, since when, and until when that is taken for granted."""

    __slots__ = ("_since", "_touches", "_until")

    def __init__(self) -> None:
        self._touches: dict[int, int] = {}
        self._since: dict[int, float] = {}
        self._until: dict[int, float] = {}

    def until(self, chunk: int) -> float:
        """Return the time up to which the chunk is believed; 0 when it is not."""
        return self._until.get(chunk, 0.0)

    def is_due(self, chunk: int, length: int) -> bool:
        """Tell whether a chunk that is not believed, but touched, is worth examining."""
        if chunk in self._since or length >= _LARGE:
            return True
        touches = self._touches.pop(chunk, 0) + 1
        if touches >= _TOUCHES:
            return True
        if len(self._touches) >= _MOST:
            self._touches.clear()
        self._touches[chunk] = touches
        return False

    def learn(self, chunk: int, now: float, *, hot: bool) -> None:
        """Take note of what an examination found."""
        if not hot:
            if chunk in self._since:
                self.clear()
            return
        if len(self._since) >= _MOST:
            self.clear()
        lasted = now - self._since.setdefault(chunk, now)
        self._until[chunk] = now + min(max(lasted, FIRST_S), LONGEST_S)

    def clear(self) -> None:
        """Believe nothing any more."""
        self._touches.clear()
        self._since.clear()
        self._until.clear()
