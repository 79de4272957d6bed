"""What a region's worker counts: faults by latency, blocks, bytes; and how that reaches the application.

The fault loop has a histogram of its own, a plain list that only it writes; every other thread counts under a lock.
Twice a second, and when somebody asks, the control thread adds them up and writes them into the ledger, in memory that
the application maps.  So counting costs the fault loop one list item, and counters survive the worker, but for the last
half second of one that is killed.
"""

from __future__ import annotations

from threading import Lock

from userfault.blocks import ledger as book

_END = book.WRITES + book.BUCKETS


class Counters:
    """The counters of one region."""

    __slots__ = ("_base", "_last", "_lock", "_tally", "duplicates", "histogram", "private_blocks")

    def __init__(self, words: memoryview) -> None:
        """Begin where a former worker, if any, left off."""
        self.histogram = [0] * book.BUCKETS
        """Faults that the fault loop answered itself, by latency; it alone writes this, and `duplicates`."""
        self.duplicates = 0
        self.private_blocks = 0
        self._base = words[book.COUNTERS : _END].tolist()
        self._tally = [0] * _END
        self._lock = Lock()
        self._last: tuple[object, ...] = ()

    def add(self, counter: int, amount: int = 1) -> None:
        """Count something."""
        with self._lock:
            self._tally[counter] += amount

    def filled(self, length: int) -> None:
        """Count a block of `length` bytes that was brought in by another way than the fault loop's own."""
        with self._lock:
            self._tally[book.FILLED] += 1
            self._tally[book.BYTES_READ] += length

    def became_private(self, blocks: int = 1) -> None:
        """Count a block's first write."""
        with self._lock:
            self.private_blocks += blocks

    def record(self, nanoseconds: int) -> None:
        """Count a fault that did not end in the fault loop."""
        self.add(book.HISTOGRAM + book.bucket_of(nanoseconds))

    def written(self, length: int, nanoseconds: int) -> None:
        """Count bytes that the store has taken, and how long it took."""
        with self._lock:
            self._tally[book.BYTES_WRITTEN] += length
            self._tally[book.WRITES + book.bucket_of(nanoseconds)] += 1

    def publish(self, words: memoryview, block_size: int, resident: int, dirty: int, cpu: int) -> None:
        """Write the counters into a ledger's words, if anything has changed. Called by the control thread."""
        with self._lock:
            tally = self._tally[:]
        now = (tally, sum(self.histogram), self.duplicates, self.private_blocks, resident, dirty, cpu)
        if now == self._last:
            return
        self._last = now
        self._add_inline(tally, block_size)
        for index in range(book.COUNTERS, _END):
            if tally[index]:
                words[index] = self._base[index - book.COUNTERS] + tally[index]
        words[book.RESIDENT] = resident * block_size
        words[book.PRIVATE] = self.private_blocks * block_size
        words[book.DIRTY] = dirty * block_size
        words[book.CPU] = cpu & (1 << 64) - 1

    def _add_inline(self, tally: list[int], block_size: int) -> None:
        """Add what the fault loop did: each of its faults filled one whole block."""
        inline = 0
        for bucket, count in enumerate(self.histogram[:]):
            tally[book.HISTOGRAM + bucket] += count
            inline += count
        tally[book.FILLED] += inline
        tally[book.BYTES_READ] += inline * block_size
        tally[book.FAULTS] = sum(tally[book.HISTOGRAM : book.WRITES])
        tally[book.DUPLICATES] = self.duplicates
