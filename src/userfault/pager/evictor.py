"""The thread that drops blocks ahead of need, so that faults find room: for all regions of a worker.

It is told by a region that has passed its high watermark (`room`), and when a budget has changed.  It starts when there
is something to do, and ends when there is not.
"""

from __future__ import annotations

import os
import sys
from threading import Condition

from userfault.pager import placement
from userfault.pager.shares import Shares
from userfault.pager.uses import Uses, open_pagemap
from userfault.shield import begin

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from userfault.pager.room import Room
    from userfault.pager.served import Served
    from userfault.pager.wire import Message

IDLE_S = 5.0


class Evictor:
    """One per worker. Any thread may call it."""

    def __init__(self, pid: int, ask: Callable[[Message], None]) -> None:
        """Begin with no region. `ask` sends a message to the application, whose process is `pid`."""
        self._ask = ask
        self._pagemap = open_pagemap(pid)
        self._shares = Shares()
        self._rooms: dict[Room, None] = {}
        self._changed = Condition()
        self._running = self._sleeping = False

    def serve(self, region: Served) -> None:
        """Keep a region within its budget and the pager's; also anew, when those have changed."""
        region.uses = region.uses or Uses(region, self._ask, self._pagemap)
        region.room.join(self._shares, self.wants)
        if self._shares.overdrawn():
            self.wants(region.room)
        else:
            region.room.again()

    def wants(self, room: Room) -> None:
        """A region has passed its high watermark. Never waits for long: the fault loop calls it."""
        if room in self._rooms:
            return
        with self._changed:
            self._rooms[room] = None
            self._stir()

    def _stir(self) -> None:
        if self._sleeping:
            self._changed.notify()
        elif not self._running:
            try:
                begin(self._run)
                self._running = True
            except RuntimeError:  # no thread to be had: faults make room themselves, and the next one tries again
                self._rooms.clear()

    def _run(self) -> None:
        placement.go_home()
        try:
            while (room := self._next()) is not None:
                room.relieve()
                if room.region.uses is not None:
                    room.region.uses.look()
                self._balance()
        except BaseException as error:  # noqa: BLE001  # its blocks would be claimed for ever: let a successor recover
            sys.excepthook(type(error), error, error.__traceback__)
            os._exit(1)

    def _next(self) -> Room | None:
        with self._changed:
            if not self._rooms:
                self._sleeping = True
                self._changed.wait(IDLE_S)
                self._sleeping = False
            if not self._rooms:
                self._running = False
                return None
            room = next(iter(self._rooms))
            del self._rooms[room]
            return room

    def _balance(self) -> None:
        """Take from the richest what the pager's budget no longer has."""
        failed = 0
        while self._shares.overdrawn() and failed < 2:
            room = self._shares.richest()
            if room is None or not room.pay():
                failed += 1
