"""The fault loop: the one thread that reads the userfaultfd.

Some facts about userfaultfd, and what follows
----------------------------------------------
* A read returns as many messages as fit, and waits for the first one if the descriptor blocks; poll before read costs
  0.4 µs more (Linux 6.18).  So this thread does nothing else, and its read blocks.
* A message tells of a thread that is asleep *at that moment*.  Two threads on one page are two messages; a thread that
  is woken and finds its page missing sends another.  So messages are questions, not orders, and may come twice.
* A thread that faults inside a system call and has a signal pending cannot sleep and cannot leave the system call
  either: it spins in the kernel, and sends the same message some hundred thousand times a second until the page is
  there.  A loop that answered each one would serve nobody else.  So a message about a block that somebody is working on
  costs one look-up; a thread that sleeps asks once, so after `STREAK` repeated questions without a lull the loop leaves
  that core and takes a short rest before each further one: at most about a thousand such messages a second are handled,
  and other threads wait a few milliseconds at the very most.
* `UFFDIO_COPY` from a mapped file whose pages have left the page cache waits for the disk.  So a store says what is hot
  (`Store.locate`), and the rest goes to the pool.

The body of `run` is long for this code base, and on purpose: a call costs 0.1 µs, a whole fault 5.  It handles the one
common case, a block that is absent, hot and not the last, and gives everything else to a method.
"""

from __future__ import annotations

import os
import time
from bisect import bisect_right
from fcntl import ioctl

from userfault.blocks import ledger as book
from userfault.blocks.geometry import PAGE_SIZE
from userfault.blocks.states import RESIDENT, BlockState
from userfault.kernel import abi
from userfault.pager.placement import PERIOD_NS
from userfault.pager.pool import Work, pool_of
from userfault.pager.staging import Staging

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from userfault.kernel.userfaultfd import Userfaultfd
    from userfault.pager.placement import Placement
    from userfault.pager.served import Served

FAULT = object()
"""The claim of the fault loop."""
READING = object()
"""The claim of a block that waits for a reader of the pool, or is being read."""
MESSAGES = 14
"""At once: CPython's own allocator still serves these 448 bytes, and malloc takes some 0.5 µs more a read."""
STREAK = 64
REST_S = 0.001
LULL_NS = 20_000_000
THREADS = 4096
_QUICK = tuple(book.bucket_of(i << 8) for i in range(4096))
"""Latency bucket by units of 256 ns, up to 1 ms: a look-up instead of a search."""
_ABSENT, _FILLING, _CLEAN = int(BlockState.ABSENT), int(BlockState.FILLING), int(BlockState.CLEAN)


def _nothing() -> None:
    pass


