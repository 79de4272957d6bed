"""How long to believe that a chunk of a file is in the page cache.

Asking the kernel takes as long as half a small fault, so an answer must serve for many. But the kernel may
take a page away at any time: in a cgroup that is full, half of what was there is gone after 10 ms; on an idle
machine it stays for days. A fixed time would be wrong on both. So **a chunk is believed for as long again as
it has been seen to last**, from 5 ms up to a ceiling of 1 s, which comes down by a factor of four with each
disappointment, and goes up by two with each belief confirmed: one page lost costs little, real pressure ends
all belief quickly.

Examining a chunk costs up to ten times as much as examining one block, so a chunk is examined only at the
fourth touch, or at once for a block that is large itself: never much more than twice what the better of the
two would have cost. And while blocks are found cold, which means that the kernel is reading, no new belief
begins: pages on their way from the disk look like cached ones.

A belief that is wrong costs one wait for the disk in the fault loop; never a wrong byte.

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
_UNSEEN = (0.0, -FIRST_S)


class Belief:
    """Which chunks are in the page cache, since when, and until when that is taken for granted."""

    __slots__ = ("_ceiling", "_doubt_until", "_seen", "_touches")

    def __init__(self) -> None:
        self._touches: dict[int, int] = {}
        self._seen: dict[int, tuple[float, float]] = {}  # when first, and when last, found hot
        self._ceiling = LONGEST_S
        self._doubt_until = 0.0

    def until(self, chunk: int) -> float:
        """Return the time up to which the chunk is believed; not after 0 when it is not."""
        first, last = self._seen.get(chunk, _UNSEEN)
        return last + min(max(last - first, FIRST_S), self._ceiling)

    def has_seen(self, chunk: int) -> bool:
        """Tell whether the chunk was hot when it was last examined."""
        return chunk in self._seen

    def is_due(self, chunk: int, length: int, now: float) -> bool:
        """Tell whether a chunk that is not believed, but touched, is worth examining."""
        if chunk in self._seen:
            return True
        if now < self._doubt_until:
            return False
        touches = self._touches.pop(chunk, 0) + 1
        if touches >= _TOUCHES or length >= _LARGE:
            return True
        if len(self._touches) >= _MOST:
            self._touches.clear()
        self._touches[chunk] = touches
        return False

    def doubt(self, now: float) -> None:
        """Take note that a block was found cold: let no new belief begin for a while."""
        self._doubt_until = now + FIRST_S

    def learn(self, chunk: int, now: float, *, hot: bool) -> None:
        """Take note of what an examination of a whole chunk found."""
        seen = self._seen.pop(chunk, None)
        if not hot:
            if seen:
                self._ceiling = max(self._ceiling / 4, FIRST_S)
            return
        if seen:
            self._ceiling = min(self._ceiling * 2, LONGEST_S)
        elif len(self._seen) >= _MOST:
            self._seen.clear()
        self._seen[chunk] = (seen[0] if seen else now), now

    def clear(self) -> None:
        """Believe nothing any more."""
        self.__init__()  # type: ignore[misc]
