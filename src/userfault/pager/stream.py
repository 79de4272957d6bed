"""A touch that follows the last one brings in more than its own block, if that costs no waiting.

A COPY of 512 KiB takes 210 µs, and eight of 64 KiB 300, with a message, a wake and a way through Python each; where
blocks are dropped as well it is 250 and 480 (1 GiB in order, hot, two cores; 1 MiB at once gains nothing more).  So
when a fault is at the block behind those that came in last, the blocks after it come along: twice as many each time, as
long as that goes on, and only what lies hot in the store, is absent, and fits below the high watermark.  Nothing is
dropped for them.

It is the fault loop's own, and used by it alone.
"""

from __future__ import annotations

from userfault.blocks import ledger as book
from userfault.blocks.states import BlockState
from userfault.kernel import memfd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from userfault.pager.served import Served

MOST = 1 << 19
"""Bytes in one COPY; beyond it nothing is gained."""
PIECE = 2 << 20
"""A store's `locate` is asked about ranges within one such piece."""
SHARE = 8
"""No more than this part of what memory may hold comes in at once."""
ABSENT, FILLING, CLEAN = int(BlockState.ABSENT), int(BlockState.FILLING), int(BlockState.CLEAN)


class Stream:
    """What the fault loop remembers of a region."""

    __slots__ = ("_end", "_most", "_window", "next", "region")

    def __init__(self, region: Served) -> None:
        self.region = region
        self.next = -1
        """The block behind the one that came in last."""
        self._end = -1
        self._window = 1
        self._most = 1 if region.source.foreign else max(1, MOST >> region.shift)

    def fill(self, block: int, token: object) -> int:
        """Bring in a block that the caller has claimed with `token`, and some that follow it.

        Returns:
            How many came in; the claims of those are released. 0: none, and the block is as it was.
        """
        self._window = min(2 * self._window, self._most) if block == self._end else 2
        stop = self._claim(block, self._limit(block), token)
        if stop - block < 2:
            return 0
        count = self._copy(block, stop)
        self.next = self._end = block + count
        return count

    def _limit(self, block: int) -> int:
        region = self.region
        room = min(region.room.high - len(region.residents), region.room.limit // SHARE)
        piece = (((block << region.shift) // PIECE + 1) * PIECE) >> region.shift
        return min(block + min(self._window, self._most, room), piece, region.whole_blocks)

    def _claim(self, block: int, limit: int, token: object) -> int:
        """Claim the blocks from the next one on, as far as they are absent; return where they end."""
        states, claims = self.region.states, self.region.claims
        for other in range(block + 1, limit):
            if states[other] != ABSENT or claims.setdefault(other, token) is not token:
                return other
            if states[other] != ABSENT:  # it changed hands meanwhile
                self.region.release(other)
                return other
        return max(limit, block + 1)

    def _copy(self, block: int, stop: int) -> int:
        region, states = self.region, self.region.states
        offset, length = block << region.shift, (stop - block) << region.shift
        source = region.source.locate(offset, length)
        middle = block
        if source and region.room.enter(block, stop):  # before they are there, as in the fault loop
            states[block:stop] = bytes((FILLING,)) * (stop - block)
            done, _ = region.uffd.copy(region.base + offset, source, length, region.copy_mode)
            middle += done >> region.shift
            if done & (region.block_size - 1) and middle != block:  # it would never be dropped under the name of ABSENT
                memfd.punch_hole(region.fd, *region.extent(middle))
            for other in range(middle, stop):
                region.residents.withdraw(other)
        self._settle(block, middle, stop)
        return middle - block

    def _settle(self, block: int, middle: int, stop: int) -> None:
        """Up to `middle` they are there; the others are not, and `block` itself is the caller's then."""
        region, states = self.region, self.region.states
        for other in range(max(middle, block + 1), stop):
            states[other] = ABSENT
            region.release(other)
        for other in range(block, middle):
            states[other] = CLEAN
            region.release(other)
        if middle - block > 1:  # the first is counted with the fault
            region.counters.add(book.FILLED, middle - block - 1)
            region.counters.add(book.BYTES_READ, (middle - block - 1) << region.shift)
