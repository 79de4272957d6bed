"""Writing changed blocks back to the store of an `r+` region.

How a block is written
----------------------
Its state says FLUSHING first; then its pages are write-protected, so that nobody changes them unseen; then its bytes
are copied out of the memfd.  Up to here it is claimed (see `served`), and a thread that writes to it waits: what is
copied is one moment of the block.  Then the claim is released and the store takes the bytes, however long that lasts.
A thread that writes meanwhile faults, and takes the block back to DIRTY.  So at the end the state tells whether the
store has what the memory has: FLUSHING becomes CLEAN, and DIRTY stays.  A worker that dies on the way leaves FLUSHING,
of which its successor makes DIRTY, and nothing is lost.

Neighbours are written together, in the order of their offsets.

One after the other
-------------------
Two writes of one block that were under way at once could reach the store in the wrong order.  So a region does one job
at a time: a *flush* writes whatever is dirty at its beginning, and has the store make it durable; *cleaning* writes the
blocks that became dirty first, so that eviction finds clean ones.  Within a job several threads write, each block once.

Errors
------
A block that could not be written stays DIRTY and in memory; nothing is ever dropped because of an error.  What went
wrong is kept and raised by the next flush, as fsync(2) does.  A store that could not make its bytes durable may have
lost any of those that it took since it last could, so these are dirty again as far as they are still in memory.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections import deque
from threading import Condition

from userfault.blocks import ledger as book
from userfault.blocks.states import BlockState
from userfault.errors import StoreError
from userfault.kernel import abi, memfd
from userfault.pager import failure, placement
from userfault.pager.staging import Staging
from userfault.shield import begin

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from userfault.pager.served import Served

    Done = Callable[[bytes | None], None]

WRITING = object()
"""The claim of a write-back, while it protects and copies."""
CLEAN, DIRTY, FLUSHING = int(BlockState.CLEAN), int(BlockState.DIRTY), int(BlockState.FLUSHING)
RUN_BYTES = 4 << 20
"""Written at once, at most: beyond it a file takes no more bytes a second, and a buffer is needed for it."""
CLAIM_S = 0.0002
"""Between two tries to claim a block that somebody has for a moment."""
PATIENCE = 200
"""How often a refusal to protect pages is met by another try, 1 ms apart."""
GONE = (0, errno.ENOENT, errno.ESRCH)
"""Done; or nobody is there any more who could write."""
NOT_TAKEN, NOT_DURABLE = "the store could not be written to", "the store could not make its bytes durable"
MOST_DEATHS = 3
"""Workers that may end in a store's `write` before the flush fails; the next one tries again."""
HIGH, LOW = 2, 4
"""Cleaning begins when one in HIGH of the blocks that the budget holds is dirty, and goes on until one in LOW is."""


