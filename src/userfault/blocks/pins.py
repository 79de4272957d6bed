"""Pins: a count per block, in the ledger, that keeps the block in memory.

The application is their only writer.  A pin stands in shared memory before anything is asked for, the worker looks at
it before it drops a block and once more after it has said so; that is all the protocol there is, and it survives any
number of workers.  A count is a byte, so a block can be pinned 255 times at once.
"""

from __future__ import annotations

from threading import Lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from userfault.blocks.ledger import Ledger

MOST = 255
_STEP = 1 << 16
_MORE = bytes(min(i + 1, MOST) for i in range(256))
_LESS = bytes(max(i - 1, 0) for i in range(256))


class Pins:
    """The pins of one region. Any thread may call it."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._lock = Lock()
        self.blocks = 0
        """How many blocks are pinned."""

    def add(self, first: int, stop: int, most: int) -> None:
        """Pin a range of blocks once more; `most` blocks may be pinned together.

        Raises:
            ValueError: if that would be more than `most`, or one block more than 255 times. Nothing is changed then.
        """
        with self._lock:
            fresh = sum(bytes(part).count(0) for part in self._parts(first, stop))
            if self.blocks + fresh > most:
                raise ValueError(f"{self.blocks + fresh} blocks would be pinned at once, and the budget holds {most}")
            if any(MOST in part for part in self._parts(first, stop)):
                raise ValueError(f"a block between {first} and {stop} is pinned {MOST} times already")
            self._translate(first, stop, _MORE)
            self.blocks += fresh

    def remove(self, first: int, stop: int) -> None:
        """Take one pin of each block of a range away."""
        with self._lock:
            self._translate(first, stop, _LESS)
            self.blocks -= sum(bytes(part).count(0) for part in self._parts(first, stop))

    def _parts(self, first: int, stop: int) -> list[memoryview]:
        pins = self._ledger.pins
        return [pins[at : min(at + _STEP, stop)] for at in range(first, stop, _STEP)]

    def _translate(self, first: int, stop: int, table: bytes) -> None:
        for part in self._parts(first, stop):
            part[:] = bytes(part).translate(table)
