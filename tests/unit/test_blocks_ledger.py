"""The ledger: a region's memfd that describes itself, and the latency buckets in it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from userfault.blocks import errors
from userfault.blocks import ledger as book
from userfault.blocks.geometry import PAGE_SIZE, Geometry
from userfault.blocks.ledger import BOUNDS, BUCKETS, Layout, Ledger, bucket_of
from userfault.blocks.states import BlockState
from userfault.kernel import memfd

geometries = st.builds(Geometry, st.integers(1, 1 << 46), st.sampled_from([4096, 65536, 2 << 20]))


@given(geometry=geometries, recipe=st.integers(0, 1 << 32))
def test_the_parts_lie_one_behind_the_other_on_pages_of_their_own(geometry: Geometry, recipe: int) -> None:
    layout = Layout(geometry, recipe)
    starts = [0, layout.states, layout.pins, layout.notes, layout.recipe, layout.errors, layout.words, layout.total]
    lengths = [geometry.size, geometry.blocks, geometry.blocks, geometry.blocks, recipe, errors.LENGTH, PAGE_SIZE]
    assert all(start % PAGE_SIZE == 0 for start in starts)
    for start, following, length in zip(starts, starts[1:], lengths, strict=False):
        assert start + length <= following < start + length + PAGE_SIZE
    assert layout.total - layout.words == PAGE_SIZE


@given(size=st.integers(1, 1 << 46))
def test_the_words_are_found_from_the_length_alone(size: int) -> None:
    layout = Layout(Geometry(size, 65536), 100)
    assert layout.total - PAGE_SIZE == layout.words


def test_everything_counted_fits_its_page() -> None:
    assert book.RETRIES < book.HISTOGRAM
    assert (book.HISTOGRAM + BUCKETS) * 8 <= PAGE_SIZE
    assert book.W_ERRORS < book.COUNTERS


def test_the_bounds_rise_by_quarter_octaves() -> None:
    assert len(BOUNDS) == BUCKETS
    assert BOUNDS[0] == 256
    assert all(BOUNDS[i + 4] == 2 * BOUNDS[i] or abs(BOUNDS[i + 4] - 2 * BOUNDS[i]) <= 2 for i in range(BUCKETS - 4))
    assert 3.5e9 < BOUNDS[-1] < 3.8e9


@given(st.integers(0, 1 << 62))
def test_a_bucket_holds_what_its_bounds_say(nanoseconds: int) -> None:
    bucket = bucket_of(nanoseconds)
    assert 0 <= bucket < BUCKETS
    assert nanoseconds <= BOUNDS[bucket] or bucket == BUCKETS - 1
    assert bucket == 0 or nanoseconds > BOUNDS[bucket - 1]


def write_header(fd: int, layout: Layout) -> None:
    header = Ledger(fd, layout)
    for index, value in (
        (book.W_MAGIC, book.MAGIC),
        (book.W_SIZE, layout.geometry.size),
        (book.W_BLOCK_SIZE, layout.geometry.block_size),
        (book.W_RECIPE_LENGTH, layout.recipe_length),
    ):
        header.words[index] = value


@pytest.fixture
def layout() -> Layout:
    return Layout(Geometry(1_000_000, 4096), 5)


@pytest.fixture
def fd(layout: Layout) -> Iterator[int]:
    descriptor = memfd.create("test-ledger", layout.total)
    yield descriptor
    os.close(descriptor)


def test_whoever_has_the_descriptor_finds_the_rest(fd: int, layout: Layout) -> None:
    write_header(fd, layout)
    os.pwrite(fd, b"hello", layout.recipe)
    ours, theirs = Ledger(fd, layout), Ledger.attach(fd)
    assert theirs.geometry.size == 1_000_000
    assert theirs.geometry.block_size == 4096
    assert len(theirs.states) == len(theirs.pins) == 245
    assert bytes(theirs.recipe) == b"hello"
    assert theirs.recipe.readonly
    theirs.states[244] = 3
    ours.pins[0] = 9
    theirs.words[book.FAULTS] = 1 << 63
    assert ours.states[244] == 3
    assert theirs.pins[0] == 9
    assert ours.words[book.FAULTS] == 1 << 63


def test_the_parts_do_not_overlap(fd: int, layout: Layout) -> None:
    ledger = Ledger(fd, layout)
    ledger.states[:] = b"\1" * len(ledger.states)
    ledger.pins[:] = b"\2" * len(ledger.pins)
    assert set(ledger.states) == {1}
    assert set(ledger.pins) == {2}
    assert bytes(ledger.recipe) == bytes(5)
    assert not any(ledger.words)
    assert os.pread(fd, layout.states, 0) == bytes(layout.states), "the data are not the ledger's to write"


@pytest.mark.parametrize("content", [b"", b"short", bytes(PAGE_SIZE), os.urandom(3 * PAGE_SIZE)])
def test_any_other_file_is_refused(content: bytes, tmp_path: object) -> None:
    descriptor = memfd.create("test-other", len(content), seal=False)
    try:
        os.pwrite(descriptor, content, 0)
        with pytest.raises((ValueError, OSError)):
            Ledger.attach(descriptor)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("swap", [False, True])
def test_a_page_counts_as_never_written_only_where_it_cannot_be_swapped_out(
    fd: int, layout: Layout, swap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("userfault.kernel.process.swap_in_use", lambda: swap)
    monkeypatch.setattr("userfault.kernel.memory.mincore", lambda _, length: bytes(length // PAGE_SIZE))  # all are out
    ledger = Ledger(fd, layout)
    ledger.states[1] = BlockState.PRIVATE
    assert ledger.snapshot()[1] == (BlockState.PRIVATE if swap else BlockState.ABSENT)


def test_letting_go_leaves_zeros_for_whoever_still_looks(fd: int, layout: Layout) -> None:
    ledger, other = Ledger(fd, layout), Ledger(fd, layout)
    states = ledger.states
    states[3], ledger.pins[3] = 5, 6
    ledger.let_go()
    ledger.let_go()
    assert not any(states)
    assert not any(ledger.pins)
    ledger.pins[3] = 9  # a thread that was just about to
    assert (other.states[3], other.pins[3]) == (5, 6)


def test_a_ledger_that_is_gone_leaves_no_mapping(fd: int, layout: Layout) -> None:
    ledger = Ledger(fd, layout)
    with open("/proc/self/maps") as maps:
        assert "memfd:test-ledger" in maps.read()
    del ledger
    with open("/proc/self/maps") as maps:
        assert "memfd:test-ledger" not in maps.read()


def test_only_states_that_were_written_are_visited() -> None:
    layout = Layout(Geometry(1 << 40, 4096), 0)
    descriptor = memfd.create("test-sparse", layout.total)
    try:
        ledger = Ledger(descriptor, layout)
        assert ledger.occupied(descriptor) == []
        for block in (5, 10_000_000, layout.geometry.blocks - 1):
            ledger.states[block] = 2
        runs = ledger.occupied(descriptor)
        assert [
            any(first <= block < stop for first, stop in runs) for block in (5, 10_000_000, layout.geometry.blocks - 1)
        ]
        assert sum(stop - first for first, stop in runs) <= 3 * PAGE_SIZE
        assert max(stop for _, stop in runs) == layout.geometry.blocks
        del ledger
    finally:
        os.close(descriptor)
