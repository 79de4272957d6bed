"""Pins: a count per block, in the ledger, that keeps the block in memory.

The application is their only writer.  A pin stands in shared memory before anything is asked for, the worker looks at
it before it drops a block and once more after it has said so; that is all the protocol there is, and it survives any
number of workers.  A count is a byte, so a block can be pinned 255 times at once.

A signal handler may raise wherever a call ends or a loop comes round.  Assignments that follow one another, without a
call between them, are one step to it; so each part of a range is pinned, counted and noted in such a step, and what was
interrupted can be taken back, or gone on with.
"""

from __future__ import annotations

import contextlib
from _thread import get_ident
from collections import deque
from threading import Lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from userfault.blocks.ledger import Ledger

MOST = 255
_STEP = 1 << 16
_MORE = bytes(min(i + 1, MOST) for i in range(256))
_LESS = bytes(max(i - 1, 0) for i in range(256))


class Pin:
    """A range of blocks, to be pinned once. One thread uses it."""

    __slots__ = ("done", "first", "stop")

    def __init__(self, first: int, stop: int) -> None:
        self.first = first
        self.stop = stop
        self.done = first
        """How far it is pinned: from `first` to here."""


class Pins:
    """The pins of one region. Any thread may call it."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._lock = Lock()
        self._owner = 0
        """The thread that holds the lock."""
        self._leaving: deque[Pin] = deque()
        self.blocks = 0
        """How many blocks are pinned."""

    def add(self, pin: Pin, most: int) -> None:
        """Pin a range of blocks once more; `most` blocks may be pinned together.

        Raises:
            ValueError: if that would be more than `most`, or one block more than 255 times. Nothing is changed then.
        """
        try:
            with self._held():
                self._add(pin, most)
        finally:
            self._let_go()

    def _add(self, pin: Pin, most: int) -> None:
        fresh = sum(bytes(part).count(0) for part, _ in self._parts(pin.first, pin.stop))
        if self.blocks + fresh > most:
            raise ValueError(f"{self.blocks + fresh} blocks would be pinned at once, and the budget holds {most}")
        if any(MOST in part for part, _ in self._parts(pin.first, pin.stop)):
            raise ValueError(f"a block between {pin.first} and {pin.stop} is pinned {MOST} times already")
        for part, end in self._parts(pin.first, pin.stop):
            old = bytes(part)
            new, fresh = old.translate(_MORE), old.count(0)
            part[:] = new  # one step from here ...
            self.blocks += fresh
            pin.done = end  # ... to here

    def remove(self, pin: Pin) -> None:
        """Take one pin of each block of a range away, as far as it was pinned; twice is fine.

        The garbage collector may call this in the middle of anything, also of `add`: then it is done right after that.
        """
        self._leaving.append(pin)
        self._let_go()

    def _let_go(self) -> None:
        while self._leaving and self._owner != get_ident():
            with self._held():
                while self._leaving:
                    self._remove(self._leaving[0])
                    self._leaving.popleft()

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """Hold the lock, and be known to."""
        with self._lock:
            try:
                self._owner = get_ident()
                yield
            finally:
                self._owner = 0

    def _remove(self, pin: Pin) -> None:
        for part, end in self._parts(pin.first, pin.done):
            new = bytes(part).translate(_LESS)
            fewer = new.count(0)
            part[:] = new  # one step from here ...
            self.blocks -= fewer
            pin.first = end  # ... to here

    def _parts(self, first: int, stop: int) -> list[tuple[memoryview, int]]:
        """Return the counts of a range, piece by piece, and where each piece ends."""
        pins = self._ledger.pins
        ends = [min(at + _STEP, stop) for at in range(first, stop, _STEP)]
        return [(pins[at:end], end) for at, end in zip(range(first, stop, _STEP), ends, strict=True)]