class WriteBack:
    """What is dirty in a region, and the thread that writes it back. Any thread of the worker may call it."""

    def __init__(self, region: Served) -> None:
        self.region = region
        self.dirty: dict[int, None] = {}
        """Blocks that are DIRTY or FLUSHING, those first that became so first."""
        self.aside: set[int] = set()
        """Those of them that eviction has met and taken out of its order."""
        self._high = max(1, region.limit // HIGH)
        self._low = region.limit // LOW
        self._unsafe: set[int] = set()
        """Blocks that the store has taken and not yet made durable."""
        self._kept: bytes | None = None
        """The first error that nobody has been told of."""
        self._flushes: deque[tuple[Done | None, bool]] = deque()
        self._giving: dict[object, int] = {}
        """By thread: since when (ns) it is in the store's `write`."""
        self._deaths: int = region.ledger.words[book.W_WRITE_DEATHS]
        self._interval = region.ledger.words[book.W_SYNC] * 1000
        self._synced = time.perf_counter_ns()
        self._wanted = 0
        """Blocks that somebody waits for to be clean."""
        self._rounds = 0
        """Jobs that have ended."""
        self._failed = False
        """Whether the last one did."""
        self._changed = Condition()
        self._working = False

    # -- for other threads -----------------------------------------------------------------------------------

    def became_dirty(self, block: int) -> None:
        """Take note of a first write. The caller has claimed the block."""
        self.dirty[block] = None
        if len(self.dirty) >= self._high:
            with self._changed:
                self._stir()

    def flush(self, done: Done | None, *, durable: bool = True) -> None:
        """Write back what is dirty now, make it durable, then call `done` with what nobody was told before, or None.

        Without `durable` the store takes it and no more; then, and without `done`, an error is kept for the next one.
        """
        with self._changed:
            self._flushes.append((done, durable))
            self._stir()

    def make_room(self) -> bool:
        """Wait until something has been written back; False if it could not be. For readers, never the fault loop."""
        with self._changed:
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
        limit = self.region.source.retries.timeout_ns
        if limit and any(now - since > limit for since in list(self._giving.values())):
            failure.report(
                f"{self.region.source.name}: a write did not return in {limit / 1e9:g} s; the worker is replaced"
            )
            os._exit(1)
        if self._interval and now - self._synced >= self._interval:
            self._synced = now
            if self.dirty or self._unsafe:
                self.flush(None)

    def forget(self, block: int) -> None:
        """A block is being dropped: it is no longer known whether what the store took of it is durable."""
        self._unsafe.discard(block)

    # -- its thread ------------------------------------------------------------------------------------------

    def _stir(self) -> None:
        """Under the lock: see that somebody works."""
        if self._working or self.region.closing:
            return
        try:
            begin(self._work)
            self._working = True
        except RuntimeError:  # no thread to be had; who waits is told, the others will try again
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
            if self.dirty and (self._wanted or len(self.dirty) >= self._high) and not self.region.closing:
                return self._clean
            self._working = False
            self._changed.notify_all()
            return None

    def _flush(self, done: Done | None, durable: bool) -> None:
        error = self._write(list(self.dirty))
        if error is None and durable:
            error = self._make_durable()
        self._end_round(error)
        if done is None:
            return
        told = None
        if durable:
            told, self._kept = self._kept, None
        done(told)

    def _clean(self) -> None:
        """Write the oldest back. If that fails it is not tried at once again: `_high` rises above what is dirty."""
        oldest = list(self.dirty)
        error = self._write(oldest[: max(len(oldest) - self._low, self._wanted)])
        self._high = len(self.dirty) * 2 if error is not None else max(1, self.region.limit // HIGH)
        self._end_round(error)

    def _end_round(self, error: StoreError | None) -> None:
        if error is not None:
            self._kept = self._kept or failure.encode(error)
            self.region.tell_write_error(error)
        with self._changed:
            self._failed = error is not None
            self._rounds += 1
            self._changed.notify_all()

    # -- writing ---------------------------------------------------------------------------------------------

    def _write(self, blocks: Iterable[int]) -> StoreError | None:
        """Write blocks back as far as they are dirty; return the first error."""
        runs = deque(self._runs(sorted(blocks)))
        errors: list[StoreError] = []
        helpers = min(max(1, self.region.source.store.concurrency), len(runs)) - 1
        latch = Condition()
        helping = 0

        def help_out() -> None:
            nonlocal helping
            self._write_runs(runs, errors)
            with latch:
                helping -= 1
                latch.notify()

        for _ in range(helpers):
            with latch:
                helping += 1
            try:
                begin(help_out)
            except RuntimeError:
                helping -= 1
                break
        self._write_runs(runs, errors)
        with latch:
            while helping:
                latch.wait()
        return errors[0] if errors else None

    def _runs(self, blocks: list[int]) -> Iterator[tuple[int, int]]:
        most = max(1, RUN_BYTES >> self.region.shift)
        first = stop = -1
        for block in blocks:
            if block != stop or stop - first == most:
                if stop > first:
                    yield first, stop
                first = block
            stop = block + 1
        if stop > first:
            yield first, stop

    def _write_runs(self, runs: deque[tuple[int, int]], errors: list[StoreError]) -> None:
        try:
            staging = Staging(max(RUN_BYTES, self.region.block_size))
        except (OSError, MemoryError):
            errors.append(StoreError("the pager has no memory for a buffer", store=self.region.source.name))
            return
        while runs and not errors:
            try:
                first, stop = runs.popleft()
            except IndexError:  # another thread was quicker
                return
            if error := self._write_run(first, stop, staging):
                errors.append(error)

    def _write_run(self, first: int, stop: int, staging: Staging) -> StoreError | None:
        region = self.region
        while first < stop:
            end = self._take(first, stop)
            if end > first:
                extents = self._copy_out(first, end, staging)
                error = None if extents is None else self._give(first, extents, staging)
                for block in range(first, end):
                    self._settle(block, written=extents is not None and error is None)
                if error:
                    return error
                first = end
            elif region.states[first] == DIRTY and not region.closing:  # somebody has it, for a moment
                time.sleep(CLAIM_S)
            else:
                first += 1
        return None

    def _take(self, first: int, stop: int) -> int:
        """Claim dirty blocks from `first` on, as many as follow each other; return where they end."""
        region, claims = self.region, self.region.claims
        for block in range(first, stop):
            if claims.setdefault(block, WRITING) is not WRITING:
                return block
            if region.states[block] != DIRTY or region.closing:
                region.release(block)
                return block
        return stop

    def _copy_out(self, first: int, stop: int, staging: Staging) -> list[tuple[int, int]] | None:
        """Protect claimed blocks, copy what is there of them into `staging`, and release them.

        Returns:
            Ranges of the memory that were copied; None if the pages could not be protected.
        """
        region = self.region
        start, end = region.byte_range(first, stop)
        region.states[first:stop] = bytes((FLUSHING,)) * (stop - first)
        extents = None
        if self._protect(start, end - start):
            extents = list(memfd.data_extents(region.fd, start, end))  # what the user has dropped is not written
            for at, until in extents:
                _read_all(region.fd, staging.view[at - start : until - start], at)
        for block in range(first, stop):
            region.release(block)
        return extents

    def _protect(self, start: int, length: int) -> bool:
        region = self.region
        for _ in range(PATIENCE):
            error = region.uffd.write_protect(region.base + start, length, abi.UFFDIO_WRITEPROTECT_MODE_WP)
            if error in GONE:
                return True
            time.sleep(0.001)
        return False

    def _give(self, first: int, extents: list[tuple[int, int]], staging: Staging) -> StoreError | None:
        """Have the store take what was copied."""
        region = self.region
        base, size = region.byte_range(first, first + 1)[0], region.geometry.size
        for start, end in extents:
            if error := self._give_range(start, staging.view[start - base : min(end, size) - base]):
                return error
        return None

    def _give_range(self, start: int, data: memoryview) -> StoreError | None:
        region, failed = self.region, 0
        while (error := self._ask(start, data)) is not None:
            failed += 1
            said = failure.describe(error, region.source.name, start, len(data), failed, NOT_TAKEN)
            if not region.source.retries.allow(failed, said):
                return said
            region.counters.add(book.RETRIES)
            time.sleep(region.source.retries.pause(failed))
        region.counters.add(book.BYTES_WRITTEN, len(data))
        region.on_settled()
        return None

    def _ask(self, start: int, data: memoryview) -> BaseException | None:
        """Make one attempt, known to whoever watches the clock, and to the successor of a worker that dies of it."""
        source, words, me = self.region.source, self.region.ledger.words, object()
        if not source.foreign:
            return source.write(start, data)
        if self._deaths >= MOST_DEATHS:
            cause = f"{self._deaths} workers have ended in it, or waited for it longer than the timeout"
            self._deaths = words[book.W_WRITE_DEATHS] = 0
            return StoreError("its write does not return", cause=cause, permanent=True)
        words[book.W_WRITE_DEATHS] = self._deaths + 1
        self._giving[me] = time.perf_counter_ns()
        error = source.write(start, data)
        del self._giving[me]
        self._deaths = words[book.W_WRITE_DEATHS] = 0
        return error

    def _settle(self, block: int, *, written: bool) -> None:
        """End the write of one block: it is clean if it was written and nobody has written to it meanwhile.

        A pinned block stays dirty: a device that holds its pages may write to them, and no protection would show it.
        """
        region = self.region
        while region.claims.setdefault(block, WRITING) is not WRITING:
            time.sleep(CLAIM_S)
        if region.states[block] == FLUSHING:
            if written and not region.pins[block]:
                self._unsafe.add(block)
                self.dirty.pop(block, None)
                region.states[block] = CLEAN
            else:
                region.states[block] = DIRTY
        back = region.states[block] == CLEAN and block in self.aside
        region.release(block)
        if back:
            self.aside.discard(block)
            region.order.append(block)

    def _make_durable(self) -> StoreError | None:
        region = self.region
        pending, self._unsafe = self._unsafe, set()
        error = region.source.flush()
        if error is None:
            return None
        for block in pending:
            self._make_dirty(block)
        return failure.describe(error, region.source.name, 0, 0, 1, NOT_DURABLE)

    def _make_dirty(self, block: int) -> None:
        region = self.region
        while region.claims.setdefault(block, WRITING) is not WRITING:
            time.sleep(CLAIM_S)
        if region.states[block] == CLEAN:
            region.states[block] = DIRTY
            self.dirty[block] = None
        region.release(block)


def _read_all(fd: int, view: memoryview, offset: int) -> None:
    while len(view):
        done = os.preadv(fd, [view], offset)
        view, offset = view[done:], offset + done
