"""What the application asks for: a range of blocks that is to be in memory, and what is done for each block of it."""

from __future__ import annotations

from collections import deque

from userfault.blocks.states import BlockState
from userfault.errors import StoreError
from userfault.pager import failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from userfault.pager.pool import Pool
    from userfault.pager.served import Served

ABSENT, FILLING, FAILED = int(BlockState.ABSENT), int(BlockState.FILLING), int(BlockState.FAILED)


class Request:
    """A range of blocks that somebody wants in memory; `done` is called once, when all of it is settled.

    `write` asks for write access too; `retry` brings failed blocks in once more. `error` is why it failed, or None.
    """

    def __init__(
        self,
        pool: Pool,
        first: int,
        stop: int,
        done: Callable[[Request], None],
        *,
        write: bool = False,
        retry: bool = False,
        urgent: bool = True,
    ) -> None:
        self.pool = pool
        self.region = pool.region
        self.write = write and self.region.protects
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
            self.pool.wants(self)

    def settle(self, error: bytes | None = None) -> None:
        """One block of the range is settled."""
        self.error = self.error or error
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

    # -- one block of it -------------------------------------------------------------------------------------

    def claim(self, block: int, token: object) -> bool:
        """Claim a block, or leave this request's name with whoever has it."""
        region = self.region
        if region.claims.setdefault(block, token) is token:
            return True
        with region.lock:
            region.waiters.setdefault(block, []).append(self)
        if region.claims.setdefault(block, token) is not token:
            return False  # the owner will find the name
        if self._withdraw(block):
            return True
        region.release(block)  # the owner has found it: the block comes round again
        return False

    def _withdraw(self, block: int) -> bool:
        with self.region.lock:
            names = self.region.waiters.get(block, [])
            if self not in names:
                return False
            names.remove(self)
            return True

    def needs(self, block: int) -> bool:
        """Whether a claimed block has to be read for this request; if not, it is settled here, and released."""
        region, state = self.region, self.region.states[block]
        if region.closing:
            region.release(block)
            return False
        if state == ABSENT or (state == FAILED and self.retry):
            region.states[block] = FILLING
            return True
        error = (region.error_of(block) or forgotten(region, block)) if state == FAILED else None
        if state != FAILED and self.write:
            region.give_write_access(block)
        region.release(block)
        self.settle(error)
        return False

    def brought(self, block: int, error: bytes | None) -> None:
        """The read that `needs` asked for is over, and the claim released."""
        if self.write and error is None:
            self.again(block)  # it is in memory now; next comes write access
        else:
            self.settle(error)


def forgotten(region: Served, block: int) -> bytes:
    """Return the error of a block about which nothing is known any more."""
    offset, length = region.geometry.span(block)
    return failure.encode(
        StoreError(
            "it failed before, and so many others since that the reason is lost; see Region.retry()",
            store=region.source.name,
            offset=offset,
            length=length,
        )
    )
