"""Which blocks of a region are in memory, and in which order they go.

A block that comes in is appended to `arrived`, a deque, and that is all that a fault pays for it.  Everything else is
done by whoever makes room, under `lock`: newcomers are told to the eviction policy, refaults are counted, victims are
chosen.  So a policy, which may be a user's own, is never on the way of a fault.

The last `FLOOR` that came in are told to nobody and thus never dropped: one instruction may need several blocks at once
(a load across a boundary two, a copy between two such places four), and were one dropped for another, it would start
again for ever.

What the policy has given as a victim and cannot be dropped yet, since it is dirty, stands `aside`; once it is written
back it is dropped before any other.  So are blocks of a range that is used once, in its order (`advise`).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import OrderedDict, deque
from threading import Lock

from userfault.blocks import ledger as book
from userfault.blocks.policies import EvictionPolicy, FifoPolicy
from userfault.pager import failure, recipe
from userfault.pager.shares import UNLIMITED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from userfault.blocks.ledger import Ledger
    from userfault.pager.counters import Counters

FLOOR = 4
"""Blocks that one instruction may need at once."""
MOST_NS = 5_000_000_000
"""How long a policy may take for one batch."""
MOST_DEATHS = 2
"""Workers that may end in a policy of a user's own before it is replaced."""


