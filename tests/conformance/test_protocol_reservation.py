"""Reservations: terabytes of addresses, of which pieces become marked memory."""

from __future__ import annotations

import errno
import gc
import re
from typing import TYPE_CHECKING

import numpy as np
import pytest
from tests.conformance.protocol_tools import (
    SEGV_ACCERR,
    kernel_errno,
    page_of,
    sigbus,
    sigsegv,
    there,
    waiters,
)

from userfault import Reservation
from userfault.kernel import maps, process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conformance.protocol_tools import Stage

    from userfault import Piece
    from userfault.protocol import Descriptor

TIB = 1 << 40


@pytest.fixture
def reservation(stage: Stage) -> Iterator[Reservation]:  # after the stage: what waits in a piece is let go before
    with Reservation(TIB) as reservation:
        yield reservation


def mappings(start: int, size: int) -> int:
    """Count the mappings in a range."""
    return sum(start <= entry.start and entry.end <= start + size for entry in maps.read_maps())


def forgotten_piece(size: int, descriptor: Descriptor | None = None) -> Piece:
    """Return a piece of a reservation that nobody else knows."""
    return Reservation(TIB).piece(size, descriptor)


def forbidden(address: int) -> object:
    """Return what comes of touching addresses that are reserved and no more."""
    return sigsegv(address, SEGV_ACCERR)


# -- addresses -----------------------------------------------------------------------------------------------------


def test_64_tebibytes_are_reserved_and_cost_nothing(stage: Stage) -> None:
    descriptor = stage.descriptor()
    with Reservation(64 * TIB) as reservation:
        last = reservation.piece(stage.page, descriptor, address=reservation.address + 64 * TIB - stage.page)
        middle = reservation.piece(stage.page, descriptor, address=reservation.address + 32 * TIB)
        touches = stage.start_reads(descriptor, [last.address, middle.address + 5])
        for _ in touches:
            stage.answer(descriptor, stage.fault(descriptor), 7)

        assert [touch.result() for touch in touches] == [there(7), there(7)]
        assert reservation.size == 64 * TIB


def test_a_size_is_rounded_up_to_whole_pages(stage: Stage) -> None:
    with Reservation(1) as small, Reservation(stage.page + 1) as large:
        assert (small.size, large.size) == (stage.page, 2 * stage.page)
        assert small.piece(1).size == stage.page


@pytest.mark.parametrize("size", [0, -1])
def test_a_reservation_has_a_size(size: int) -> None:
    with pytest.raises(ValueError, match="at least one byte"):
        Reservation(size)


@pytest.mark.parametrize("size", [129 * TIB, 1 << 62, 1 << 64, 1 << 70])
def test_more_addresses_than_there_are_is_enomem(size: int) -> None:
    assert kernel_errno(Reservation, size) == errno.ENOMEM


def test_a_touch_outside_a_piece_is_sigsegv(stage: Stage, reservation: Reservation) -> None:
    start = reservation.address
    piece = reservation.piece(stage.page, address=start + stage.page)

    assert [stage.read(start), stage.write(start)] == [forbidden(start), forbidden(start)]
    assert stage.read(start + 2 * stage.page) == forbidden(start + 2 * stage.page)
    assert stage.read(start + TIB - 1) == forbidden(start + TIB - 1)
    assert stage.read(piece.address) == sigbus(piece.address)


# -- pieces --------------------------------------------------------------------------------------------------------


def test_a_piece_has_no_zeros(stage: Stage, reservation: Reservation) -> None:
    descriptor = stage.descriptor()
    alone, served = reservation.piece(stage.page), reservation.piece(2 * stage.page, descriptor)

    (touch,) = stage.start_reads(descriptor, [served.address + 9])
    assert stage.fault(descriptor) == served.address + 9
    stage.answer(descriptor, served.address, 7)
    assert touch.result() == there(7)
    assert [stage.read(alone.address), stage.write(alone.address)] == [sigbus(alone.address)] * 2
    descriptor.register((alone.address, alone.size))
    descriptor.place(alone.address, page_of(8))
    assert stage.read(alone.address) == there(8)


def test_pieces_are_given_out_from_the_bottom_side_by_side(stage: Stage, reservation: Reservation) -> None:
    page = stage.page
    first, second, third = reservation.piece(page), reservation.piece(3 * page), reservation.piece(page)
    assert [piece.address - reservation.address for piece in (first, second, third)] == [0, page, 4 * page]
    assert reservation.pieces == [first, second, third]

    second.close()
    large, small, rest = reservation.piece(4 * page), reservation.piece(page), reservation.piece(2 * page)

    assert [piece.address - reservation.address for piece in (small, rest, large)] == [page, 2 * page, 5 * page]
    assert reservation.pieces == [first, small, rest, third, large]


