"""The record of an exported descriptor: what must outlive a worker, and what the application may look at.

One page of memory in a memfd of its own, mapped by the application and the worker: 64-bit words, and the last refusal
in words.  The application writes the first few once; the rest is the worker's.
"""

from __future__ import annotations

import os

from userfault.kernel import memfd, memory

MAGIC = 0x3131304C41544F  # any constant does
W_MAGIC, W_ID, W_ADDRESS, W_SIZE, W_OFFSET = range(5)
# The conversation: written before what it tells of is done (see `outlet`).
W_STATE, W_VERSION, W_RENEWED = range(8, 11)
# For the application to look at.
W_PENDING, W_TOTAL, W_ANSWERED, W_REFUSED, W_REFUSAL_LENGTH = range(16, 21)
_TEXT = 1024
SIZE = memory.PAGE_SIZE


class Record:
    """A mapping of one. `words` is a memoryview of 64-bit words, good until this object is gone."""

    __slots__ = ("_address", "_whole", "words")

    def __init__(self, fd: int) -> None:
        self._address = memory.map_memory(SIZE, fd=fd)
        self._whole = memory.view(self._address, SIZE)
        self.words = self._whole.cast("Q")

    @classmethod
    def create(cls, identity: int, address: int, size: int, offset: int) -> tuple[int, Record]:
        """Make one; return its descriptor as well, which travels to the pager.

        Raises:
            KernelError: EMFILE, ENOMEM.
        """
        fd = memfd.create("userfault-export", SIZE)
        try:
            record = cls(fd)
        except BaseException:
            os.close(fd)
            raise
        for word, value in {W_ID: identity, W_ADDRESS: address, W_SIZE: size, W_OFFSET: offset, W_MAGIC: MAGIC}.items():
            record.words[word] = value
        return fd, record

    def refuse(self, text: str) -> None:
        """Note that something the pager wrote was refused, and why."""
        data = text.encode()[: SIZE - _TEXT]
        self.words[W_REFUSAL_LENGTH] = 0
        self._whole[_TEXT : _TEXT + len(data)] = data
        self.words[W_REFUSAL_LENGTH] = len(data)
        self.words[W_REFUSED] += 1

    def refusal(self) -> str:
        """Return why something was refused last; empty if nothing was."""
        return bytes(self._whole[_TEXT : _TEXT + self.words[W_REFUSAL_LENGTH]]).decode(errors="replace")

    def __del__(self) -> None:
        address, self._address = getattr(self, "_address", 0), 0
        if address:
            memory.unmap(address, SIZE)
