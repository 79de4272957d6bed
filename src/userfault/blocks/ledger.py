"""The ledger: everything about a region that must outlive a worker, kept in the region's own memfd.

A region is one memfd, and the memfd describes itself.  Behind the data lie, each on its own pages::

    data | states | pins | notes: a byte per block each | recipe of the store | the last errors | words: one page

so that whoever holds that one descriptor can take the region over: it finds the words on the last page, from them
the rest, and from the recipe the store.  One descriptor per region is also what lets a thousand regions live under
the usual limit of 1024.  Only the data part is ever registered with userfaultfd, and only the application maps it;
the rest is mapped shared by the application and the worker.  It is sparse: a region of 1 TiB costs what is touched.

Who writes what: the *states*, the *notes*, the errors and the counters belong to the worker, the *pins* to the
application, the header is written once.  A note says what a successor must know of a block besides its state.  A pin is
written before the request that needs it is sent, and the worker looks at the pins again after it has written EVICTING;
so a pinned block is never dropped, and pins survive any number of workers.
"""

from __future__ import annotations

import mmap
import os
from bisect import bisect_left

from userfault.blocks import errors
from userfault.blocks.errors import ErrorLog
from userfault.blocks.geometry import PAGE_SIZE, Geometry, round_up
from userfault.kernel import abi, memfd, memory, process
from userfault.kernel.syscalls import naming

TYPE_CHECKING = False
if TYPE_CHECKING:
    from userfault.blocks.states import BlockState

MAGIC = 0x31544C5541464655  # "UFFAULT1" would need a ninth byte; any constant does
READ_ONLY, COPY_ON_WRITE, READ_WRITE = range(3)
NO_BUDGET = (1 << 64) - 1

# The header: written once by the application.
W_MAGIC, W_ID, W_ADDRESS, W_SIZE, W_BLOCK_SIZE, W_MODE, W_BUDGET, W_RECIPE, W_RECIPE_LENGTH = range(9)
# The same, of how reads are tried again: times in microseconds, the jitter in millionths.
W_ATTEMPTS, W_BACKOFF, W_LONGEST, W_JITTER, W_TIMEOUT = range(9, 14)
# Written by the worker: how many workers in a row have died while they made the store; how many errors there were.
W_DEATHS, W_ERRORS = range(14, 16)
# Written by the application: microseconds between write-backs in the background; 0: none.
W_SYNC = 16
# Written by the worker: how many workers in a row have died while they were in the store's `write`.
W_WRITE_DEATHS = 17
# Written by the application: bytes that the regions of the pager may have together, if this one is among those.
W_SHARED = 18
# Written by the worker: how many workers in a row have died in the region's own eviction policy.
W_POLICY_DEATHS = 19
# The counters: written by the worker.
COUNTERS = 32
FAULTS, FILLED, BYTES_READ, EVICTIONS, FAILURES, DUPLICATES, RESIDENT, PRIVATE, CPU, RETRIES = range(
    COUNTERS, COUNTERS + 10
)
BYTES_WRITTEN, DIRTY, REFAULTS = range(COUNTERS + 10, COUNTERS + 13)
BUCKETS = 96
"""Four buckets an octave from 256 ns: the last begins at about 3.6 s."""
HISTOGRAM = 128
"""Of faults."""
WRITES = HISTOGRAM + BUCKETS
"""Of writes to the store."""

READING, STRUCK, SUSPECT, POISONED, EVICTED = 1, 2, 4, 8, 16
"""Notes: a store of the user's own is being read; one worker has died meanwhile; two have; the pages are poisoned; the
block has been in memory before, and was dropped."""

BOUNDS = tuple(round(256 * 2 ** (i / 4)) for i in range(BUCKETS))
"""Upper bounds of the latency buckets, in nanoseconds; the last one holds everything above too."""


def bucket_of(nanoseconds: int) -> int:
    """Return the index of the bucket that a latency falls into."""
    return min(bisect_left(BOUNDS, nanoseconds), BUCKETS - 1)


def read_words(fd: int) -> memoryview:
    """Return a copy of the words of a region's memfd: 64-bit numbers.

    Raises:
        ValueError: if the descriptor is not a region's memfd.
    """
    words = memoryview(os.pread(fd, PAGE_SIZE, os.fstat(fd).st_size - PAGE_SIZE)).cast("Q")
    if words[W_MAGIC] != MAGIC:
        raise ValueError(f"descriptor {fd} is not the memfd of a region")
    return words