def test_pieces_that_are_alike_are_one_mapping(stage: Stage, reservation: Reservation) -> None:
    descriptor = stage.descriptor()
    before = mappings(reservation.address, reservation.size)

    for _ in range(100):
        reservation.piece(stage.page, descriptor)

    assert mappings(reservation.address, reservation.size) == before + 1
    assert len(descriptor.ranges) == 1


def test_a_thousand_pieces_of_two_descriptors_in_turn(stage: Stage, reservation: Reservation) -> None:
    descriptors = stage.descriptor(), stage.descriptor()
    pieces = [reservation.piece(stage.page, descriptors[place % 2]) for place in range(1000)]

    assert [len(descriptor.ranges) for descriptor in descriptors] == [500, 500]
    touched = [pieces[place] for place in (0, 1, 500, 501, 998, 999)]
    touches = [stage.start_reads(descriptors[place % 2], [piece.address])[0] for place, piece in enumerate(touched)]
    for parity, descriptor in enumerate(descriptors):
        assert stage.faults(descriptor, 3) == [piece.address for piece in touched[parity::2]]
        for piece in touched[parity::2]:
            stage.answer(descriptor, piece.address, parity + 1)
    assert [touch.result() for touch in touches] == [there(1), there(2)] * 3

    descriptors[0].close()

    assert stage.read(pieces[2].address) == sigbus(pieces[2].address)
    assert stage.read(pieces[0].address) == there(1)
    (touch,) = stage.start_reads(descriptors[1], [pieces[3].address])
    assert touch.waiting


def test_a_closed_piece_is_forbidden_and_its_pages_are_gone(stage: Stage, reservation: Reservation) -> None:
    descriptor = stage.descriptor()
    first, last = reservation.piece(2 * stage.page, descriptor), reservation.piece(stage.page, descriptor)
    address = first.address
    descriptor.place(address, page_of(7) * 3)

    first.close()
    first.close()

    assert (first.closed, last.closed) == (True, False)
    assert [stage.read(address), stage.read(last.address)] == [forbidden(address), there(7)]
    assert descriptor.ranges == [(last.address, last.address + stage.page)]
    again = reservation.piece(stage.page)
    assert again.address == address
    assert stage.read(address) == sigbus(address)


def test_a_thread_that_waits_in_a_piece_is_let_go_when_it_is_closed(stage: Stage, reservation: Reservation) -> None:
    descriptor = stage.descriptor()
    piece = reservation.piece(2 * stage.page, descriptor)
    touches = stage.start_reads(descriptor, [piece.address, piece.address + stage.page])
    stage.fault(descriptor)

    piece.close()

    assert [touch.result() for touch in touches] == [
        forbidden(piece.address),
        forbidden(piece.address + stage.page),
    ]
    assert (waiters(descriptor), descriptor.ranges) == ((0, 0), [])


def test_a_thread_that_waits_is_let_go_when_the_reservation_is_closed(stage: Stage) -> None:
    descriptor, reservation = stage.descriptor(), Reservation(TIB)
    piece = reservation.piece(2 * stage.page, descriptor)
    touches = stage.start_reads(descriptor, [piece.address, piece.address + stage.page])
    stage.fault(descriptor)

    reservation.close()
    reservation.close()

    assert [touch.result() for touch in touches] == [sigsegv(piece.address), sigsegv(piece.address + stage.page)]
    assert (reservation.closed, piece.closed, reservation.pieces, descriptor.ranges) == (True, True, [], [])


def test_pieces_and_reservations_are_context_managers(stage: Stage) -> None:
    with Reservation(TIB) as reservation, reservation.piece(stage.page) as piece:
        assert repr(piece) == f"<Piece [{piece.address:#x}, {piece.address + stage.page:#x})>"
        assert repr(reservation) == f"<Reservation [{piece.address:#x}, {piece.address + TIB:#x}) 1 pieces>"

    assert (piece.closed, reservation.closed) == (True, True)
    assert repr(piece).endswith(") closed>")
    assert process.userfaultfds() == []


def test_a_forgotten_reservation_is_warned_about_and_closed() -> None:
    reservation = Reservation(TIB)
    start = reservation.address

    with pytest.warns(ResourceWarning, match=r"<Reservation \[0x[0-9a-f]+, 0x[0-9a-f]+\) 0 pieces> was never closed"):
        del reservation

    assert mappings(start, TIB) == 0


def test_a_forgotten_reservation_with_pieces_is_closed_with_them(stage: Stage) -> None:
    start = forgotten_piece(stage.page).address

    with pytest.warns(ResourceWarning, match="1 pieces> was never closed"):
        gc.collect()  # the reservation and its pieces know each other

    assert mappings(start, TIB) == 0
    assert process.userfaultfds() == []


