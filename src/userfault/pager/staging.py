"""Memory into which a store writes a block before the application sees any of it."""

from __future__ import annotations

import mmap

from userfault.blocks.geometry import PAGE_SIZE
from userfault.kernel import memory


class Staging:
    """Memory of one thread."""

    __slots__ = ("_map", "address", "view")

    def __init__(self, length: int) -> None:
        self._map = mmap.mmap(-1, length)
        self.view = memoryview(self._map)
        self.address = memory.address_of(self._map)

    def padded(self, length: int) -> int:
        """Return the address, once everything from `length` to the end of its page is zero."""
        rest = -length % PAGE_SIZE
        if rest:
            self.view[length : length + rest] = bytes(rest)
        return self.address