def has_block(fd: int, *wanted: BlockState) -> bool:
    """Whether a block of the region is in one of these states; for a process that has not mapped it."""
    words = read_words(fd)
    geometry = Geometry(words[W_SIZE], words[W_BLOCK_SIZE])
    states = memfd.data_extents(fd, geometry.length, geometry.length + round_up(geometry.blocks, PAGE_SIZE))
    parts = (os.pread(fd, end - start, start) for start, end in states)
    return any(state in part for part in parts for state in wanted)


class Layout:
    """Where each part of a region's memfd begins, in bytes."""

    __slots__ = ("errors", "geometry", "notes", "pins", "recipe", "recipe_length", "states", "total", "words")

    def __init__(self, geometry: Geometry, recipe_length: int) -> None:
        part = round_up(max(geometry.blocks, 1), PAGE_SIZE)
        self.geometry = geometry
        self.recipe_length = recipe_length
        self.states = geometry.length
        self.pins = self.states + part
        self.notes = self.pins + part
        self.recipe = self.notes + part
        self.errors = self.recipe + round_up(recipe_length, PAGE_SIZE)
        self.words = self.errors + round_up(errors.LENGTH, PAGE_SIZE)
        self.total = self.words + PAGE_SIZE


class Ledger:
    """A mapping of everything behind the data of a region's memfd.

    `states`, `pins` and `notes` are memoryviews of bytes, `words` of 64-bit words, `recipe` of the store's recipe.
    The mapping ends with the last of them, as that of any `mmap` object.  A `__del__` would come too early: a garbage
    collector that has found a cycle calls all of them at once, and a finalizer of somebody else's may use the region.
    """

    __slots__ = ("_address", "_length", "errors", "geometry", "notes", "pins", "recipe", "states", "words")

    def __init__(self, fd: int, layout: Layout) -> None:
        self.geometry = layout.geometry
        self._length = layout.total - layout.states
        with naming("mmap", f"{self._length} bytes for a ledger"):
            reserved = mmap.mmap(-1, self._length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | abi.MAP_NORESERVE)
        self._address = memory.address_of(reserved)
        over = mmap.MAP_SHARED | abi.MAP_FIXED  # an `mmap` object of a file would keep a descriptor
        memory.map_memory(self._length, fd=fd, offset=layout.states, flags=over, address=self._address)
        memory.advise(self._address, self._length, abi.MADV_DONTDUMP)
        whole = memoryview(reserved)
        base = layout.states
        self.states = whole[: layout.geometry.blocks]
        self.pins = whole[layout.pins - base :][: layout.geometry.blocks]
        self.notes = whole[layout.notes - base :][: layout.geometry.blocks]
        self.recipe = whole[layout.recipe - base :][: layout.recipe_length].toreadonly()
        self.errors = ErrorLog(whole[layout.errors - base :][: errors.LENGTH])
        self.words = whole[layout.words - base :].cast("Q")

    @classmethod
    def attach(cls, fd: int) -> Ledger:
        """Map the ledger of a region from its memfd alone.

        Raises:
            ValueError: if the descriptor is not a region's memfd.
            KernelError: if it cannot be mapped.
        """
        words = read_words(fd)
        geometry = Geometry(words[W_SIZE], words[W_BLOCK_SIZE])
        return cls(fd, Layout(geometry, words[W_RECIPE_LENGTH]))

    def snapshot(self) -> bytes:
        """Return a copy of all states. Reads only pages that are there: to read a hole would allocate it.

        Where there is swap, all are read: mincore(2) cannot tell a page that is swapped out from a hole.
        """
        if process.swap_in_use():
            return bytes(self.states)
        pages = memory.mincore(self._address, round_up(self.geometry.blocks, PAGE_SIZE))
        if not any(pages):
            return bytes(self.geometry.blocks)
        parts = (self.states[i * PAGE_SIZE : (i + 1) * PAGE_SIZE] for i in range(len(pages)))
        return b"".join(bytes(part) if there else bytes(len(part)) for part, there in zip(parts, pages, strict=True))

    def let_go(self) -> None:
        """Let go of the memfd: zeros take its place, so that a thread which is just using a view meets those."""
        flags = memory.MAP_PRIVATE | memory.MAP_ANONYMOUS | abi.MAP_NORESERVE | abi.MAP_FIXED
        memory.map_memory(self._length, flags=flags, address=self._address)

    def occupied(self, fd: int) -> list[tuple[int, int]]:
        """Runs of blocks `(first, stop)` whose state bytes have ever been written; reads no page that is not there."""
        base, blocks = self.geometry.length, self.geometry.blocks
        extents = memfd.data_extents(fd, base, base + round_up(blocks, PAGE_SIZE))
        return [(start - base, min(end - base, blocks)) for start, end in extents if start - base < blocks]
