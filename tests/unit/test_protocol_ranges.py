"""The map from ranges to values, against a list with one value for each address."""

from __future__ import annotations

from itertools import pairwise
from operator import eq

import pytest
from hypothesis import given
from hypothesis import strategies as st

from userfault.protocol.ranges import RangeMap

TOP = 24
VALUES = [None, "a", "b", "c"]
RANGES = st.tuples(st.integers(0, TOP), st.integers(0, TOP)).filter(lambda pair: pair[0] < pair[1])
CHANGES = st.lists(st.tuples(RANGES, st.sampled_from(VALUES)), max_size=30)


def never(_one: str, _other: str) -> bool:
    return False


def fill(changes: list[tuple[tuple[int, int], str | None]]) -> tuple[RangeMap[str], list[str | None]]:
    """Make the same changes to a map and to the model."""
    ranges = RangeMap[str](eq)
    model: list[str | None] = [None] * TOP
    for (start, end), value in changes:
        ranges.replace(start, end, value)
        model[start:end] = [value] * (end - start)
    return ranges, model


def spelled(ranges: RangeMap[str]) -> list[str | None]:
    """Write a map as the model."""
    model: list[str | None] = [None] * TOP
    for start, end, value in ranges:
        model[start:end] = [value] * (end - start)
    return model


def runs(model: list[str | None]) -> list[tuple[int, int, str]]:
    """Return what the model holds as the fewest pieces."""
    pieces: list[tuple[int, int, str]] = []
    for at, value in enumerate(model):
        if value is None:
            continue
        if pieces and pieces[-1][1:] == (at, value):
            pieces[-1] = (pieces[-1][0], at + 1, value)
        else:
            pieces.append((at, at + 1, value))
    return pieces


@given(CHANGES)
def test_it_holds_what_a_list_would_in_the_fewest_pieces(changes: list[tuple[tuple[int, int], str | None]]) -> None:
    ranges, model = fill(changes)

    assert list(ranges) == runs(model)
    assert len(ranges) == len(runs(model))


@given(CHANGES)
def test_without_anything_alike_it_holds_the_same_in_more_pieces(
    changes: list[tuple[tuple[int, int], str | None]],
) -> None:
    _, model = fill(changes)
    ranges = RangeMap[str](never)
    for (start, end), value in changes:
        ranges.replace(start, end, value)

    assert spelled(ranges) == model
    assert all(start < end for start, end, _ in ranges)
    assert all(one[1] <= other[0] for one, other in pairwise(ranges))


@given(CHANGES, RANGES)
def test_pieces_are_the_range_cut_where_values_change(
    changes: list[tuple[tuple[int, int], str | None]], span: tuple[int, int]
) -> None:
    ranges, model = fill(changes)

    pieces = ranges.pieces(*span)

    assert (pieces[0][0], pieces[-1][1]) == span
    assert all(one[1] == other[0] and one[2] != other[2] for one, other in pairwise(pieces))
    assert [value for start, end, value in pieces for _ in range(start, end)] == model[slice(*span)]


@given(CHANGES, RANGES)
def test_looking_changes_nothing(changes: list[tuple[tuple[int, int], str | None]], span: tuple[int, int]) -> None:
    ranges, _ = fill(changes)
    before = list(ranges)

    ranges.pieces(*span)

    assert list(ranges) == before


@given(CHANGES, RANGES, st.sampled_from(VALUES))
def test_to_replace_each_piece_is_to_replace_the_range(
    changes: list[tuple[tuple[int, int], str | None]], span: tuple[int, int], value: str | None
) -> None:
    one, _ = fill(changes)
    other, _ = fill(changes)

    one.replace(*span, value)
    for start, end, _ in other.pieces(*span):
        other.replace(start, end, value)

    assert list(one) == list(other)


def test_an_empty_map() -> None:
    ranges = RangeMap[str](eq)

    assert (list(ranges), len(ranges)) == ([], 0)
    assert ranges.pieces(3, 7) == [(3, 7, None)]
    ranges.replace(3, 7, None)
    assert len(ranges) == 0


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)])
def test_neighbours_that_are_alike_are_joined_in_any_order(order: tuple[int, ...]) -> None:
    ranges = RangeMap[str](eq)

    for place in order:
        ranges.replace(10 * place, 10 * place + 10, "a")

    assert list(ranges) == [(0, 30, "a")]


def test_of_values_that_are_alike_the_lower_one_stays() -> None:
    ranges = RangeMap[str](lambda one, other: one.lower() == other.lower())

    ranges.replace(10, 20, "A")
    ranges.replace(0, 10, "a")
    ranges.replace(20, 30, "A")

    assert list(ranges) == [(0, 30, "a")]


def test_it_may_be_changed_while_it_is_walked_through() -> None:
    ranges = RangeMap[str](eq)
    ranges.replace(0, 10, "a")
    ranges.replace(10, 20, "b")

    for start, end, _ in ranges:
        ranges.replace(start, end, None)

    assert len(ranges) == 0


def test_addresses_may_be_as_large_as_there_are() -> None:
    top = (1 << 64) - 4096
    ranges = RangeMap[str](eq)

    ranges.replace(0, top, "a")
    ranges.replace(1 << 63, (1 << 63) + 4096, None)

    assert list(ranges) == [(0, 1 << 63, "a"), ((1 << 63) + 4096, top, "a")]