class FaultLoop:
    """Reads messages and answers them. `add` and `remove` may be called by any thread; `run` never returns."""

    def __init__(self, uffd: Userfaultfd, placement: Placement) -> None:
        self.uffd = uffd
        self.placement = placement
        self.filled = False
        """Whether this loop has answered anything yet; `on_filled` is called when it has."""
        self.on_filled: Callable[[], None] = _nothing
        self.reading: tuple[int, Served, int] | None = None
        """Since when (ns) this thread has been in a store, for which block of which region; None while it is not."""
        self._table: tuple[tuple[int, ...], tuple[Served, ...]] = ((), ())
        self._staging = Staging(2 << 20)
        self._asked: dict[int, tuple[int, int]] = {}
        """By thread: the region and block of its last message that was ignored. A thread that sleeps asks once."""
        self._repeats = self._repeated = 0

    def add(self, region: Served) -> None:
        """Answer the faults of a region from now on."""
        regions = sorted((*self._table[1], region), key=lambda r: r.base)
        self._table = tuple(r.base for r in regions), tuple(regions)

    def remove(self, region: Served) -> None:
        """Answer no more of its faults."""
        regions = [r for r in self._table[1] if r is not region]
        self._table = tuple(r.base for r in regions), tuple(regions)

    def find(self, address: int) -> Served | None:
        """Return the region that an address belongs to."""
        bases, regions = self._table
        at = bisect_right(bases, address) - 1
        return regions[at] if at >= 0 and address < regions[at].end else None

    def run(self) -> None:  # noqa: C901, PLR0912, PLR0915  # see the module's docstring
        """Read and answer until the process ends."""
        read, clock, placement = os.read, time.perf_counter_ns, self.placement
        unpack, iter_unpack = abi.UFFD_MSG_PAGEFAULT_STRUCT.unpack, abi.UFFD_MSG_PAGEFAULT_STRUCT.iter_unpack
        fd, claim, size, most = self.uffd.fd, FAULT, abi.UFFD_MSG_SIZE, abi.UFFD_MSG_SIZE * MESSAGES
        ask, pack, argument = abi.UFFDIO_COPY, abi.UFFDIO_COPY_STRUCT.pack_into, bytearray(abi.UFFDIO_COPY_STRUCT.size)
        absent, filling, clean, pagefault = _ABSENT, _FILLING, _CLEAN, abi.UFFD_EVENT_PAGEFAULT
        quick, slowest = _QUICK, len(_QUICK) << 8
        region: Served
        base = end = thread = look = 0
        while True:
            data = read(fd, most)
            start = clock()
            for event, flags, address, tid in (unpack(data),) if len(data) == size else iter_unpack(data):
                if tid != thread or start > look:
                    placement.saw(tid, start)
                    thread, look = tid, start + PERIOD_NS
                if not base <= address < end:
                    base = end = 0
                    found = self.find(address) if event == pagefault else None
                    if found is None:
                        continue
                    region = found
                    base, end, shift, block_size = region.base, region.end, region.shift, region.block_size
                    whole, mode, arrived, locate = (
                        region.whole_blocks,
                        region.copy_mode,
                        region.residents.arrived,
                        self._timed(region) if region.source.may_hang else region.source.locate,
                    )
                    states, claims, waiters = region.states, region.claims, region.waiters
                    writing = abi.UFFD_PAGEFAULT_FLAG_WRITE if region.protects else 0
                    room, residents, stream = region.room, region.residents, region.stream
                    histogram = region.counters.histogram
                block = (address - base) >> shift
                if claims.setdefault(block, claim) is not claim and not self._claims_after_all(region, block):
                    self._ignore(region, block, tid, start)
                    continue
                if region.closing:
                    base = end = 0  # its addresses may be somebody else's by now: look again
                    region.release(block)
                    self.uffd.wake(address & -PAGE_SIZE, PAGE_SIZE)
                    continue
                if states[block] != absent:
                    self._odd(region, block, address, flags, start)
                    continue
                if block == stream.next and not flags & writing and stream.fill(block, claim):
                    self._count(region, start)
                    continue
                stream.next = block + 1
                states[block] = filling
                offset = block << shift
                source = locate(offset, block_size) if block < whole else 0
                if not source or flags & writing or (len(arrived) >= residents.mark and not room.admits()):
                    self._demand(region, block, source, start, write=bool(flags & writing))
                    continue
                arrived.append(block)  # before it is there, or a reader would find the same room meanwhile
                if len(arrived) > residents.mark and room.overflows():
                    residents.withdraw(block)
                    self._demand(region, block, source, start)
                    continue
                pack(argument, 0, base + offset, source, block_size, mode, 0)
                try:
                    ioctl(fd, ask, argument)  # Userfaultfd.copy, without the call
                except OSError:
                    residents.withdraw(block)
                    self._demand(region, block, 0, start)
                    continue
                states[block] = clean
                del claims[block]
                if waiters:
                    self._settle(region, block)
                if not self.filled:
                    self._first()
                took = clock() - start
                histogram[quick[took >> 8] if took < slowest else book.bucket_of(took)] += 1

    def _count(self, region: Served, start: int) -> None:
        """Count a fault that this loop has answered itself."""
        if not self.filled:
            self._first()
        region.counters.histogram[book.bucket_of(time.perf_counter_ns() - start)] += 1

    def _first(self) -> None:
        self.filled = True
        self.on_filled()

    def _claims_after_all(self, region: Served, block: int) -> bool:
        """Leave word that a message met a claim, and try once more: the owner looks for it after its release."""
        region.ignored.add(block)
        if region.claims.setdefault(block, FAULT) is not FAULT:
            return False
        region.ignored.discard(block)
        return True

    def _ignore(self, region: Served, block: int, tid: int, now: int) -> None:
        """A message about a block that somebody is working on: they will wake the thread."""
        region.counters.duplicates += 1
        question = (region.id, block)
        if self._asked.get(tid) != question:
            if len(self._asked) >= THREADS:
                self._asked.clear()
            self._asked[tid] = question
            return
        if now - self._repeated > LULL_NS:
            self._repeats = 0
        self._repeated = now
        self._repeats += 1
        if self._repeats > STREAK:
            self.placement.flee(now)
            time.sleep(REST_S)  # a limit on the rate at which spinning threads are listened to

    def _timed(self, region: Served) -> Callable[[int, int], int]:
        """Return the `locate` of a store of the user's own, under the clock of the control thread."""

        def locate(offset: int, length: int) -> int:
            self.reading = time.perf_counter_ns(), region, offset >> region.shift
            address = region.source.locate(offset, length)
            self.reading = None
            return address

        return locate

    def _settle(self, region: Served, block: int) -> None:
        """Let the requests go on that met our claim, which is released already."""
        with region.lock:
            waiting = region.waiters.pop(block, ())
        for request in waiting:
            request.again(block)

    def _demand(self, region: Served, block: int, source: int, start: int, *, write: bool = False) -> None:
        """Bring in a claimed block that takes more than a copy.

        That is room first, a computation, a read that may wait, or write access at once.
        """
        self.reading = time.perf_counter_ns(), region, block  # not `start`: others of its batch were served since
        source = source or region.source.at_hand(block, self._staging)
        error: BaseException | None = None
        if not source and region.source.inline:
            source, error = region.source.read(block, self._staging)
        self.reading = None
        if error is not None:
            self._staging = Staging(2 << 20)  # a store may still be writing into the one of an attempt that failed
        if error or (source and region.room.has()):
            work = Work(block, start, write=write)
            pool_of(region).settle(work, error or region.install(block, source, write=write))
        else:
            region.claims[block] = READING
            self.placement.relax()
            pool_of(region).demand(block, start, write=write)

    def _odd(self, region: Served, block: int, address: int, flags: int, start: int) -> None:
        """A write to a protected block, or a page that is missing though its block's state says otherwise."""
        if flags & abi.UFFD_PAGEFAULT_FLAG_WP and region.states[block] in RESIDENT:
            region.give_write_access(block)
            region.release(block)
            self._first()
            region.counters.record(time.perf_counter_ns() - start)
        elif region.is_mended(block, address):
            region.release(block)
        else:
            self._demand(region, block, 0, start)
