"""Stores against plain bytes, for whatever data, part and range hypothesis thinks of."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from userfault.stores import FileStore, MemoryStore, Store, descriptors
from userfault.stores.belief import FIRST_S, LONGEST_S, Belief
from userfault.stores.descriptors import difference
from userfault.testing import PatternStore, touch
from userfault.testing.reading import read_bytes

data = st.binary(min_size=1, max_size=20000)
ranges = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=8)


def cut(size: int, start: float, share: float) -> tuple[int, int]:
    """Return a range inside a size from two numbers between 0 and 1."""
    offset = min(int(start * size), size)
    return offset, int(share * (size - offset))


@contextmanager
def file_of(content: bytes) -> Iterator[str]:
    """Make a file for the while; tmp_path would be shared between examples."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        yield file.name


def check(store: Store, content: bytes, wanted: list[tuple[float, float]]) -> None:
    assert store.size == len(content)
    for offset, length in (cut(store.size, *numbers) for numbers in wanted):
        expected = content[offset : offset + length]
        assert read_bytes(store, offset, length) == expected
        if length and (address := store.locate(offset, length)):
            assert touch(address, length) == expected
        buffer = bytearray(length)
        if store.read_now(offset, memoryview(buffer)):
            assert buffer == expected


@given(content=data, wanted=ranges)
def test_a_memory_store_is_its_bytes(content: bytes, wanted: list[tuple[float, float]]) -> None:
    check(MemoryStore(content), content, wanted)


@settings(max_examples=60, deadline=None)
@given(content=data, part=st.tuples(st.floats(0, 1), st.floats(0, 1)), wanted=ranges)
def test_a_part_of_a_file_is_its_bytes(
    content: bytes, part: tuple[float, float], wanted: list[tuple[float, float]]
) -> None:
    offset, size = cut(len(content) - 1, *part)
    size += 1
    with file_of(content) as path:
        store = pickle.loads(pickle.dumps(FileStore(path, offset, size)))
        check(store, content[offset : offset + size], wanted * 2)
        store.close()


@settings(max_examples=60)
@given(
    seed=st.integers(0, 1 << 70),
    offset=st.integers(0, 1 << 50),
    first=st.integers(0, 9000),
    second=st.integers(0, 9000),
)
def test_a_pattern_does_not_depend_on_how_it_is_cut(seed: int, offset: int, first: int, second: int) -> None:
    store = PatternStore((1 << 50) + 20000, seed)

    whole = store.expected(offset, first + second)

    assert whole == store.expected(offset, first) + store.expected(offset + first, second)
    assert read_bytes(store, offset, first + second) == whole


@settings(max_examples=30, deadline=None)
@given(
    seeds=st.sets(st.integers(0, 1 << 64), min_size=2, max_size=2), pages=st.sets(st.integers(0, 1 << 40), min_size=2)
)
def test_no_two_pages_of_a_pattern_are_alike(seeds: set[int], pages: set[int]) -> None:
    stores = [PatternStore(1 << 60, seed) for seed in seeds]

    seen = {store.expected(4096 * page + shift, 4000) for store in stores for page in pages for shift in (0, 8)}

    assert len(seen) == len(stores) * len(pages) * 2


identities = st.tuples(*[st.integers(0, 3)] * 4)


@given(first=identities, second=identities)
def test_a_difference_is_told_exactly_where_there_is_one(
    first: descriptors.Identity, second: descriptors.Identity
) -> None:
    assert bool(difference(first, second)) == (first != second)


class Believing(RuleBasedStateMachine):
    """Belief beside the plainest model of it: when each chunk was first and last seen hot without a miss between."""

    def __init__(self) -> None:
        super().__init__()
        self.belief, self.now = Belief(), 100.0
        self.seen: dict[int, tuple[float, float]] = {}

    @rule(seconds=st.floats(0, 3))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(chunk=st.integers(0, 3), hot=st.booleans())
    def examine(self, chunk: int, hot: bool) -> None:
        self.belief.learn(chunk, self.now, hot=hot)
        first = self.seen.pop(chunk, (self.now, self.now))[0]
        if hot:
            self.seen[chunk] = first, self.now

    @rule(chunk=st.integers(0, 3), length=st.sampled_from([4096, 65536, 1 << 21]))
    def touch(self, chunk: int, length: int) -> None:
        due = self.belief.is_due(chunk, length, self.now)
        assert due or chunk not in self.seen

    @rule()
    def find_something_cold(self) -> None:
        self.belief.doubt(self.now)

    @rule()
    def begin_anew(self) -> None:
        self.belief.clear()
        self.seen.clear()

    @invariant()
    def it_believes_only_what_it_saw_and_not_for_longer_than_that_lasted(self) -> None:
        for chunk in range(4):
            until = self.belief.until(chunk)
            if chunk not in self.seen:
                assert until <= 0
            else:
                first, last = self.seen[chunk]
                assert last + FIRST_S <= until <= last + max(FIRST_S, min(last - first, LONGEST_S)) + 1e-9


TestBelieving = Believing.TestCase
TestBelieving.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)


@settings(max_examples=15, deadline=None)
@given(order=st.lists(st.integers(0, 9), max_size=60), limit=st.integers(1, 5))
def test_the_table_of_open_files_stays_small_and_right(order: list[int], limit: int) -> None:
    usual = descriptors._limit
    descriptors._limit = limit
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for number in range(10):
            path = os.path.join(folder, str(number))
            with open(path, "wb") as file:
                file.write(b"%d" % number)
            files.append((path, descriptors.identify(os.stat(path))))
        try:
            for number in order:
                assert os.pread(descriptors.open_file(*files[number]).fd, 9, 0) == b"%d" % number
                assert len(descriptors._table) <= limit
        finally:
            descriptors._limit = usual
            for known in files:
                descriptors.forget(*known)
