"""What a region has done so far, as `Region.stats()` reports it."""

from __future__ import annotations

from dataclasses import dataclass

from userfault.blocks import ledger as book
from userfault.pager import failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from userfault.blocks.ledger import Ledger
    from userfault.errors import StoreError


@dataclass(frozen=True, slots=True)
class Latency:
    """How long something took: faults, from the pager's reading of the message until the thread was let go; or writes.

    `buckets` are `(upper bound in nanoseconds, how many)`, four an octave, empty ones left out; the last bound holds
    everything above it too.  What the kernel needs to stop and to wake the thread is not in it.
    """

    buckets: tuple[tuple[int, int], ...]

    @property
    def count(self) -> int:
        """How many there were."""
        return sum(count for _, count in self.buckets)

    def percentile(self, percent: float) -> float:
        """Return the latency in seconds that `percent` of the faults did not exceed; 0.0 if there were none.

        Raises:
            ValueError: if `percent` is not between 0 and 100.
        """
        if not 0 <= percent <= 100:
            raise ValueError(f"percent must be between 0 and 100, got {percent!r}")
        wanted, seen = self.count * percent / 100, 0
        for bound, count in self.buckets:
            seen += count
            if seen >= wanted:
                return bound / 1e9
        return 0.0


@dataclass(frozen=True, slots=True)
class RegionStats:
    """Counters of one region since it was opened, and its state now. Sizes are in bytes.

    A worker that is killed takes at most half a second of counts with it.
    """

    faults: int
    """Faults that were answered: blocks brought in for a touch, and first writes to a block."""
    blocks_filled: int
    """Blocks brought in, by touch or by request."""
    bytes_read: int
    bytes_written: int
    """Written back, in mode `r+`."""
    resident_bytes: int
    dirty_bytes: int
    """Changed in mode `r+` and not yet written back; whole blocks."""
    private_bytes: int
    """Changed in mode `c`."""
    pinned_bytes: int
    evictions: int
    """Blocks dropped from memory."""
    refaults: int
    """Blocks brought in that had been dropped before."""
    retries: int
    """Reads that failed and were tried again."""
    failures: int
    """Blocks that the store could not give, however often it was asked."""
    errors: tuple[StoreError, ...]
    """Why: the last 32 of them, oldest first."""
    duplicates: int
    """Messages about a block that was on its way already."""
    latency: Latency
    write_latency: Latency
    """How long the store took for each write, in mode `r+`."""
    placement: str
    """`"following"` while the pager's fault loop is held on the core of the thread that faults, else `"free"`."""
    worker_cpu: int | None
    """That core; None while it is free."""


def read_errors(ledger: Ledger) -> tuple[StoreError, ...]:
    """Read what a region's stores have said last, oldest first."""
    if not ledger.words[book.W_ERRORS]:  # to look would allocate the memory for them
        return ()
    return tuple(failure.decode(text) for _, text in ledger.errors.recent())


def _read_latency(words: memoryview, start: int) -> Latency:
    counts = words[start : start + book.BUCKETS].tolist()
    return Latency(tuple((bound, n) for bound, n in zip(book.BOUNDS, counts, strict=True) if n))


def read_stats(ledger: Ledger, pinned_blocks: int) -> RegionStats:
    """Read a region's counters from its ledger."""
    words = ledger.words
    cpu = words[book.CPU]
    following = cpu < 1 << 16
    size, block_size = ledger.geometry.size, ledger.geometry.block_size
    return RegionStats(
        faults=words[book.FAULTS],
        blocks_filled=words[book.FILLED],
        bytes_read=words[book.BYTES_READ],
        bytes_written=words[book.BYTES_WRITTEN],
        resident_bytes=min(words[book.RESIDENT], size),
        dirty_bytes=min(words[book.DIRTY], size),
        private_bytes=min(words[book.PRIVATE], size),
        pinned_bytes=min(pinned_blocks * block_size, size),
        evictions=words[book.EVICTIONS],
        refaults=words[book.REFAULTS],
        retries=words[book.RETRIES],
        failures=words[book.FAILURES],
        errors=read_errors(ledger),
        duplicates=words[book.DUPLICATES],
        latency=_read_latency(words, book.HISTOGRAM),
        write_latency=_read_latency(words, book.WRITES),
        placement="following" if following else "free",
        worker_cpu=cpu if following else None,
    )
