"""The last errors of a region, kept in its memfd: what a store said must outlive the worker that heard it.

A ring of slots, written by the worker under a lock of its own, read by the application without one.  A slot's number is
zero while the slot is being written, so a reader that finds the same number before and after has read a whole text.
The text is whatever the pager makes of an error (`userfault.pager.failure`).
"""

from __future__ import annotations

import struct

SLOTS = 32
SLOT = 1024
"""Bytes of a slot: its head, then the text."""
LENGTH = SLOTS * SLOT
_HEAD = struct.Struct("=QQQ")
MAX_TEXT = SLOT - _HEAD.size


class ErrorLog:
    """A view of the ring in `LENGTH` bytes of shared memory."""

    __slots__ = ("_view",)

    def __init__(self, view: memoryview) -> None:
        self._view = view

    def add(self, block: int, text: bytes) -> None:
        """Note why a block could not be had; the oldest error gives way. One thread at a time.

        Raises:
            ValueError: if the text is longer than `MAX_TEXT` bytes.
        """
        if len(text) > MAX_TEXT:
            raise ValueError(f"an error of {len(text)} bytes does not fit into {MAX_TEXT}")
        number = 1 + max(self._head(slot)[0] for slot in range(SLOTS))
        start = number % SLOTS * SLOT
        _HEAD.pack_into(self._view, start, 0, block, len(text))
        self._view[start + _HEAD.size : start + _HEAD.size + len(text)] = text
        _HEAD.pack_into(self._view, start, number, block, len(text))

    def recent(self) -> list[tuple[int, bytes]]:
        """Return `(block, text)` of the errors that are still known, oldest first."""
        found = []
        for slot in range(SLOTS):
            number, block, length = head = self._head(slot)
            start = slot * SLOT + _HEAD.size
            text = bytes(self._view[start : start + min(length, MAX_TEXT)])
            if number and head == self._head(slot):
                found.append((number, block, text))
        return [(block, text) for _, block, text in sorted(found)]

    def of(self, block: int) -> bytes | None:
        """Return the last error of a block, if it is still known."""
        return next((text for number, text in reversed(self.recent()) if number == block), None)

    def _head(self, slot: int) -> tuple[int, int, int]:
        number, block, length = _HEAD.unpack_from(self._view, slot * SLOT)
        return number, block, length