# -- mistakes ------------------------------------------------------------------------------------------------------


def test_a_place_that_is_not_free_is_refused_and_nothing_is_changed(stage: Stage, reservation: Reservation) -> None:
    start, page = reservation.address, stage.page
    taken = reservation.piece(2 * page, address=start + 2 * page)
    wrong = [
        *((page, start + 2 * page), (page, start + 3 * page), (4 * page, start), (3 * page, start + page)),
        *((page, start + 1), (page, start - page), (page, start + TIB), (2 * page, start + TIB - page)),
        *((0, start), (-page, start), (TIB, start + page), (page, 0), (page, -page)),
    ]

    for size, address in wrong:
        with pytest.raises(ValueError, match=re.escape("whole pages inside") + "|overlap with"):
            reservation.piece(size, address=address)

    assert reservation.pieces == [taken]
    assert stage.read(start) == forbidden(start)
    assert reservation.piece(2 * page, address=start).address == start


def test_no_room_is_refused(stage: Stage) -> None:
    with Reservation(4 * stage.page) as reservation:
        with pytest.raises(ValueError, match="no room for"):
            reservation.piece(5 * stage.page)
        first, _ = reservation.piece(stage.page), reservation.piece(3 * stage.page)
        with pytest.raises(ValueError, match="no room for"):
            reservation.piece(1)
        first.close()
        assert reservation.piece(1).address == reservation.address
        for size in (0, -1):
            with pytest.raises(ValueError, match="at least one byte"):
                reservation.piece(size)


def test_a_closed_descriptor_is_refused_and_nothing_is_changed(stage: Stage, reservation: Reservation) -> None:
    descriptor = stage.descriptor()
    descriptor.close()

    assert kernel_errno(reservation.piece, stage.page, descriptor) == errno.EBADF

    assert (reservation.pieces, process.userfaultfds()) == ([], [])
    assert stage.read(reservation.address) == forbidden(reservation.address)
    assert reservation.piece(stage.page).address == reservation.address


def test_a_closed_reservation_gives_no_pieces(stage: Stage) -> None:
    reservation = Reservation(TIB)
    reservation.close()

    with pytest.raises(ValueError, match="is closed"):
        reservation.piece(stage.page)


# -- views ---------------------------------------------------------------------------------------------------------


def test_a_piece_is_memory(stage: Stage, reservation: Reservation) -> None:
    descriptor = stage.descriptor()
    piece = reservation.piece(2 * stage.page, descriptor)
    descriptor.place(piece.address, page_of(7) * 2)

    with piece.memory as view:
        assert (view.format, view.nbytes, view.readonly) == ("B", 2 * stage.page, False)
        view[1] = 9
        assert bytes(view[:3]) == b"\7\11\7"


@pytest.mark.parametrize("kind", ["view", "slice", "array", "part of an array", "cast"])
def test_whatever_was_made_of_a_view_keeps_the_piece(stage: Stage, reservation: Reservation, kind: str) -> None:
    piece = reservation.piece(stage.page)
    ways: dict[str, Callable[[], object]] = {
        "view": lambda: piece.memory,
        "slice": lambda: piece.memory[8:16],
        "array": lambda: np.frombuffer(piece.memory, "u1"),
        "part of an array": lambda: np.frombuffer(piece.memory, "<u4")[2:].reshape(2, -1),
        "cast": lambda: piece.memory.cast("Q"),
    }
    made = ways[kind]()

    with pytest.raises(BufferError, match="a view of"):
        piece.close()
    with pytest.raises(BufferError, match="views of 1 pieces"):
        reservation.close()
    assert (piece.exported, piece.closed, reservation.closed) == (True, False, False)
    assert stage.read(piece.address) == sigbus(piece.address)

    del made
    piece.close()
    with pytest.raises(ValueError, match="the piece is closed"):
        piece.memory  # noqa: B018  # the attribute is the call


def test_only_views_that_are_alive_count(stage: Stage, reservation: Reservation) -> None:
    piece = reservation.piece(stage.page)

    for _ in range(1000):
        with piece.memory:
            assert piece.exported

    assert not piece.exported
    piece.close()


def test_a_view_keeps_the_reservation_of_which_nothing_else_is_left(stage: Stage) -> None:
    descriptor = stage.descriptor()
    view = forgotten_piece(stage.page, descriptor).memory
    start, _ = descriptor.ranges[0]
    descriptor.place(start, page_of(7))
    gc.collect()

    assert view[5] == 7
    del view
    with pytest.warns(ResourceWarning, match="1 pieces> was never closed"):
        gc.collect()
    assert descriptor.ranges == []
    assert mappings(start, TIB) == 0
