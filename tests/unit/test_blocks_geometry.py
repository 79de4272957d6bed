"""Sizes, blocks and ranges: the arithmetic, and what is said about values that make no sense."""

from __future__ import annotations

import math
import operator

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from userfault.blocks.geometry import (
    DEFAULT_BLOCK_SIZE,
    MAX_BLOCK_SIZE,
    PAGE_SIZE,
    Geometry,
    check_block_size,
    check_budget,
    parse_size,
    round_up,
)

BLOCK_SIZES = [PAGE_SIZE << i for i in range((MAX_BLOCK_SIZE // PAGE_SIZE).bit_length())]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1", 1),
        ("123b", 123),
        ("1k", 1024),
        ("1K", 1024),
        ("1kb", 1000),
        ("1KB", 1000),
        ("1KiB", 1024),
        (" 64 KiB ", 64 << 10),
        ("2GiB", 2 << 30),
        ("2gb", 2 * 10**9),
        ("1.5MiB", 3 << 19),
        ("0.5 TiB", 1 << 39),
        ("3PiB", 3 << 50),
        ("1EiB", 1 << 60),
        ("1e", 1 << 60),
        ("1_000", 1000),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "x",
        "GiB",
        "2 GiBs",
        "2iB",
        "1e3",
        "0x10",
        "1,5MB",
        "nan",
        "inf",
        "1.5.5k",
        "..",
        "1 2",
        "k1",
        "-",
        "1.0e999",
    ],
)
def test_text_that_is_no_size_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size") as caught:
        parse_size(text, "budget")
    assert repr(text) in str(caught.value)
    assert "budget" in str(caught.value)


@pytest.mark.parametrize("value", [None, 1.5, math.nan, b"1", [], object()])
def test_a_size_is_an_integer_or_text(value: object) -> None:
    with pytest.raises(TypeError, match="block_size must be bytes as an integer or text"):
        parse_size(value, "block_size")


@pytest.mark.parametrize("value", [-1, "-1", "-1KiB", np.int64(-5)], ids=repr)
def test_a_size_is_not_negative(value: object) -> None:
    with pytest.raises(ValueError, match="must not be negative, got"):
        parse_size(value)


def test_numbers_of_other_libraries_are_integers_too() -> None:
    assert parse_size(np.uint32(4096)) == 4096


@given(st.text())
@example("1.e400")
@example("٣GiB")
@example("²")
def test_any_text_is_a_size_or_a_value_error(text: str) -> None:
    try:
        size = parse_size(text)
    except ValueError as error:
        assert repr(text) in str(error)  # noqa: PT017  # most texts raise, some do not
    else:
        assert size >= 0


@given(st.integers(0, 1 << 70))
def test_an_integer_is_itself_in_either_form(size: int) -> None:
    assert parse_size(size) == parse_size(str(size)) == parse_size(f"{size} B") == size


@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_every_power_of_two_from_a_page_to_two_mebibytes_is_a_block_size(size: int) -> None:
    assert check_block_size(size) == size
    assert check_block_size(f"{size >> 10}KiB") == size


@pytest.mark.parametrize(
    "value",
    [
        0,
        1,
        PAGE_SIZE - 1,
        PAGE_SIZE // 2,
        PAGE_SIZE + 1,
        3 * PAGE_SIZE,
        MAX_BLOCK_SIZE * 2,
        MAX_BLOCK_SIZE + 1,
        "100KB",
        True,
    ],
)
def test_other_block_sizes_are_refused_with_the_range(value: object) -> None:
    with pytest.raises(ValueError, match="power of two") as caught:
        check_block_size(value)
    assert repr(value) in str(caught.value)
    assert str(PAGE_SIZE) in str(caught.value)
    assert str(MAX_BLOCK_SIZE) in str(caught.value)


def test_a_budget_is_bytes_text_or_infinite() -> None:
    assert check_budget(DEFAULT_BLOCK_SIZE, DEFAULT_BLOCK_SIZE) == DEFAULT_BLOCK_SIZE
    assert check_budget("1GiB", DEFAULT_BLOCK_SIZE) == 1 << 30
    assert check_budget(math.inf, DEFAULT_BLOCK_SIZE) is None


@pytest.mark.parametrize("value", [0, 1, DEFAULT_BLOCK_SIZE - 1, "4KiB"])
def test_a_budget_holds_at_least_one_block(value: object) -> None:
    with pytest.raises(ValueError, match=f"at least one block of {DEFAULT_BLOCK_SIZE} bytes") as caught:
        check_budget(value, DEFAULT_BLOCK_SIZE)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", [-math.inf, math.nan, 1e9, None])
def test_a_budget_is_no_other_float(value: object) -> None:
    with pytest.raises(TypeError, match="budget must be bytes"):
        check_budget(value, DEFAULT_BLOCK_SIZE)


sizes = st.one_of(st.integers(1, 1 << 24), st.integers(1, 1 << 60))
block_sizes = st.sampled_from(BLOCK_SIZES)


@given(size=sizes, block_size=block_sizes)
def test_blocks_cover_the_region_exactly(size: int, block_size: int) -> None:
    geometry = Geometry(size, block_size)
    assert (geometry.blocks - 1) * block_size < size <= geometry.blocks * block_size
    assert geometry.length % PAGE_SIZE == 0
    assert 0 <= geometry.length - size < PAGE_SIZE
    assert geometry.span(0)[0] == 0
    offset, length = geometry.span(geometry.blocks - 1)
    assert offset + length == size
    assert 0 < length <= block_size


@st.composite
def ranges(draw: st.DrawFn) -> tuple[Geometry, int, int]:
    geometry = Geometry(draw(sizes), draw(block_sizes))
    near_blocks = st.builds(
        lambda block, nudge: min(max(block * geometry.block_size + nudge, 0), geometry.size),
        st.integers(0, geometry.blocks),
        st.integers(-2, 2),
    )
    edges = st.one_of(st.integers(0, geometry.size), near_blocks)
    start, end = sorted((draw(edges), draw(edges)))
    return geometry, start, end


@given(ranges())
def test_outward_covers_and_inward_is_covered(case: tuple[Geometry, int, int]) -> None:
    geometry, start, end = case
    first, stop = geometry.outward(start, end)
    if start == end:
        assert first == stop
    else:
        assert 0 <= first < stop <= geometry.blocks
        assert geometry.span(first)[0] <= start < sum(geometry.span(first))
        assert geometry.span(stop - 1)[0] < end <= sum(geometry.span(stop - 1))
    first, stop = geometry.inward(start, end)
    if first != stop:
        assert 0 <= first < stop <= geometry.blocks
        assert start <= geometry.span(first)[0]
        assert sum(geometry.span(stop - 1)) <= end


@given(ranges())
def test_inward_leaves_out_no_whole_block(case: tuple[Geometry, int, int]) -> None:
    geometry, start, end = case
    first, stop = geometry.inward(start, end)
    candidates = {
        0,
        geometry.blocks - 1,
        start >> geometry.shift,
        (start >> geometry.shift) + 1,
        (end >> geometry.shift) - 1,
    }
    for block in candidates:
        if 0 <= block < geometry.blocks:
            offset, length = geometry.span(block)
            assert (first <= block < stop) == (start <= offset and offset + length <= end)


@given(ranges())
def test_a_range_inside_is_taken_as_it_is(case: tuple[Geometry, int, int]) -> None:
    geometry, start, end = case
    assert geometry.check_range(start, end - start) == (start, end)
    assert geometry.check_range(start, None) == (start, geometry.size)


@pytest.mark.parametrize(
    ("offset", "length"), [(-1, 1), (0, -1), (0, 1001), (1000, 1), (1001, None), (1 << 80, 1), (5, 1 << 80)]
)
def test_a_range_outside_is_named(offset: int, length: int | None) -> None:
    with pytest.raises(ValueError, match="1000 bytes") as caught:
        Geometry(1000, PAGE_SIZE).check_range(offset, length)
    assert str(offset) in str(caught.value)
    assert str(length) in str(caught.value)


@pytest.mark.parametrize(("offset", "length"), [(0.0, 1), ("0", 1), (0, 1.5), (None, 1)])
def test_a_range_is_of_integers(offset: object, length: object) -> None:
    with pytest.raises(TypeError):
        Geometry(1000, PAGE_SIZE).check_range(offset, length)  # type: ignore[arg-type]  # that is the point


@given(st.integers(0, 1 << 64), st.integers(0, 40).map(lambda i: 1 << i))
def test_rounding_up_is_to_the_next_multiple(value: int, unit: int) -> None:
    rounded = round_up(value, unit)
    assert rounded % unit == 0
    assert 0 <= rounded - value < unit
    assert operator.index(rounded) == rounded
