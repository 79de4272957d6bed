"""Stores with bytes that follow from their offset, and a store that keeps a record of its reads."""

from __future__ import annotations

import os

from userfault.stores.base import Store, check_range

__all__ = ["CountingStore", "PatternStore", "RecipeStore"]

_PAGE = 4096  # of the pattern; not the kernel's
_WORDS = _PAGE // 8
_MASK = (1 << 64) - 1
_ONES = int.from_bytes((1).to_bytes(8, "little") * _WORDS, "little")  # multiplies a word to all words of a page


def _mix(number: int) -> int:
    """Return 64 bits in which every bit of a number counts (the finalizer of splitmix64)."""
    number = (number + 0x9E3779B97F4A7C15) & _MASK
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _MASK
    return number ^ (number >> 31)


class RecipeStore(Store):
    """A store that is what its arguments say: equal to one with the same arguments, pickled with them."""

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash((type(self), self.size))


class PatternStore(RecipeStore):
    """Bytes that follow from their offset: nothing is stored, and a test knows what must be where.

    No page equals another, nor does a page shifted by a word. Any thread; nothing to close; unharmed by fork.

    Args:
        size: Bytes; terabytes are as good as kilobytes.
        seed: Another seed, other bytes.
        concurrency: 0 to be called in the fault loop.

    Example:
        >>> store = PatternStore(1 << 40)
        >>> buffer = bytearray(100)
        >>> store.read_into(1 << 39, memoryview(buffer))
        >>> buffer == store.expected(1 << 39, 100)
        True
    """

    def __init__(self, size: int, seed: int = 0, concurrency: int = 8) -> None:
        self.size, self.seed, self.concurrency = size, seed, concurrency
        self._tile = self._make_tile()

    def _make_tile(self) -> int:
        words = (_mix(_mix(self.seed) + number).to_bytes(8, "little") for number in range(_WORDS))
        return int.from_bytes(b"".join(words), "little")

    def expected(self, offset: int, length: int) -> bytes:
        """Return what must be there; 1 µs for a kilobyte."""
        first, last = offset // _PAGE, (offset + max(length, 1) - 1) // _PAGE
        pages = b"".join(self._page(number) for number in range(first, last + 1))
        skipped = offset - first * _PAGE
        return pages[skipped : skipped + length]

    def _page(self, number: int) -> bytes:
        return (self._tile ^ (_mix(number ^ (self.seed << 1)) * _ONES)).to_bytes(_PAGE, "little")

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Compute the bytes.

        Raises:
            ValueError: The range is not in the store.
        """
        check_range(self, offset, buffer.nbytes)
        buffer[:] = self.expected(offset, buffer.nbytes)

    def read_now(self, offset: int, buffer: memoryview) -> bool:
        """Compute the bytes: that is no waiting, if the store counts as memory (``concurrency=0``)."""
        if self.concurrency:
            return False
        self.read_into(offset, buffer)
        return True

    def describe(self) -> str:
        """Return the arguments."""
        return f"{type(self).__name__}(size={self.size}, seed={self.seed})"


class CountingStore(RecipeStore):
    """A store that writes down every read, so that a test can see what the pager asked for.

    Args:
        inner: The store that has the bytes.
        log: A file, to which each read adds a line; it need not exist.
    """

    def __init__(self, inner: Store, log: str | os.PathLike[str]) -> None:
        self.inner, self.log = inner, os.fspath(log)
        self.size, self.concurrency = inner.size, inner.concurrency

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Write the read down, then pass it on."""
        fd = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            os.write(fd, f"{offset} {buffer.nbytes}\n".encode())  # one write: lines of two threads do not mix
        finally:
            os.close(fd)
        self.inner.read_into(offset, buffer)

    def reads(self) -> list[tuple[int, int]]:
        """Return offset and length of each read so far, by any process."""
        try:
            with open(self.log, encoding="ascii") as file:
                return [(int(offset), int(length)) for offset, length in map(str.split, file)]
        except FileNotFoundError:
            return []

    def close(self) -> None:
        """Close the inner store."""
        self.inner.close()

    def describe(self) -> str:
        """Return the type and the inner store."""
        return f"CountingStore({self.inner.describe()})"
