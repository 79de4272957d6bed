"""Which blocks the application has used lately: samples of its page tables, for policies that ask.

Some facts of the kernel
------------------------
* The bits in which the processor notes a use are not to be had by another process, one page at a time (Linux 6.18: only
  sums, in smaps; page_idle's bitmap is seldom built in).  But `PAGEMAP_SCAN` (6.7) tells which pages are *mapped*, for
  0.2 ms a GiB, and a page of a memfd that is not mapped is mapped again by the next touch, for some 0.7 µs and without
  a word to userfaultfd, since it is not missing.
* `MADV_DONTNEED` takes pages of a shared mapping out of the page tables, for 0.1 µs each, and leaves them in the memfd.
  Write protection stays (a marker takes its place, 5.19); a poison marker goes, and the next touch is answered with
  another.  A process can do that only to itself: process_madvise(2) refuses it for another.

What follows
------------
A sample is two steps.  The application's listening thread is asked to take the region's pages out of its page tables,
some time soon; nothing depends on when.  After a quarter as many blocks have come in as memory holds, whatever is
mapped has been used meanwhile, but for what came in since.  That is as good as a bit for each block: on traces of a
Zipf distribution it saves 10 to 15 % of the faults (`design/eviction.md`), for a minor fault here and there.

So it is done only where it can pay: for a policy that asks, while blocks are dropped and come back, and less often as
long as a sample shows little.
"""

from __future__ import annotations

import contextlib
import os
import time
from array import array
from fcntl import ioctl

from userfault.kernel import abi
from userfault.pager import wire
from userfault.pager.wire import Message

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from userfault.pager.served import Served

PART = 4
"""A sample is taken when this part of the blocks that memory holds have come in since the last one."""
LEAST_BLOCKS, LEAST_NS = 64, 50_000_000
BACK = 8
"""Of the blocks that come in, one in so many has to have been in memory before."""
MUCH, MOST_PAUSE = 16, 32
"""A sample that finds less than one block in MUCH used doubles the pause before the next, up to MOST_PAUSE times."""
RANGES = 4096
_WORDS = abi.PAGE_REGION_STRUCT.size // 8


class Uses:
    """The samples of one region. The evictor calls it; `unmapped` is called by the control thread."""

    def __init__(self, region: Served, ask: Callable[[Message], None], pagemap: int) -> None:
        self.region = region
        self._ask = ask
        self._pagemap = pagemap
        self._since = self._came = self._back = 0
        self._pause = 1
        self._asked = False

    def look(self) -> None:
        """Take a sample if it is time."""
        residents = self.region.residents
        came, back = residents.came - self._came, residents.came_back - self._back
        enough = max(LEAST_BLOCKS, residents.capacity // PART) * self._pause
        if self._asked or came < enough or time.perf_counter_ns() - self._since < LEAST_NS:
            return
        if residents.fresh is not None:
            self._note(set(self._mapped()), residents.fresh)
            residents.fresh = None
        self._came, self._back, self._since = residents.came, residents.came_back, time.perf_counter_ns()
        if residents.asks and back * BACK >= came:
            self._asked = True
            self._ask(Message(wire.UNMAP, region=self.region.id))

    def unmapped(self) -> None:
        """The application has taken the region's pages out of its page tables."""
        self.region.residents.fresh = set()
        self._asked = False

    def _note(self, mapped: set[int], fresh: set[int]) -> None:
        residents = self.region.residents
        with residents.lock:
            used = mapped & residents.kept - fresh
            residents.touched |= used
        little = len(used) * MUCH < len(residents.kept)
        self._pause = min(2 * self._pause, MOST_PAUSE) if little else 1

    def _mapped(self) -> Iterator[int]:
        """Yield the blocks of which a page is mapped."""
        base, shift = self.region.base, self.region.shift
        with contextlib.suppress(OSError):  # no right to look, or nobody there any more
            for start, end in mapped_ranges(self._pagemap, base, self.region.end):
                yield from range((start - base) >> shift, ((end - base - 1) >> shift) + 1)


def open_pagemap(pid: int) -> int:
    """Return a descriptor of a process's page tables, or -1."""
    try:
        return os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1


def mapped_ranges(pagemap: int, address: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield start and end of the ranges that are mapped (PAGEMAP_SCAN; `kernel.pagemap` is too large for this process).

    Raises:
        OSError: as the ioctl.
    """
    vector = array("Q", bytes(8 * _WORDS * RANGES))
    into, present = vector.buffer_info()[0], abi.PAGE_IS_PRESENT
    while address < end:
        fields = abi.PM_SCAN_ARG_STRUCT.size, 0, address, end, 0, into, RANGES, 0, 0, present, 0, present
        argument = bytearray(abi.PM_SCAN_ARG_STRUCT.pack(*fields))
        found = ioctl(pagemap, abi.PAGEMAP_SCAN, argument)
        for at in range(0, found * _WORDS, _WORDS):
            yield vector[at], vector[at + 1]
        address = abi.PM_SCAN_ARG_STRUCT.unpack(argument)[4]
