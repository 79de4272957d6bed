"""A region as the worker sees it: its blocks, who is working on which, and how one is brought in.

Claims
------
Several threads of the worker work on blocks: the fault loop, the readers of the pool, evictions.  Whoever is to change
the state of a block first *claims* it, with `claims.setdefault(block, token)`: one atomic step that either makes the
caller the owner or shows that somebody else is.  The owner alone changes the state, and releases the claim when the
block is at rest again.  There is no lock on the way of a fault.

Whoever meets a claim must not be forgotten, and must not wait.  So the fault loop, when a message meets a claim, leaves
the block in `ignored` and then tries once more; if the claim is still held, it goes on to its next message.  A request
does the same with its name in `waiters`.  The owner looks at both *after* its release, and wakes the block's range, or
queues the request again.  Each side first writes and then looks, so one of the two always sees the other.  The thread
was already asleep in the kernel when its message was read; the wake reaches it, and if it then still cannot go on, it
sends another message.  (A wake *before* the release would not do: after the COPY a thread may go on to write, and its
write-protect fault meets the same claim.)  The fault loop's own claims need no look: while it holds one it reads no
message.

Closing
-------
`closing` is set, then one waits until no claim is of the kind that touches the application's memory.  An owner looks at
`closing` after it has claimed and before it touches.  After that, addresses may be used for something else: a read that
returns from its store hours later finds the region closing and goes no further.
"""

from __future__ import annotations

import contextlib
import errno
import time
from threading import Lock

from userfault.blocks import ledger as book
from userfault.blocks.geometry import PAGE_SIZE
from userfault.blocks.ledger import Ledger
from userfault.blocks.states import CHANGED, BlockState
from userfault.errors import KernelError, StoreError
from userfault.kernel import abi, memfd
from userfault.pager import evict, failure, poison, wire
from userfault.pager.counters import Counters
from userfault.pager.residents import FLOOR, Residents
from userfault.pager.room import Room
from userfault.pager.source import Source
from userfault.pager.stream import Stream
from userfault.pager.writeback import WriteBack
from userfault.shield import begin

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from userfault.kernel.userfaultfd import Userfaultfd
    from userfault.pager.pool import Pool
    from userfault.pager.requests import Request
    from userfault.pager.uses import Uses

ABSENT, FILLING, CLEAN, DIRTY, FLUSHING, PRIVATE, EVICTING, FAILED = map(int, BlockState)
INSTALLING = object()
"""The claim of a reader that is about to touch the application's memory."""
BATCH = 16
"""Blocks that are dropped when the kernel has no memory."""
PATIENCE = 200
"""How often a refusal that may pass (EAGAIN, ENOMEM) is tried again, 1 ms apart at first: ~1 s in all."""


def _nothing() -> None:
    pass


def _nobody(kind: int, error: bytes) -> None:
    pass


