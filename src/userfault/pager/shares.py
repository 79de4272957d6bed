"""The budget of a whole pager, and how its regions share it.

A region is granted memory piece by piece, as it fills.  When all is granted, a region that wants more gets a piece from
one of the *richest*, if that has a good deal more than itself; otherwise it has to do with what it has, and drop its
own blocks.  So one that merely scans a large file grows until it is one of the richest, and from then on takes from
itself; and what another has, and uses, is left alone as long as it is less.

Nothing here depends on the number of regions: they stand in classes by the power of two of what they have.
"""

from __future__ import annotations

from threading import Lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from userfault.pager.room import Room

PIECES = 1 << 12
"""Into how many pieces a budget is divided, as far as they hold what one instruction may need."""
MOST_PIECE = 4 << 20
UNLIMITED = 1 << 62


class Shares:
    """The budget of one pager. Any thread of the worker may call it."""

    def __init__(self) -> None:
        self.total = UNLIMITED
        """Bytes."""
        self.granted = 0
        self._classes: list[dict[Room, None]] = [{} for _ in range(64)]
        self._lock = Lock()

    def piece(self, least: int) -> int:
        """Return how many bytes are granted at once."""
        return max(min(self.total // PIECES, MOST_PIECE), least)

    def grow(self, room: Room, size: int) -> bool:
        """Grant a region some more, if so much is left."""
        with self._lock:
            if self.granted + size > self.total:
                return False
            self._move(room, room.granted + size)
            return True

    def give(self, room: Room, size: int) -> None:
        """Grant a region some more, or less, whatever is left."""
        with self._lock:
            self._move(room, max(0, room.granted + size))

    def overdrawn(self) -> bool:
        """Whether more is granted than the budget has, since that was made smaller."""
        return self.granted > self.total

    def richest(self) -> Room | None:
        """Return one of those that have most, another one each time."""
        with self._lock:
            for rooms in reversed(self._classes):
                if rooms:
                    room = next(iter(rooms))
                    del rooms[room]
                    rooms[room] = None
                    return room
            return None

    def _move(self, room: Room, granted: int) -> None:
        self._classes[room.granted.bit_length()].pop(room, None)
        self.granted += granted - room.granted
        room.granted = granted
        if granted:
            self._classes[granted.bit_length()][room] = None
