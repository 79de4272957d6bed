"""Which blocks a view lies in: known cases, with blocks of 100 bytes."""

from __future__ import annotations

import pytest

from userfault.arrays.extent import block_runs

CASES: dict[str, tuple[tuple[int, tuple[int, ...], tuple[int, ...], int], list[tuple[int, int]]]] = {
    # offset, shape, strides, itemsize: runs
    "an item": ((250, (), (), 8), [(2, 3)]),
    "an item across a border": ((296, (), (), 8), [(2, 4)]),
    "an item larger than blocks": ((50, (), (), 300), [(0, 4)]),
    "an item that ends at a border": ((292, (), (), 8), [(2, 3)]),
    "nothing": ((250, (0,), (8,), 8), []),
    "nothing in a dimension further out": ((250, (0, 5), (80, 8), 8), []),
    "nothing in a dimension further in": ((250, (5, 0), (80, 8), 8), []),
    "items of no size": ((250, (5,), (8,), 0), []),
    "a row": ((0, (50,), (8,), 8), [(0, 4)]),
    "a row backwards": ((392, (50,), (-8,), 8), [(0, 4)]),
    "every other item": ((0, (25,), (16,), 8), [(0, 4)]),
    "gaps as long as a block, less a byte": ((0, (3,), (107,), 8), [(0, 3)]),
    "gaps as long as a block": ((0, (3,), (108,), 8), [(0, 3)]),
    "gaps that are a block": ((92, (3,), (108,), 8), [(0, 1), (2, 4)]),
    "an item in each third block": ((0, (3,), (300,), 8), [(0, 1), (3, 4), (6, 7)]),
    "an item in each third block, backwards": ((600, (3,), (-300,), 8), [(0, 1), (3, 4), (6, 7)]),
    "a column of short rows": ((8, (20,), (40,), 8), [(0, 8)]),
    "two columns of long rows": ((1000, (3, 2), (1000, 8), 8), [(10, 11), (20, 21), (30, 31)]),
    "two columns across a border": ((1096, (3, 2), (1000, 8), 8), [(10, 12), (20, 22), (30, 32)]),
    "the same, transposed": ((1096, (2, 3), (8, 1000), 8), [(10, 12), (20, 22), (30, 32)]),
    "the same, upside down": ((3096, (3, 2), (-1000, 8), 8), [(10, 12), (20, 22), (30, 32)]),
    "columns far from one another": ((0, (2, 2), (1000, 500), 8), [(0, 1), (5, 6), (10, 11), (15, 16)]),
    "one item repeated": ((250, (1000, 1000), (0, 0), 8), [(2, 3)]),
    "a row repeated": ((0, (1000, 50), (0, 8), 8), [(0, 4)]),
    "windows over far items": ((0, (3, 2), (300, 300), 8), [(0, 1), (3, 4), (6, 7), (9, 10)]),
    "a dimension of one, however far": ((0, (1, 5), (10**9, 8), 8), [(0, 1)]),
    "rows of far items that lie between one another": ((0, (2, 3), (150, 300), 8), [(0, 2), (3, 5), (6, 8)]),
}


@pytest.mark.parametrize("name", CASES)
def test_the_runs_are_those_of_the_items(name: str) -> None:
    view, expected = CASES[name]

    assert block_runs(*view, block_size=100) == expected


def test_a_billion_windows_are_counted_without_a_look_at_each() -> None:
    windows = block_runs(0, (1 << 30, 1 << 30), (1 << 16, 0), 8, 1 << 40)

    assert windows == [(0, 64)]


def test_overlapping_windows_over_a_long_column_cost_what_the_column_costs() -> None:
    rows, window, stride = 10_000, 5_000, 1 << 17

    runs = block_runs(0, (rows - window + 1, window), (stride, stride), 8, 1 << 16)

    assert runs == [(2 * row, 2 * row + 1) for row in range(rows)]
