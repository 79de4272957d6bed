"""The budget of a pager: granted piece by piece, taken from the rich."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest

from userfault.pager.shares import MOST_PIECE, PIECES, Shares

if TYPE_CHECKING:
    from userfault.pager.room import Room


class Holder:
    """What `Shares` knows of a room."""

    def __init__(self) -> None:
        self.granted = 0


def holders(count: int) -> list[Room]:
    return [cast("Room", Holder()) for _ in range(count)]


def shares_of(total: int) -> Shares:
    shares = Shares()
    shares.total = total
    return shares


def test_no_more_is_granted_than_there_is() -> None:
    shares, (one, two) = shares_of(100), holders(2)
    assert shares.grow(one, 60)
    assert not shares.grow(two, 60)
    assert shares.grow(two, 40)
    assert (one.granted, two.granted, shares.granted) == (60, 40, 100)
    assert not shares.overdrawn()
    shares.total = 99
    assert shares.overdrawn()
    shares.give(one, -60)
    assert (one.granted, shares.granted) == (0, 40)
    assert not shares.overdrawn()


def test_the_richest_take_turns() -> None:
    shares, rooms = shares_of(1 << 20), holders(5)
    assert shares.richest() is None
    for room, size in zip(rooms, (10, 1000, 100, 1010, 1020), strict=True):
        assert shares.grow(room, size)
    seen = {id(shares.richest()) for _ in range(3)}
    assert seen == {id(rooms[1]), id(rooms[3]), id(rooms[4])}, "within a factor of two"
    for room in (rooms[1], rooms[3], rooms[4]):
        shares.give(room, -room.granted)
    assert shares.richest() is rooms[2]


def test_nobody_has_less_than_nothing() -> None:
    shares, (room,) = shares_of(100), holders(1)
    shares.give(room, -5)
    assert (room.granted, shares.granted) == (0, 0)


@pytest.mark.parametrize(
    ("total", "least", "piece"),
    [(1 << 20, 4096, 4096), (PIECES << 16, 4096, 1 << 16), (1 << 62, 4096, MOST_PIECE), (1 << 62, 8 << 20, 8 << 20)],
)
def test_pieces(total: int, least: int, piece: int) -> None:
    assert shares_of(total).piece(least) == piece
