"""When the changed blocks of an `r+` region are written back to its store (`writer` has the how).

One after the other
-------------------
Two writes of one block that were under way at once could reach the store in the wrong order.  So a region does one job
at a time: a *flush* writes whatever is dirty at its beginning, and has the store make it durable; *cleaning* writes the
blocks that became dirty first, so that eviction finds clean ones.  Within a job several threads write, each block once.

While there are jobs the region has a claim of ours, JOB, for which its end waits: what is read from a memfd that is
being emptied or closed would be zeros, or the bytes of another region, and a write that reaches the store after
`close()` has returned would undo what somebody else has written there since.

Errors
------
A block that could not be written stays DIRTY and in memory; nothing is ever dropped because of an error.  What went
wrong is kept and raised by the next flush, as fsync(2) does.  A store that could not make its bytes durable may have
lost any of those that it took since it last could, so these are dirty again as far as they are still in memory.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from threading import Condition

from userfault.blocks import ledger as book
from userfault.errors import StoreError
from userfault.pager import evict, failure, placement
from userfault.pager.writer import Writer
from userfault.shield import begin

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from userfault.pager.served import Served

    Done = Callable[[bytes | None], None]

HIGH, LOW = 2, 4
"""Cleaning begins when one in HIGH of the blocks that the budget holds is dirty, and goes on until one in LOW is."""

JOB = -1
"""Claimed, though it is no block, from the first job to the last."""


class WriteBack:
    """What is dirty in a region, and the thread that writes it back. Any thread of the worker may call it."""

    def __init__(self, region: Served) -> None:
        self.region = region
        self._writer = writer = Writer(region)
        self.dirty = writer.dirty
        self._pause = 0
        """How many blocks must be dirty before cleaning is tried again, after it has failed."""
        self._kept: bytes | None = None
        """The first error that nobody has been told of."""
        self._flushes: deque[tuple[Done | None, bool]] = deque()
        self._interval = region.ledger.words[book.W_SYNC] * 1000
        self._synced = time.perf_counter_ns()
        self._wanted = 0
        """Blocks that somebody waits for to be clean."""
        self._asked = False
        """Whether some have to be clean soon, though nobody waits."""
        self._rounds = 0
        """Jobs that have ended."""
        self._failed = False
        """Whether the last one could write nothing, or not all."""
        self._changed = Condition()
        self._working = False

    # -- for other threads -----------------------------------------------------------------------------------

    def became_dirty(self, block: int) -> None:
        """Take note of a first write. The caller has claimed the block."""
        self.dirty[block] = None
        if self._too_many():
            with self._changed:
                self._stir()

    def _too_many(self) -> bool:
        return len(self.dirty) >= max(1, self._pause, self.region.room.ceiling() // HIGH)

    def flush(self, done: Done | None, *, durable: bool = True) -> None:
        """Write back what is dirty now, make it durable, then call `done` with what nobody was told before, or None.

        Without `durable` the store takes it and no more; then, and without `done`, an error is kept for the next one.
        """
        with self._changed:
            self._flushes.append((done, durable))
            self._stir()

    def clean(self) -> None:
        """Begin to write some back, for there are too many blocks in memory. Never waits for long."""
        with self._changed:
            self._asked = not self._failed or self._too_many()
            self._stir()

    def make_room(self) -> bool:
        """Wait until something has been written back; False if it could not be. For readers, never the fault loop."""
        with self._changed:
            if not self.dirty:
                return True
            before = self._rounds
            self._wanted += 1
            self._stir()
            while self._rounds == before and self._working:
                self._changed.wait()
            self._wanted -= 1
            return self._rounds != before and not self._failed

    def tick(self, now: int) -> None:
        """Flush in the background if it is time (`Region(sync_interval=)`). Called twice a second.

        A write that takes too long cannot be abandoned as a read can: it might still arrive, over what was written
        after it. So the worker ends, and the write with it.
        """
        if self._writer.is_late(now):
            failure.report(f"{self.region.source.name}: a write does not return; the worker is replaced")
            os._exit(1)
        if self._interval and now - self._synced >= self._interval:
            self._synced = now
            if self.dirty or self._writer.unsafe:
                self.flush(None)

    def forget(self, block: int) -> None:
        """A block is being dropped: it is no longer known whether what the store took of it is durable."""
        self._writer.unsafe.discard(block)

    # -- its thread ------------------------------------------------------------------------------------------

    def _stir(self) -> None:
        """Under the lock: see that somebody works."""
        if self._working:
            return
        self.region.claims[JOB] = evict.Eviction()  # which is among those that `Served.close` waits for
        if self.region.closing:
            del self.region.claims[JOB]
            return
        try:
            begin(self._work)
            self._working = True
        except RuntimeError:  # no thread to be had; who waits is told, the others will try again
            del self.region.claims[JOB]
            error = failure.encode(StoreError("the pager has no thread to write with", store=self.region.source.name))
            while self._flushes:
                if (done := self._flushes.popleft()[0]) is not None:
                    done(error)

    def _work(self) -> None:
        placement.go_home()
        try:
            while (job := self._next()) is not None:
                job()
        except BaseException as error:  # noqa: BLE001  # its blocks would be claimed for ever: let a successor recover
            sys.excepthook(type(error), error, error.__traceback__)
            os._exit(1)

    def _next(self) -> Callable[[], None] | None:
        with self._changed:
            if self._flushes:
                done, durable = self._flushes.popleft()
                return lambda: self._flush(done, durable)
            if self.dirty and (self._wanted or self._asked or self._too_many()) and not self.region.closing:
                return self._clean
            self._working = False
            del self.region.claims[JOB]
            self._changed.notify_all()
            return None

    def _flush(self, done: Done | None, durable: bool) -> None:
        error = self._writer.write(list(self.dirty))
        if error is None and durable and not self.region.closing:
            error = self._writer.make_durable()
        self._end_round(error)
        if done is None:
            return
        told = None
        if durable:
            told, self._kept = self._kept, None
        done(told)

    def _clean(self) -> None:
        """Write some back: those that are to be dropped, then the oldest. After an error it is not tried at once again.

        Pinned blocks would stay dirty: they are left alone, and do not count.
        """
        self._asked = False
        dirty = list(self.dirty)
        free = dict.fromkeys(block for block in dirty if not self.region.pins[block])
        first = [block for block in list(self.region.residents.aside) if block in free]
        count = max(len(free) - self.region.room.ceiling() // LOW, self._wanted, len(first))
        chosen = list(dict.fromkeys([*first, *free]))[:count]
        error = self._writer.write(chosen)
        high = self.region.room.ceiling() // HIGH + len(dirty) - len(free)
        self._pause = len(self.dirty) * 2 if error is not None else high
        self._end_round(error, idle=not chosen)
        if error is None:
            self.region.room.again()

    def _end_round(self, error: StoreError | None, *, idle: bool = False) -> None:
        if error is not None:
            self._kept = self._kept or failure.encode(error)
            self.region.tell_write_error(error)
        with self._changed:
            self._failed = idle or error is not None
            self._rounds += 1
            self._changed.notify_all()
