"""How many blocks of a region may be in memory, and seeing that it stays so.

Watermarks
----------
Between `high` and the limit a fault goes on at once, and the evictor is told, which drops blocks until there are no
more than `low`.  Only a region that is full makes a fault wait: then whoever has the block drops others first.  A
region whose limit is but a few blocks has no room for watermarks, and every fault drops a batch for those after it.

What cannot be dropped is written back first, and for that only threads of the pool may wait, never the fault loop.  If
it cannot be written, the block comes in all the same: rather more memory than was allowed than a byte that is lost, or
a thread that waits for ever.
"""

from __future__ import annotations

from threading import Lock

from userfault.blocks import ledger as book
from userfault.pager import evict
from userfault.pager.residents import FLOOR
from userfault.pager.shares import UNLIMITED, Shares

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from userfault.pager.served import Served
    from userfault.pager.writeback import WriteBack


def _nobody(room: Room) -> None:
    pass


BATCH = 1 << 18
"""Bytes taken at once from one that has more, if it has so much more: 64 pages, dropped together."""
LEAST_BLOCKS = 64
"""Of a limit that has watermarks."""
PART, MOST_RESERVE = 32, 32 << 20
"""What is kept free for faults: this part of the limit, but no more than so many bytes."""


class Room:
    """The memory that one region may have. Any thread of the worker may call it."""

    def __init__(self, region: Served) -> None:
        self.region = region
        self.shares = Shares()
        self.granted = 0
        """Bytes of the pager's budget that this region has been given."""
        self.limit = UNLIMITED
        """In blocks, as all that follow."""
        self.high = self.low = UNLIMITED
        self.on_high: Callable[[Room], None] = _nobody
        """Called when there are more than `high`. Must not wait."""
        self._own = UNLIMITED
        self._entry, self._sizing = Lock(), Lock()
        self._creditor: Room | None = None
        """A richer one that could not give what it has, since it is dirty."""
        self.update()

    def join(self, shares: Shares, on_high: Callable[[Room], None]) -> None:
        """Take part in a pager's budget, if the region is to."""
        self.on_high = on_high
        total = self.region.ledger.words[book.W_SHARED]
        if total == book.NO_BUDGET:
            self.leave()
            self.shares = Shares()
        else:
            shares.total = total
            if self.shares is not shares:
                self.shares = shares
                shares.give(self, len(self.region.residents) << self.region.shift)  # what it has already
        self.update()

    def leave(self) -> None:
        """Give everything back to the others."""
        self.shares.give(self, -self.granted)

    def ceiling(self) -> int:
        """Return how many blocks it may have, if it is granted all that is left of the pager's budget."""
        if not self._is_shared():
            return self._own
        left = max(0, self.shares.total - self.shares.granted)
        return min(self._own, self.limit + (left >> self.region.shift))

    def update(self) -> None:
        """Take note of a budget that has changed."""
        budget = self.region.ledger.words[book.W_BUDGET]
        self._own = UNLIMITED if budget == book.NO_BUDGET else max(1, budget >> self.region.shift)
        self._set_limit()

    def _set_limit(self) -> None:
        with self._sizing:  # or an older limit might be written over a newer one
            limit = self._own
            if self._is_shared():
                limit = min(limit, self.granted >> self.region.shift)
            reserve = 0
            if LEAST_BLOCKS <= limit < self.region.geometry.blocks:
                reserve = min(limit // PART, MOST_RESERVE >> self.region.shift)
            self.limit, self.high, self.low = limit, limit - reserve, limit - 2 * reserve
            self.region.residents.capacity = min(limit, self.region.geometry.blocks)
            self._set_mark(self.high)

    def _is_shared(self) -> bool:
        return self.shares.total != UNLIMITED

    def _set_mark(self, blocks: int) -> None:
        residents = self.region.residents
        if residents.lock.acquire(blocking=False):
            residents.mark = blocks - len(residents.kept)
            residents.lock.release()
        else:  # blocks are just changing hands: it may become less, but not more
            residents.mark = min(residents.mark, blocks - len(residents.kept))

    # -- for the fault loop, which never waits ---------------------------------------------------------------

    def admits(self) -> bool:
        """Whether one more block may come in now, if need be for another. Called when `Residents.mark` is reached."""
        if self.high < self.limit:
            self.on_high(self)
        if len(self.region.residents) < self.limit:
            self._set_mark(self.limit)
            return True
        blockers = self._blockers()  # now: changes may be written back just after nothing was found to drop
        made = self._make(wait=False, coming=1)
        return made or (made is not None and not blockers)

    def overflows(self) -> bool:
        """Whether there are too many blocks, now that another one counts.

        Asked by whoever has counted one in, afterwards: of two that saw the same room before, one sees the other.
        """
        return len(self.region.residents) > self.limit

    def enter(self, first: int, stop: int) -> bool:
        """Count blocks in that the caller has claimed, if there is room for them, and still is afterwards."""
        residents = self.region.residents
        if len(residents) + stop - first > self.limit:
            return False
        residents.arrived.extend(range(first, stop))
        if not self.overflows():
            return True
        for block in range(first, stop):
            residents.withdraw(block)
        return False

    def has(self) -> bool:
        """The same, for a block that has taken its time already."""
        return len(self.region.residents) < self.high or self.admits()

    # -- for threads that may wait ---------------------------------------------------------------------------

    def find(self, block: int) -> None:
        """Count a block in, when there is room for it, however long that takes. For threads that hold no hot claim."""
        arrived = self.region.residents.arrived
        while not self.region.closing:
            with self._entry:  # or several threads would find the same room
                if self.enter(block, block + 1):
                    return
            blockers = self._blockers()  # see `admits`
            if not self._make(wait=True, coming=1) and not any(writeback.make_room() for writeback in blockers):
                break
        arrived.append(block)

    def relieve(self) -> None:
        """Drop blocks, or get more memory, until there are no more than `low`. For the evictor."""
        residents = self.region.residents
        if len(residents) > self.high:
            while len(residents) > self.low and not self.region.closing:
                if not self._make(wait=True, target=self.low):
                    for writeback in self._blockers():
                        writeback.clean()
                    break
        self.remark()

    def again(self) -> None:
        """Blocks have been written back: they can be dropped, if there are too many."""
        if len(self.region.residents) > self.high:
            self.on_high(self)

    def remark(self) -> None:
        """Take note that blocks have been told to the policy, or dropped."""
        self._set_mark(self.high if len(self.region.residents) <= self.high else self.limit)

    def shrink(self, size: int, *, wait: bool) -> bool:
        """Give up some of what was granted, and drop what is then too much; False if that cannot be done now."""
        self.shares.give(self, -size)
        self._set_limit()
        while (excess := len(self.region.residents) - self.limit) > 0:
            if not evict.drop_victims(self.region, self.limit, most=excess, wait=wait):
                self.shares.give(self, size)
                self._set_limit()
                return False
        return True

    # -- steps -----------------------------------------------------------------------------------------------

    def make(self) -> None:
        """See to it that blocks are dropped if there are too many, without waiting for another thread."""
        if len(self.region.residents) > self.limit:
            self._make(wait=False)
        elif len(self.region.residents) > self.high:
            self.on_high(self)

    def pay(self) -> bool:
        """Give back a piece of the pager's budget; False if that cannot be done now."""
        return bool(self.granted) and self.shrink(min(self._piece(), self.granted), wait=True)

    def _make(self, *, wait: bool, coming: int = 0, target: int | None = None) -> bool | None:
        """Get more memory, or drop a batch of blocks, for as many as are `coming`; then perhaps `target` are left.

        Returns:
            False if nobody can, None if another thread is just at it.
        """
        if self._grow() or self._take_from_the_rich(wait=wait):
            return True
        batch = self._batch()
        excess = min(max(0, len(self.region.residents) - self.limit), 4 * batch)
        target = self.limit - batch if target is None else target
        dropped = evict.drop_victims(self.region, target, most=batch + excess, wait=wait, floor=FLOOR - coming)
        if dropped is None:
            return None
        self.remark()
        if not dropped:
            self.region.tell_full()
        return dropped

    def _batch(self) -> int:
        return max(1, min(evict.BATCH_PAGES // self.region.pages_per_block, self.limit // 4))

    def _piece(self) -> int:
        return self.shares.piece(FLOOR << self.region.shift)

    def _grow(self) -> bool:
        if self.limit >= self._own or not self.shares.grow(self, self._piece()):
            return False
        self._set_limit()
        return True

    def _take_from_the_rich(self, *, wait: bool) -> bool:
        if self.limit >= self._own or not self._is_shared():
            return False
        piece, rich = self._piece(), self.shares.richest()
        if rich is None or rich is self:
            return False
        poor, more = self.granted < piece, rich.granted - self.granted
        if not poor and more < 2 * piece:
            return False
        size = max(piece, min(BATCH, more // 4) >> self.region.shift << self.region.shift)
        if not rich.shrink(min(size, rich.granted), wait=wait):
            self._creditor = rich
            if not poor:
                return False
        self.shares.give(self, size)
        self._set_limit()
        return True

    def _blockers(self) -> list[WriteBack]:
        """Return those whose changes have to be written back before there is room."""
        regions = [self.region] if self._creditor is None else [self.region, self._creditor.region]
        return [r.writeback for r in regions if r.writeback and r.writeback.dirty and not r.closing]
