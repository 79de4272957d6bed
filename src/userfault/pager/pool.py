"""Reads that may wait: a few threads per region, so that a slow store delays nobody but its own readers.

A pool does two kinds of work.  A *demand* is a block that a thread of the application is stopped at; a *request* is a
range that `ensure`, `prefetch` or `retry` asked for.  Demands go first, whatever else is queued; then requests that
somebody waits for, in turns; then the others.  A request's next block is taken only when a thread is free for it, so
that a long prefetch never stands between a fault and its block.
Threads are started when there is work for them, up to the store's `concurrency`, and end when idle.

A read that fails is put aside until its pause is over, and no thread waits for that.  A read that takes longer than the
region's timeout is *abandoned*: whoever watches the clock takes the work out of `_reading` and settles it; the thread,
should the store ever let it go, finds its work gone, touches nothing, and ends.  One lock decides between the two.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import sys
import time
from _thread import start_new_thread
from collections import deque
from threading import Condition

from userfault.blocks.states import CHANGED
from userfault.errors import StoreError
from userfault.pager import failure, placement
from userfault.pager.staging import Staging

TYPE_CHECKING = False
if TYPE_CHECKING:
    from userfault.pager.requests import Request
    from userfault.pager.served import Served

IDLE_S = 5.0
"""After which a thread with nothing to do ends (Java's cached pools wait a minute; ours start in 0.1 ms)."""
MOST_ABANDONED = 32
"""Threads of one region that hang in its store, before further reads fail at once; as many again as it may have."""


MOST_LOOKS = 5
"""At half a second each: a thread that has not begun by then never will, for want of memory.  A successor may have it.

So threads are started with `_thread`: `threading.Thread.start` waits for the first step, under the pool's lock.
"""


class Work:
    """A block to bring in, for a thread that is stopped at it or for a request."""

    __slots__ = ("block", "failed", "request", "since", "write")

    def __init__(self, block: int, since: int = 0, request: Request | None = None, *, write: bool = False) -> None:
        self.block = block
        self.since = since
        """When it was asked for, in nanoseconds."""
        self.request = request
        self.write = write
        """Whether the thread is about to write to it."""
        self.failed = 0
        """Attempts that have failed."""


class Pool:
    """The readers of one region. Any thread of the worker may call it."""

    def __init__(self, region: Served) -> None:
        self.region = region
        self._most = max(1, region.source.store.concurrency)
        self._threads = 0
        self._busy = 0
        self._unborn = self._looks = 0
        """Threads that have been started and have not begun, and for how many looks that has been so."""
        self._abandoned = 0
        self._demands: deque[Work] = deque()
        self._requests: deque[Request] = deque()
        self._patient: deque[Request] = deque()
        self._later: list[tuple[int, int, Work]] = []
        """Reads that have failed, by the time at which they are tried again."""
        self._order = itertools.count()
        self._reading: dict[object, tuple[int, Work]] = {}
        """By thread: since when it has been in the store, and for what."""
        self._changed = Condition()
        self._closed = False

    # -- for other threads -----------------------------------------------------------------------------------

    def demand(self, block: int, since: int, *, write: bool = False) -> None:
        """Bring in a block that a thread waits for since `since` (ns); the caller has claimed it for this pool."""
        with self._changed:
            self._demands.append(Work(block, since, write=write))
            self._stir()

    def wants(self, request: Request) -> None:
        """Work on a request, or on it again."""
        with self._changed:
            queue = self._requests if request.urgent else self._patient
            if request not in queue:
                queue.append(request)
            self._stir()

    def watch(self, now: int) -> None:
        """Abandon reads that take too long, and see that queued work has a thread. Called twice a second."""
        limit = self.region.source.retries.timeout_ns
        with self._changed:
            late = [me for me, (since, _) in self._reading.items() if limit and now - since > limit]
            works = [self._reading.pop(me)[1] for me in late]
            self._abandoned += len(works)
            self._threads -= len(works)
            self._busy -= len(works)
            if self._has_work():
                self._stir()
            self._looks = self._looks + 1 if self._unborn else 0
            if self._looks > MOST_LOOKS:
                os._exit(1)
        for work in works:
            self.settle(work, StoreError("the read did not return in time", cause=f"timeout of {limit / 1e9:g} s"))

    def close(self) -> None:
        """End the threads as they become idle; nobody waits for a read that hangs."""
        with self._changed:
            self._closed = True
            self._later.clear()
            self._changed.notify_all()

    def settle(self, work: Work, error: BaseException | None) -> None:
        """End an attempt: the block is there, or is tried again later, or fails. The block's claim is ours."""
        region, block = self.region, work.block
        reason = None
        if error is None:
            region.arrived(block)
        else:
            work.failed += 1
            offset, length = region.geometry.span(block)
            said = failure.describe(error, region.source.name, offset, length, work.failed)
            if not region.closing and region.source.retries.allow(work.failed, said):
                region.tell_retry(said)
                self._put_aside(work)
                return
            reason = region.fail(block, said)
        region.release(block)
        if work.request is not None:
            work.request.brought(block, reason)
        else:
            region.counters.record(time.perf_counter_ns() - work.since)

    def _put_aside(self, work: Work) -> None:
        self.region.claims[work.block] = object()  # nobody's: the fault loop's own keeps a region from closing
        due = time.perf_counter_ns() + round(1e9 * self.region.source.retries.pause(work.failed))
        with self._changed:
            heapq.heappush(self._later, (due, next(self._order), work))
            self._stir()

    # -- its threads -----------------------------------------------------------------------------------------

    def _has_work(self) -> bool:
        return bool(self._demands or self._requests or self._patient or self._later)

    def _stir(self) -> None:
        """Under the lock: see that enough threads are awake for what is queued."""
        queued = len(self._demands) + bool(self._later) + (self._most if self._requests or self._patient else 0)
        if queued > self._threads - self._busy and self._threads < self._most:
            with contextlib.suppress(RuntimeError):  # no more threads: those there are will do, or the next stir
                start_new_thread(self._work, ())
                self._threads += 1
                self._unborn += 1
        self._changed.notify()

    def _work(self) -> None:
        with self._changed:
            self._unborn -= 1
        placement.go_home()
        try:
            self._work_on()
        except BaseException as error:  # noqa: BLE001  # its block would be claimed for ever: let a successor recover
            sys.excepthook(type(error), error, error.__traceback__)
            os._exit(1)

    def _work_on(self) -> None:
        staging = self._staging()
        while (work := self._next()) is not None:
            request = work.request
            claimed = work.failed or request is None  # then whoever queued it has seen to that
            if not claimed and request is not None:
                claimed = request.claim(work.block, object()) and request.needs(work.block)
            if claimed and staging is None:
                self.settle(work, StoreError("the pager has no memory for a buffer"))
            elif claimed and staging is not None and not self._bring(work, staging):
                return
            if work.failed:  # a store may still be writing into the buffer of an attempt that failed
                staging = None
            with self._changed:
                self._busy -= 1
            staging = staging or self._staging()

    def _staging(self) -> Staging | None:
        try:
            return Staging(self.region.block_size)
        except (OSError, MemoryError):
            return None

    def _bring(self, work: Work, staging: Staging) -> bool:
        """Make one attempt; False if it took so long that it was abandoned, and this thread with it."""
        me = object()
        with self._changed:
            stuck = self._abandoned
            self._reading[me] = time.perf_counter_ns(), work
        if stuck < MOST_ABANDONED + self._most:
            source, error = self.region.source.read(work.block, staging)
        else:
            cause = f"{stuck} of them are abandoned"
            source, error = 0, StoreError("its reads do not return", cause=cause, permanent=True)
        with self._changed:
            if self._reading.pop(me, None) is None:
                self._abandoned -= 1
                return False
        self.settle(work, error or self._install(work, source))
        return True

    def _install(self, work: Work, source: int) -> BaseException | None:
        region, block = self.region, work.block
        changed = region.states[block] in CHANGED  # it is in memory already, but for pages that the user dropped
        if not changed:
            region.room.find(block)
        return region.install(block, source, counted=not changed, write=work.write)

    def _next(self) -> Work | None:
        """Wait for work; None ends the thread."""
        with self._changed:
            while not self._closed:
                if (work := self._pick()) is not None:
                    self._busy += 1
                    if self._has_work():
                        self._stir()
                    return work
                if not self._changed.wait(self._patience()) and not self._has_work():
                    break
            self._threads -= 1
            return None

    def _patience(self) -> float:
        if not self._later:
            return IDLE_S
        return max(0.0, (self._later[0][0] - time.perf_counter_ns()) / 1e9)

    def _pick(self) -> Work | None:
        if self._demands:
            return self._demands.popleft()
        if self._later and self._later[0][0] <= time.perf_counter_ns():
            return heapq.heappop(self._later)[2]
        for queue in (self._requests, self._patient):
            while queue:
                request = queue.popleft()
                if (block := request.take()) is not None:
                    queue.append(request)
                    return Work(block, 0, request)
        return None


def pool_of(region: Served) -> Pool:
    """Return the pool of a region; it exists from the first need on."""
    if region.pool is None:
        with region.lock:
            if region.pool is None:  # another thread may have been quicker
                region.pool = Pool(region)
    return region.pool
