"""Reads that may wait: a few threads per region, so that a slow store delays nobody but its own readers.

A pool does two kinds of work.  A *demand* is a block that a thread of the application is stopped at; a *request* is a
range that `ensure`, `prefetch` or `retry` asked for.  Demands go first, whatever else is queued; then requests that
somebody waits for, in turns; then the others.  A request's next block is taken only when a thread is free for it, so
that a long prefetch never stands between a fault and its block.
Threads are started when there is work for them, up to the store's `concurrency`, and end when idle.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from threading import Condition, Thread

from userfault.blocks.states import BlockState
from userfault.errors import StoreError
from userfault.pager import failure, placement
from userfault.pager.served import Staging

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from userfault.pager.served import Served

ABSENT, FILLING, CLEAN, FAILED = (
    int(s) for s in (BlockState.ABSENT, BlockState.FILLING, BlockState.CLEAN, BlockState.FAILED)
)
IDLE_S = 5.0
"""After which a thread with nothing to do ends (Java's cached pools wait a minute; ours start in 0.1 ms)."""


class Request:
    """A range of blocks that somebody wants in memory; `done` is called once, when all of it is settled.

    `write` asks for write access too; `retry` brings failed blocks in once more. `error` is why it failed, or None.
    """

    def __init__(
        self,
        region: Served,
        first: int,
        stop: int,
        done: Callable[[Request], None],
        *,
        write: bool = False,
        retry: bool = False,
        urgent: bool = True,
    ) -> None:
        self.region = region
        self.write = write and region.protects
        self.retry = retry
        self.urgent = urgent
        """Whether somebody waits for it."""
        self.error: bytes | None = None
        self._next = first
        self._stop = stop
        self._repeat: deque[int] = deque()
        self._open = stop - first
        self._done = done

    def take(self) -> int | None:
        """Return the next block to look at, or None. Called under the pool's lock."""
        if self._repeat:
            return self._repeat.popleft()
        if self._next == self._stop:
            return None
        self._next += 1
        return self._next - 1

    def again(self, block: int) -> None:
        """Look at a block once more: whoever had claimed it is done."""
        if not self.region.closing:
            self._repeat.append(block)
            pool_of(self.region).wants(self)

    def settle(self) -> None:
        """One block of the range is settled."""
        with self.region.lock:
            self._open -= 1
            last = self._open == 0
        if last:
            self._done(self)

    def abandon(self, error: bytes) -> None:
        """Settle all that is left: the region closes."""
        with self.region.lock:
            left, self._open = self._open, 0
        if left:
            self.error = self.error or error
            self._done(self)


class Pool:
    """The readers of one region. Any thread of the worker may call it."""

    def __init__(self, region: Served) -> None:
        self.region = region
        self._most = max(1, region.store.concurrency)
        self._threads = 0
        self._busy = 0
        self._demands: deque[tuple[int, int]] = deque()
        self._requests: deque[Request] = deque()
        self._patient: deque[Request] = deque()
        self._changed = Condition()
        self._closed = False

    def demand(self, block: int, since: int) -> None:
        """Bring in a block that a thread waits for since `since` (ns); the caller has claimed it for this pool."""
        with self._changed:
            self._demands.append((block, since))
            self._stir()

    def wants(self, request: Request) -> None:
        """Work on a request, or on it again."""
        with self._changed:
            queue = self._requests if request.urgent else self._patient
            if request not in queue:
                queue.append(request)
            self._stir()

    def stir(self) -> None:
        """See that queued work has a thread: one could not be started before, perhaps. Called twice a second."""
        with self._changed:
            if self._demands or self._requests or self._patient:
                self._stir()

    def close(self) -> None:
        """End the threads as they become idle; nobody waits for a read that hangs."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _stir(self) -> None:
        """Under the lock: see that enough threads are awake for what is queued."""
        queued = len(self._demands) + (self._most if self._requests or self._patient else 0)
        if queued > self._threads - self._busy and self._threads < self._most:
            with contextlib.suppress(
                RuntimeError
            ):  # no more threads to be had: those there are will do, or the next stir
                Thread(target=self._work, name=f"region {self.region.id}", daemon=True).start()
                self._threads += 1
        self._changed.notify()

    def _work(self) -> None:
        placement.go_home()
        staging = Staging(self.region.block_size)
        token = object()
        while work := self._next():
            request, block, since = work
            if request is None:
                self.region.bring(block, staging)
                self.region.counters.record(time.perf_counter_ns() - since)
            else:
                self._attend(request, block, staging, token)
            with self._changed:
                self._busy -= 1

    def _next(self) -> tuple[Request | None, int, int] | None:
        """Wait for work; None ends the thread."""
        with self._changed:
            while not self._closed:
                if (work := self._pick()) is not None:
                    self._busy += 1
                    if self._demands or self._requests or self._patient:
                        self._stir()
                    return work
                if not self._changed.wait(IDLE_S) and not (self._demands or self._requests or self._patient):
                    break
            self._threads -= 1
            return None

    def _pick(self) -> tuple[Request | None, int, int] | None:
        if self._demands:
            return (None, *self._demands.popleft())
        for queue in (self._requests, self._patient):
            while queue:
                request = queue.popleft()
                if (block := request.take()) is not None:
                    queue.append(request)
                    return request, block, 0
        return None

    def _attend(self, request: Request, block: int, staging: Staging, token: object) -> None:
        """See to one block of a request, once it can be claimed."""
        region = self.region
        if not self._claim(request, block, token):
            return
        if region.closing:
            region.release(block)
        elif self._see_to(request, block, staging):
            request.settle()
        else:
            request.again(block)  # it is in memory now; next comes write access

    def _claim(self, request: Request, block: int, token: object) -> bool:
        """Claim a block, or leave the request's name with whoever has it."""
        region = self.region
        if region.claims.setdefault(block, token) is token:
            return True
        with region.lock:
            region.waiters.setdefault(block, []).append(request)
        if region.claims.setdefault(block, token) is not token:
            return False  # the owner will find the name
        if self._withdraw(request, block):
            return True
        region.release(block)  # the owner has found it: the block comes round again
        return False

    def _withdraw(self, request: Request, block: int) -> bool:
        with self.region.lock:
            names = self.region.waiters.get(block, [])
            if request not in names:
                return False
            names.remove(request)
            return True

    def _see_to(self, request: Request, block: int, staging: Staging) -> bool:
        """Do for a claimed block what the request asks; False if it has to be looked at again. Releases the claim."""
        region, state = self.region, self.region.states[block]
        if state in (ABSENT, FAILED) and (state == ABSENT or request.retry):
            region.states[block] = FILLING
            region.errors.pop(block, None)
            region.bring(block, staging)
            if reason := region.errors.get(block):
                request.error = request.error or reason
                return True
            return not request.write
        if state == FAILED:
            request.error = request.error or region.errors.get(block) or failure.encode(_forgotten(region, block))
        elif request.write:
            region.give_write_access(block)
        region.release(block)
        return True


def _forgotten(region: Served, block: int) -> StoreError:
    offset, length = region.geometry.span(block)
    return StoreError(
        "it failed before, and the worker that knew why is gone; see Region.retry()",
        store=region.store.describe(),
        offset=offset,
        length=length,
    )


def pool_of(region: Served) -> Pool:
    """Return the pool of a region; it exists from the first need on."""
    if region.pool is None:
        with region.lock:
            if region.pool is None:  # another thread may have been quicker
                region.pool = Pool(region)
    return region.pool