class Served:
    """One region. Its methods are called by the owner of the block that they name, unless they say otherwise."""

    def __init__(self, fd: int, uffd: Userfaultfd, *, again: bool = False) -> None:
        """Take a region on from its memfd; `again` says that a former worker has served it.

        Raises:
            StoreError: if its store cannot be made here, or is not what it was.
        """
        self.fd = fd
        self.uffd = uffd
        self.ledger = Ledger.attach(fd)
        words = self.ledger.words
        geometry = self.ledger.geometry
        self.id: int = words[book.W_ID]
        self.base: int = words[book.W_ADDRESS]
        self.end = self.base + geometry.length
        self.geometry = geometry
        self.shift = geometry.shift
        self.block_size = geometry.block_size
        self.pages_per_block = geometry.block_size // PAGE_SIZE
        self.whole_blocks = geometry.size >> geometry.shift
        self.protects = words[book.W_MODE] != book.READ_ONLY
        self.copy_mode = abi.UFFDIO_COPY_MODE_WP if self.protects else 0
        self.states = self.ledger.states
        self.pins = self.ledger.pins
        self.notes = self.ledger.notes
        self.claims: dict[int, object] = {}
        self.ignored: set[int] = set()
        """Blocks about which a message met a claim: the owner wakes them after its release."""
        self.waiters: dict[int, list[Request]] = {}
        self.closing = False
        self.lock = Lock()
        self._told = self._retold = 0
        self._told_full = False
        self.counters = Counters(words)
        self.residents = Residents(self.ledger, self.counters)
        self.pool: Pool | None = None
        self.uses: Uses | None = None
        self.on_settled: Callable[[], None] = _nothing
        """Called after each block that was brought in by another way than the fault loop's own, or failed."""
        self.on_news: Callable[[int, bytes], None] = _nobody
        """Called with a kind of news and an error."""
        self.source = Source(fd, self.ledger, again=again)
        self.room = Room(self)
        self.stream = Stream(self)
        self.writeback = WriteBack(self) if words[book.W_MODE] == book.READ_WRITE else None

    # -- numbers ---------------------------------------------------------------------------------------------

    def byte_range(self, first: int, stop: int) -> tuple[int, int]:
        """Return `(start, end)` of a run of blocks, in bytes of the memory: whole pages."""
        return first << self.shift, min(stop << self.shift, self.geometry.length)

    def publish(self, cpu: int) -> None:
        """Write the counters into the ledger. Called by the control thread."""
        dirty = len(self.writeback.dirty) if self.writeback else 0
        with self.residents.held(wait=False) as held:
            if held:  # what comes back is counted when it is settled
                self.residents.settle()
        self.room.remark()
        self.counters.publish(self.ledger.words, self.block_size, len(self.residents), dirty, cpu)

    def tick(self, now: int) -> None:
        """Look whether something takes too long, or is due. Called twice a second."""
        if self.pool is not None:
            self.pool.watch(now)
        if self.writeback is not None:
            self.writeback.tick(now)
        self.residents.watch(now)

    # -- claims ----------------------------------------------------------------------------------------------

    def release(self, block: int) -> None:
        """Give a claim back, and let those go on who met it: threads of the application, and requests."""
        del self.claims[block]
        if block in self.ignored:
            self.ignored.discard(block)
            if not self.closing:
                self.wake(*self.extent(block))
        if self.waiters:
            with self.lock:
                waiting = self.waiters.pop(block, ())
            for request in waiting:
                request.again(block)

    def wake(self, start: int, length: int) -> None:
        """Let threads that wait in a byte range of the region look again."""
        self.uffd.wake(self.base + start, length)

    # -- bringing a block in ---------------------------------------------------------------------------------

    def install(self, block: int, source: int, *, counted: bool = False, write: bool = False) -> BaseException | None:
        """Make a block visible that lies at `source` in this process, and writable if the thread is about to `write`.

        It may have been `counted` among those in memory already (`Room.find`).  A changed block, from which the user
        has dropped pages, stays what it is, and gets back what is missing.

        Returns:
            What went wrong, or None.
        """
        claim, self.claims[block] = self.claims[block], INSTALLING
        try:
            if self.closing:
                return None
            if self.states[block] in CHANGED:
                self._install(block, source, self.copy_mode if self.states[block] == FLUSHING else 0)
            else:
                self._settle_in(block, source, counted=counted, write=write)
        except BaseException as error:  # noqa: BLE001  # whatever it was, the block must not be lost
            self.claims[block] = claim
            return error
        return None

    def arrived(self, block: int) -> None:
        """Take note that a block is there. The owner releases it next."""
        if self.closing:
            return
        if self.notes[block]:
            self.notes[block] &= book.EVICTED
        self.on_settled()
        self.counters.filled(self.geometry.span(block)[1])

    def _settle_in(self, block: int, source: int, *, counted: bool, write: bool) -> None:
        """Install a block within the budget: it counts before it is there, or two at once would each find room."""
        if not counted:
            self.residents.arrived.append(block)  # eviction leaves it alone, since it is claimed
        try:
            self.room.make()
            if write:
                self._note_write(block)
            self._install(block, source, 0 if write else self.copy_mode)
        except BaseException:
            if not write or self._is_untouched(block):
                self.residents.withdraw(block)
            raise
        if not write:
            self.states[block] = CLEAN

    def _is_untouched(self, block: int) -> bool:
        """Whether a block that was to be writable has not come in, not even in part; then it is no longer changed."""
        start, length = self.extent(block)
        if any(memfd.data_extents(self.fd, start, start + length)):
            return False
        if self.states[block] == PRIVATE:
            self.counters.became_private(-1)
        elif self.writeback:
            self.writeback.dirty.pop(block, None)
        self.states[block] = FILLING
        return True

    def extent(self, block: int) -> tuple[int, int]:
        """Return offset and length of a block in the memory: whole pages."""
        start, end = self.byte_range(block, block + 1)
        return start, end - start

    def _install(self, block: int, source: int, mode: int) -> None:
        """COPY a block into the application, around pages that are there already, and wake."""
        start, length = self.extent(block)
        at, end, impatience = start, start + length, 0
        while at < end:
            done, error = self.uffd.copy(self.base + at, source + at - start, end - at, mode)
            at += done
            if done:  # whatever stopped it, the next call will say
                continue
            if error == errno.EEXIST:
                at += PAGE_SIZE
            elif error in (errno.EAGAIN, errno.ENOMEM) and impatience < PATIENCE:
                impatience += 1
                time.sleep(0.001 + 0.0001 * impatience)  # back-off: only the kernel can say when
                if error == errno.ENOMEM:
                    evict.drop_victims(self, len(self.residents) - BATCH, wait=False)
            elif error == errno.EFAULT:
                raise StoreError("the file's content went away while it was being copied")
            elif error not in (0, errno.ENOENT, errno.ESRCH):  # those two: nobody is there any more
                raise KernelError(error, "ioctl(UFFDIO_COPY)", f"block {block}")
            elif error:
                break
        self.wake(start, length)  # whoever waits on a page that was there already

    def fail(self, block: int, error: StoreError) -> bytes:
        """Fail a block: a touch is a SIGBUS from now on. Return the error as text; the owner releases next."""
        text = failure.encode(error)
        self.claims[block] = INSTALLING
        if self.closing:
            return text
        with self.lock:
            self.ledger.errors.add(block, failure.abridge(text))
            self.ledger.words[book.W_ERRORS] += 1
            self._told += 1
            loud = self._told <= failure.LOUD
        self.notes[block] |= book.POISONED
        if self.states[block] not in CHANGED:
            self.states[block] = FAILED
        self.counters.add(book.FAILURES)
        if loud:  # first, since the application may be about to die of it
            failure.report(f"{error}; touching it is a SIGBUS until Region.retry()")
            self.on_news(wire.BLOCK_FAILED, text)
        start, length = self.extent(block)
        poison.poison(self.uffd, self.base + start, length)
        self.on_settled()
        return text

    def tell_retry(self, error: StoreError) -> None:
        """Count an attempt that failed and will be made again."""
        self.counters.add(book.RETRIES)
        with self.lock:
            self._retold += 1
            loud = self._retold <= failure.LOUD
        if loud:
            self.on_news(wire.READ_FAILED, failure.encode(error))

    def tell_write_error(self, error: StoreError) -> None:
        """Count, keep and tell that changes could not be written back."""
        text = failure.encode(error)
        with self.lock:
            self.ledger.errors.add(error.offset >> self.shift, failure.abridge(text))
            self.ledger.words[book.W_ERRORS] += 1
            self._told += 1
            loud = self._told <= failure.LOUD
        if loud:
            failure.report(f"{error}; the changes stay in memory")
            self.on_news(wire.WRITE_FAILED, text)

    def tell_full(self) -> None:
        """Say, once, that nothing can be dropped: what fills the budget are changes that stay, or pins."""
        kept = len(self.residents.private)
        if self._told_full or not kept or kept + FLOOR < self.room.limit:
            return
        self._told_full = True
        size, budget = kept << self.shift, self.room.limit << self.shift
        cause = f"{size} bytes of private changes (mode='c') stay in memory; give it a larger budget, or use mode='r+'"
        error = StoreError(f"the budget of {budget} bytes is full", store=self.source.name, cause=cause)
        failure.report(str(error))
        self.on_news(wire.BUDGET_FULL, failure.encode(error))

    def error_of(self, block: int) -> bytes | None:
        """Return why a block failed, if that is still known."""
        return self.ledger.errors.of(block)

    # -- faults that are not simply a block to bring ---------------------------------------------------------

    def give_write_access(self, block: int) -> None:
        """Make a resident block private (`c`) or dirty (`r+`), and writable, and wake. Leaves the claim."""
        self.claims[block] = INSTALLING
        if self.closing:
            return
        self._note_write(block)
        start, length = self.extent(block)
        for _ in range(PATIENCE):
            error = self.uffd.write_protect(self.base + start, length, 0)
            if error in (0, errno.ENOENT, errno.ESRCH):  # done; or nobody is there any more
                return
            time.sleep(0.001)
        raise KernelError(error, "ioctl(UFFDIO_WRITEPROTECT)", f"block {block}")  # let a successor try

    def _note_write(self, block: int) -> None:
        if self.writeback:
            self.states[block] = DIRTY
            self.writeback.became_dirty(block)
        elif self.states[block] != PRIVATE:
            self.states[block] = PRIVATE
            self.counters.became_private()

    def is_mended(self, block: int, address: int) -> bool:
        """Answer a missing fault in a block whose state says that nothing is missing; False if it has to be filled."""
        page = (address - self.base) & -PAGE_SIZE
        if self.states[block] == FAILED:
            start, length = self.extent(block)
            poison.poison(self.uffd, self.base + start, length)
        elif any(memfd.data_extents(self.fd, page, page + PAGE_SIZE)):
            self.wake(page, PAGE_SIZE)  # the message is old news
        else:  # the user dropped the page: MADV_REMOVE
            if self.states[block] == CLEAN:
                self.states[block] = FILLING
            return False
        return True

    # -- beginning and end -----------------------------------------------------------------------------------

    def close(self, hot_claims: tuple[object, ...]) -> None:
        """Stop touching the application's memory, and forget the region. Called by the control thread."""
        self.closing = True
        touching = (*hot_claims, INSTALLING)
        while any(claim in touching or isinstance(claim, evict.Eviction) for claim in list(self.claims.values())):
            time.sleep(0.0002)  # at most one COPY or hole; the fault loop has no lock that one could wait on
        with contextlib.suppress(KernelError):  # whoever still maps the ledger would keep the data alive as well
            memfd.punch_hole(self.fd, 0, self.geometry.length)
        pool, self.pool = self.pool, None
        if pool is not None:
            pool.close()
        with contextlib.suppress(RuntimeError):  # no thread to be had: what the store holds goes with the worker
            begin(self.source.close)
