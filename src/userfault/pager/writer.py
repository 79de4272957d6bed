"""How changed blocks get into their store; which, and when, is `writeback`'s to say.

How a block is written
----------------------
Its state says FLUSHING first; then its pages are write-protected, so that nobody changes them unseen; then its bytes
are copied out of the memfd.  Up to here it is claimed (see `served`), and a thread that writes to it waits: what is
copied is one moment of the block.  Then the claim is released and the store takes the bytes, however long that lasts.
A thread that writes meanwhile faults, and takes the block back to DIRTY.  So at the end the state tells whether the
store has what the memory has: FLUSHING becomes CLEAN, and DIRTY stays.  A worker that dies on the way leaves FLUSHING,
of which its successor makes DIRTY, and nothing is lost.

Neighbours are written together, in the order of their offsets.
"""

from __future__ import annotations

import errno
import os
import time
from collections import deque
from threading import Condition

from userfault.blocks import ledger as book
from userfault.blocks.geometry import runs
from userfault.blocks.states import BlockState
from userfault.errors import StoreError
from userfault.kernel import abi, memfd
from userfault.pager import failure
from userfault.pager.staging import Staging
from userfault.shield import begin

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from userfault.pager.served import Served

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
LONG_NS, NS_A_BYTE = 300_000, 1
"""A write that takes longer waits for a device or a network, and others could be under way meanwhile.  More threads for
writes into the page cache cost more, in the interpreter's lock, than they bring: 208 instead of 135 µs a block."""
MOST_DEATHS = 3
"""Workers that may end in a store's `write` before the flush fails; the next one tries again."""


class _Job:
    """Runs of blocks, and the threads that write them."""

    def __init__(self, runs: Iterable[tuple[int, int]]) -> None:
        self.runs = deque(runs)
        self.errors: list[StoreError] = []
        self.helping = 0
        self._changed = Condition()

    def next(self) -> tuple[int, int] | None:
        """Take a run, if there is one and nothing has gone wrong."""
        try:
            return None if self.errors else self.runs.popleft()
        except IndexError:
            return None

    def call_help(self, work: Callable[[], None]) -> None:
        """Have another thread work on it too, if one is to be had."""

        def help_out() -> None:
            work()
            with self._changed:
                self.helping -= 1
                self._changed.notify()

        with self._changed:
            self.helping += 1
        try:
            begin(help_out)
        except RuntimeError:
            self.helping -= 1

    def await_helpers(self) -> None:
        """Wait until all that helped are done."""
        with self._changed:
            while self.helping:
                self._changed.wait()


class Writer:
    """Writes blocks of one region back. One thread calls it; it has others help."""

    def __init__(self, region: Served) -> None:
        self.region = region
        self.dirty: dict[int, None] = {}
        """Blocks that are DIRTY or FLUSHING, those first that became so first."""
        self.unsafe: set[int] = set()
        """Blocks that the store has taken and not yet made durable."""
        self._inherited = True
        """Whether the store may have taken clean blocks from a worker that is dead, and not made them durable."""
        self._giving: dict[object, int] = {}
        """By thread: since when (ns) it is in the store's `write`."""
        self._is_slow = False
        """Whether the store was waiting for something else than memory in its last write."""
        self._deaths: int = region.ledger.words[book.W_WRITE_DEATHS]

    def is_late(self, now: int) -> bool:
        """Whether a write has been at its store for longer than the region's timeout allows."""
        limit = self.region.source.retries.timeout_ns
        return bool(limit) and any(now - since > limit for since in list(self._giving.values()))

    def write(self, blocks: Iterable[int]) -> StoreError | None:
        """Write blocks back as far as they are dirty; return the first error."""
        job = _Job(runs(sorted(blocks), max(1, RUN_BYTES >> self.region.shift)))
        self._work(job, leads=True)
        job.await_helpers()
        return job.errors[0] if job.errors else None

    def _work(self, job: _Job, *, leads: bool = False) -> None:
        """Write runs until there are none. Who leads calls for help, one more after each write that took long."""
        try:
            staging = Staging(max(RUN_BYTES, self.region.block_size))
        except (OSError, MemoryError):
            job.errors.append(StoreError("the pager has no memory for a buffer", store=self.region.source.name))
            return
        most = min(self.region.source.store.concurrency, len(job.runs)) - 1
        while (run := job.next()) is not None:
            if error := self._write_run(*run, staging):
                job.errors.append(error)
            if leads and self._is_slow and job.helping < most:
                job.call_help(lambda: self._work(job))

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
        while not region.closing and (error := self._ask(start, data)) is not None:
            failed += 1
            said = failure.describe(error, region.source.name, start, len(data), failed, NOT_TAKEN)
            if not region.source.retries.allow(failed, said):
                return said
            region.counters.add(book.RETRIES)
            time.sleep(region.source.retries.pause(failed))
        region.on_settled()
        return None

    def _ask(self, start: int, data: memoryview) -> BaseException | None:
        """Make one attempt, and note whether it took longer than memory does."""
        since = time.perf_counter_ns()
        error = self._ask_carefully(start, data)
        took = time.perf_counter_ns() - since
        self._is_slow = took > LONG_NS + len(data) * NS_A_BYTE
        if error is None:
            self.region.counters.written(len(data), took)
        return error

    def _ask_carefully(self, start: int, data: memoryview) -> BaseException | None:
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
        if not self._claim(block):
            return
        if region.states[block] == FLUSHING:
            if written and not region.pins[block]:
                self.unsafe.add(block)
                self.dirty.pop(block, None)
                region.states[block] = CLEAN
            else:
                region.states[block] = DIRTY
        if region.states[block] == CLEAN and block in region.residents.aside:
            with region.residents.lock:
                region.residents.cleaned(block)
        region.release(block)

    def _claim(self, block: int) -> bool:
        """Wait for a block; False if the region ends, which shall not wait for whoever has the block."""
        while self.region.claims.setdefault(block, WRITING) is not WRITING:
            if self.region.closing:
                return False
            time.sleep(CLAIM_S)
        return True

    def make_durable(self) -> StoreError | None:
        """Have the store make durable what it has taken; what it could not is dirty again."""
        region = self.region
        pending = set(self.unsafe)
        self.unsafe -= pending
        error = region.source.flush()
        if error is None:
            self._inherited = False
            return None
        for block in pending.union(region.residents.blocks() if self._inherited else ()):
            self._make_dirty(block)
        return failure.describe(error, region.source.name, 0, 0, 1, NOT_DURABLE)

    def _make_dirty(self, block: int) -> None:
        region = self.region
        if not self._claim(block):
            return
        if region.states[block] == CLEAN:
            region.states[block] = DIRTY
            self.dirty[block] = None
        region.release(block)


def _read_all(fd: int, view: memoryview, offset: int) -> None:
    while len(view):
        done = os.preadv(fd, [view], offset)
        view, offset = view[done:], offset + done