class Residents:
    """The blocks of one region that are in memory. Methods are called under `lock`, unless they say otherwise."""

    def __init__(self, ledger: Ledger, counters: Counters) -> None:
        self.arrived: deque[int] = deque()
        """Blocks that came in and that the policy does not know yet, oldest first. Any thread appends, without lock."""
        self.kept: set[int] = set()
        """All others that are in memory."""
        self.private: set[int] = set()
        """Those of them that belong to the user for good."""
        self.aside: set[int] = set()
        """Those of them that go when they are written back."""
        self.mark = UNLIMITED
        """How many blocks may stand in `arrived` before a fault has to look whether there is room: `Room` says."""
        self.lock = Lock()
        self.came = self.came_back = 0
        """Blocks that the policy was told of, and those of them that had been in memory before."""
        self.touched: set[int] = set()
        """Blocks that a sample has found used, and that the policy has not asked about since."""
        self.fresh: set[int] | None = None
        """Blocks that came in since a sample began; None: none is under way."""
        self._first: OrderedDict[int, None] = OrderedDict()
        """Blocks that go before any that the policy would choose."""
        self._streams: list[tuple[int, int]] = []
        """Ranges of blocks that are used once, in their order."""
        self.capacity = self._told = 1
        """How many blocks may be in memory, and what the policy was told last."""
        self.since = 0
        """Since when (ns) a thread asks the policy (`held`); 0: none does."""
        self._words = ledger.words
        self._policy = FifoPolicy() if self._is_beyond_hope() else recipe.load_policy(ledger.recipe)
        self._foreign = not type(self._policy).__module__.startswith("userfault.")
        self._offered = 0
        """How many blocks the policy may choose from."""
        self._notes = ledger.notes
        self._counters = counters

    def __len__(self) -> int:
        """How many blocks are in memory. Any thread may ask."""
        return len(self.arrived) + len(self.kept)

    def blocks(self) -> set[int]:
        """Return all that are in memory. Without the lock."""
        return self.kept.union(self.arrived.copy())

    def withdraw(self, block: int) -> None:
        """Forget a block that did not come in after all. Without the lock; the caller has claimed it."""
        try:
            self.arrived.remove(block)
        except ValueError:
            with self.held():
                self.dropped(block)

    def settle(self, floor: int = FLOOR) -> None:
        """Tell the policy of newcomers, but for the last few."""
        if self._told != self.capacity:
            self._told = self.capacity
            self._ask(lambda policy: policy.resize(self._told))
        moving = max(0, len(self.arrived) - floor)
        self.mark -= moving  # first, or a fault could find the same room once more
        for _ in range(moving):
            block = self.arrived.popleft()
            self.came += 1
            if self.fresh is not None:
                self.fresh.add(block)
            self.touched.discard(block)
            if self._notes[block] & book.EVICTED:
                self.came_back += 1
                self._notes[block] &= ~book.EVICTED
                self._counters.add(book.REFAULTS)
            if block in self.kept:  # its pages were dropped by the user, and are back
                continue
            self.kept.add(block)
            if any(first <= block < stop for first, stop in self._streams):
                self._first[block] = None
            else:
                self.offer(block)

    def advise(self, first: int, stop: int, *, sequential: bool) -> None:
        """Take note that a range is used once, in its order; or not, or not any more."""
        parts = [(a, min(b, first)) for a, b in self._streams] + [(max(a, stop), b) for a, b in self._streams]
        self._streams = [(a, b) for a, b in parts if a < b]
        if sequential:
            self._streams.append((first, stop))

    def offer(self, block: int) -> None:
        """Let the policy choose a block again, or for the first time."""
        self._offered += 1
        self._ask(lambda policy: policy.admit(block))

    def candidates(self) -> int:
        """How many blocks `next` can give."""
        return len(self._first) + self._offered

    def next(self) -> tuple[int, bool]:
        """Take out the block that is to go next, and whether that was known before. There must be a candidate."""
        if self._first:
            return self._first.popitem(last=False)[0], True
        self._offered -= 1
        block = self._ask(lambda policy: policy.victim(self._used))
        while block not in self.kept or block in self.private or block in self.aside:  # a user's own policy
            self._replace(f"it names block {block!r}, which it does not have")
            block = self._ask(lambda policy: policy.victim(self._used))
        return int(block), False

    @property
    def asks(self) -> bool:
        """Whether the policy wants to know what is used."""
        return self._policy.asks

    def _used(self, block: int) -> bool:
        was = block in self.touched
        self.touched.discard(block)
        return was

    def dropped(self, block: int) -> None:
        """Forget a block that has gone."""
        known = block in self.kept
        self.gone(block)
        if block in self.aside or block in self.private:
            self.aside.discard(block)
            self.private.discard(block)
        elif block in self._first:
            del self._first[block]
        elif known:
            self._offered -= 1
            self._ask(lambda policy: policy.remove(block))

    def gone(self, block: int) -> None:
        """Forget a victim, as `next` has given it."""
        self.kept.discard(block)
        self.touched.discard(block)

    def cleaned(self, block: int) -> None:
        """A dirty block has been written back: it goes next, if it was to go."""
        if block in self.aside:
            self.aside.discard(block)
            self._first[block] = None

    def _is_beyond_hope(self) -> bool:
        return bool(self._words[book.W_POLICY_DEATHS] >= MOST_DEATHS)

    @contextlib.contextmanager
    def held(self, *, wait: bool = True) -> Iterator[bool]:
        """Hold the lock for what asks the policy, and be known to, should it hang, or this worker end in it.

        The value is False if another thread holds it, and this one is not to `wait`.
        """
        if not self.lock.acquire(wait):
            yield False
            return
        try:
            self.since = time.perf_counter_ns()
            if self._foreign:
                self._words[book.W_POLICY_DEATHS] += 1
            yield True
        finally:
            self.since = 0
            if self._foreign:
                self._words[book.W_POLICY_DEATHS] = 0
            self.lock.release()

    def watch(self, now: int) -> None:
        """End the worker if the policy does not answer: a successor does without it. Without the lock."""
        since = self.since
        if since and now - since > MOST_NS:
            self._words[book.W_POLICY_DEATHS] = MOST_DEATHS
            failure.report(f"the eviction policy {type(self._policy).__name__} does not answer; the worker is replaced")
            os._exit(1)

    def _ask(self, question: Callable[[EvictionPolicy], object]) -> object:
        try:
            return question(self._policy)
        except Exception as error:  # noqa: BLE001  # a user's own may raise anything
            self._replace(str(failure.plain(error).cause))
            return question(self._policy)

    def _replace(self, reason: str) -> None:
        failure.report(f"the eviction policy {type(self._policy).__name__} is replaced by fifo: {reason}")
        self._policy = FifoPolicy()
        self._words[book.W_POLICY_DEATHS] = MOST_DEATHS
        self._foreign = False
        for block in sorted(self.kept - self.private - self.aside - self._first.keys()):
            self._policy.admit(block)
