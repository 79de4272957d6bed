"""A conformance kit for stores: everything that ``Store`` promises, as tests to inherit.

Example:
    A test of a store of your own::

        from userfault.testing import StoreTests

        class TestMyStore(StoreTests):
            def make_store(self, data, tmp_path):
                (tmp_path / "object").write_bytes(data)
                return MyStore(tmp_path / "object")

What a read must give is never asked of the store itself: the tests compare with the data that ``make_store``
was handed, or with what ``reference_bytes`` finds by a way of its own. A test of an optional ability is there
only if the class has the hook that it needs (``lose_backing``, ``change_backing``); nothing is skipped.
"""

# ruff: noqa: D102  # a test's name is its sentence

from __future__ import annotations

import copy
import io
import mmap
import pickle
import random
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from userfault.errors import StoreError
from userfault.stores.base import Store, check_store

from .reading import POISON, read_bytes, read_elsewhere
from .ticker import Ticker
from .toucher import touch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["StoreTests"]

_PAGE = mmap.PAGESIZE
_BLOCK = 65536
_ERRORS = (StoreError, OSError, ValueError, LookupError, EOFError)
"""What a read may raise when it cannot be done. Anything else is more likely a mistake in the store."""

_NEEDS = {
    "test_a_lost_backing_is_an_error": "lose_backing",
    "test_a_changed_backing_is_an_error": "change_backing",
}


class StoreTests:
    """Inherit, define ``make_store``, and pytest checks the store.

    Attributes:
        data: What a store is made to hold, an odd number of bytes on purpose. Override it with more, if size
            matters.
    """

    data: bytes = random.Random(2014).randbytes(3 * _BLOCK + 1234)  # noqa: S311  # bytes to compare, no secret

    # -- what a subclass gives -------------------------------------------------------------------------------

    def make_store(self, data: bytes, tmp_path: Path) -> Store:
        """Return a new store that holds these bytes; ``tmp_path`` is an empty folder for its use."""
        raise NotImplementedError("define make_store(self, data, tmp_path)")

    def reference_bytes(self, store: Store, offset: int, length: int) -> bytes:
        """Return what a read must give, found without the store; override it if that is not ``data``.

        Only up to the end, if the range goes beyond it.
        """
        del store
        return self.data[offset : offset + length]

    def lose_backing(self, store: Store, tmp_path: Path) -> None:
        """Take away what is behind the store: remove the file, stop the server. Optional."""
        raise NotImplementedError

    def change_backing(self, store: Store, tmp_path: Path) -> None:
        """Change what is behind the store, for one that promises to notice. Optional."""
        raise NotImplementedError

    def __init_subclass__(cls, **options: Any) -> None:
        """Leave out the tests of abilities that the class does not show."""
        super().__init_subclass__(**options)
        for test, hook in _NEEDS.items():
            if test not in cls.__dict__:
                shown = getattr(cls, hook) is not getattr(StoreTests, hook)
                setattr(cls, test, getattr(StoreTests, test) if shown else None)

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        """A new store for each test."""
        store = self.make_store(self.data, tmp_path)
        yield store
        store.close()

    def _assert_reads(self, store: Store, offset: int, length: int) -> None:
        expected = self.reference_bytes(store, offset, length)
        actual = read_bytes(store, offset, length)
        assert actual == expected, (
            f"wrong bytes at offset {offset}, length {length}: {_first_difference(actual, expected)}"
        )

    # -- what it is ------------------------------------------------------------------------------------------

    def test_its_attributes_are_of_the_right_kind(self, store: Store) -> None:
        check_store(store)
        assert isinstance(store.writable, bool)

    def test_its_size_is_the_size_of_what_it_holds(self, store: Store) -> None:
        assert len(self.reference_bytes(store, store.size - 1, 2)) == 1, f"it says {store.size} bytes"

    def test_it_describes_itself_in_one_line(self, store: Store) -> None:
        text = store.describe()
        assert text
        assert text == text.strip()
        assert "\n" not in text

    # -- reading ---------------------------------------------------------------------------------------------

    def test_it_reads_the_whole(self, store: Store) -> None:
        length = min(store.size, 1 << 20)
        self._assert_reads(store, 0, length)

    def test_it_reads_at_every_alignment(self, store: Store) -> None:
        for length in (1, 2, 7, 512, _PAGE - 1, _PAGE, _PAGE + 1, _BLOCK, _BLOCK + 3):
            edges = {0, 1, 511, 512, _PAGE - 1, _PAGE, _PAGE + 1, _BLOCK - 1, _BLOCK, 2 * _BLOCK - 2}
            for offset in sorted(edges | {store.size - length}):
                if 0 <= offset <= store.size - length:
                    self._assert_reads(store, offset, length)

    def test_it_reads_its_first_and_its_last_byte(self, store: Store) -> None:
        self._assert_reads(store, 0, 1)
        self._assert_reads(store, store.size - 1, 1)

    def test_it_reads_the_partial_page_at_its_end(self, store: Store) -> None:
        start = (store.size - 1) // _PAGE * _PAGE
        self._assert_reads(store, start, store.size - start)

    def test_it_reads_nothing(self, store: Store) -> None:
        store.read_into(0, memoryview(bytearray()))

    def test_it_reads_backwards_and_again(self, store: Store) -> None:
        blocks = range(0, min(store.size, 1 << 20), _BLOCK)
        for offset in (*reversed(blocks), *blocks):
            self._assert_reads(store, offset, min(_BLOCK, store.size - offset))

    def test_it_leaves_what_is_around_the_buffer_alone(self, store: Store) -> None:
        memory, length = bytearray([POISON]) * 300, min(100, store.size)
        store.read_into(0, memoryview(memory)[100 : 100 + length])
        assert memory[:100] == memory[100 + length : 200 + length] == bytearray([POISON]) * 100

    def test_it_fills_mapped_memory(self, store: Store) -> None:
        length = min(_BLOCK, store.size)
        with mmap.mmap(-1, _BLOCK) as staging:
            with memoryview(staging) as view:
                store.read_into(0, view[:length])
            assert staging[:length] == self.reference_bytes(store, 0, length)

    def test_it_does_not_keep_the_buffer(self, store: Store) -> None:
        memory = bytearray(min(100, store.size))
        with memoryview(memory) as view:
            store.read_into(0, view)
        memory.append(0)  # BufferError while anybody holds a view of it

    def test_it_refuses_what_is_not_there(self, store: Store) -> None:
        for offset in (store.size, store.size - 1, store.size + (1 << 40), -1):
            with pytest.raises(_ERRORS):
                store.read_into(offset, memoryview(bytearray(2)))
            self._assert_reads(store, 0, 1)

    def test_it_reads_in_many_threads_at_once(self, store: Store) -> None:
        failures: list[str] = []
        threads = [threading.Thread(target=self._read_at_random, args=(store, seed, failures)) for seed in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []

    def _read_at_random(self, store: Store, seed: int, failures: list[str]) -> None:
        chance = random.Random(seed)  # noqa: S311
        try:
            for _ in range(20):
                offset = chance.randrange(min(store.size, 1 << 20))
                self._assert_reads(store, offset, chance.randint(1, min(_BLOCK, store.size - offset)))
        except BaseException as error:  # noqa: BLE001  # a thread reports everything
            failures.append(repr(error))

    def test_it_lets_other_threads_run_while_it_waits(self, store: Store) -> None:
        """A long read during which nothing else ran holds the GIL. Quick reads prove nothing, and need not."""
        ticker, usual = Ticker(), sys.getswitchinterval()
        sys.setswitchinterval(1e-4)
        try:
            with ticker:
                for offset in range(0, min(store.size, 2 * _BLOCK), _BLOCK):
                    start = ticker.start_over()
                    read_bytes(store, offset, min(_BLOCK, store.size - offset))
                    took = time.monotonic() - start
                    still = ticker.longest_pause()
                    assert took < 0.2 or still < 0.8 * took, (
                        f"no other thread could run for {still:.2f} of the {took:.2f} seconds of a read"
                    )
        finally:
            sys.setswitchinterval(usual)

    # -- without waiting -------------------------------------------------------------------------------------

    def test_what_it_locates_is_what_it_reads(self, store: Store) -> None:
        for offset in self._blocks_often(store):
            length = min(_BLOCK, store.size - offset)
            if address := store.locate(offset, length):
                assert touch(address, length) == self.reference_bytes(store, offset, length)

    def test_what_it_reads_now_is_what_it_reads(self, store: Store) -> None:
        for offset in self._blocks_often(store):
            buffer = bytearray([POISON]) * min(_BLOCK, store.size - offset)
            answer = store.read_now(offset, memoryview(buffer))
            assert isinstance(answer, bool)
            if answer:
                assert buffer == self.reference_bytes(store, offset, len(buffer))

    def _blocks_often(self, store: Store) -> list[int]:
        """Return the blocks, many times over, read once before: a store may need to get to know them."""
        blocks = range(0, min(store.size, 4 * _BLOCK), _BLOCK)
        for offset in blocks:
            self._assert_reads(store, offset, min(_BLOCK, store.size - offset))
        return [*blocks] * 8

    # -- travelling ------------------------------------------------------------------------------------------

    def test_it_is_the_same_after_pickling(self, store: Store) -> None:
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
            twin: Store = pickle.loads(pickle.dumps(store, protocol))
            assert twin == store
            assert twin.size == store.size
            assert twin.identity() == store.identity()
            assert read_bytes(twin, 0, 1) == self.reference_bytes(store, 0, 1)
            twin.close()
        self._assert_reads(store, 0, 1)

    def test_it_can_be_pickled_after_use(self, store: Store) -> None:
        self._assert_reads(store, 0, 1)
        store.locate(0, 1)
        assert pickle.loads(pickle.dumps(store, 5)) == store

    def test_its_data_may_travel_out_of_band(self, store: Store) -> None:
        buffers: list[pickle.PickleBuffer] = []
        stream = pickle.dumps(store, 5, buffer_callback=buffers.append)
        views = [memoryview(bytes(buffer.raw())) for buffer in buffers]
        twin = pickle.loads(stream, buffers=views)
        assert twin == store
        assert read_bytes(twin, store.size - 1, 1) == self.reference_bytes(store, store.size - 1, 1)
        twin.close()

    def test_it_is_the_same_after_copying(self, store: Store) -> None:
        assert copy.copy(store) == store

    def test_it_differs_from_other_things(self, store: Store) -> None:
        assert store != object()
        assert store is not None
        assert isinstance(hash(store.identity()), int)

    def test_it_reads_in_another_process(self, store: Store) -> None:
        ranges = [(0, 1), (0, min(_BLOCK, store.size)), (store.size // 2, 1), (store.size - 1, 1)]
        assert read_elsewhere(store, ranges) == [
            self.reference_bytes(store, offset, length) for offset, length in ranges
        ]

    # -- ending ----------------------------------------------------------------------------------------------

    def test_it_closes_twice(self, store: Store) -> None:
        self._assert_reads(store, 0, 1)
        store.locate(0, 1)
        store.close()
        store.close()

    def test_it_closes_unread(self, store: Store) -> None:
        store.close()

    # -- writing ---------------------------------------------------------------------------------------------

    def test_it_takes_what_is_written_or_refuses(self, store: Store) -> None:
        if not store.writable:
            with pytest.raises(io.UnsupportedOperation):
                store.write(0, memoryview(b"x"))
            with pytest.raises(io.UnsupportedOperation):
                store.flush()
            return
        changed = bytes(byte ^ 0xFF for byte in self.reference_bytes(store, 1, 100))
        store.write(1, memoryview(changed))
        store.flush()
        assert read_bytes(store, 1, len(changed)) == changed

    # -- what is behind it -----------------------------------------------------------------------------------

    def test_a_lost_backing_is_an_error(self, store: Store, tmp_path: Path) -> None:
        self._assert_reads(store, 0, 1)
        self.lose_backing(store, tmp_path)
        self._assert_fails(store)

    def test_a_changed_backing_is_an_error(self, store: Store, tmp_path: Path) -> None:
        self._assert_reads(store, 0, 1)
        self.change_backing(store, tmp_path)
        self._assert_fails(store)

    def _assert_fails(self, store: Store) -> None:
        for _ in range(2):
            with pytest.raises(_ERRORS):
                read_bytes(store, 0, min(_PAGE, store.size))


def _first_difference(actual: bytes, expected: bytes) -> str:
    if len(actual) != len(expected):
        return f"{len(actual)} bytes instead of {len(expected)}"
    place = next((i for i, (a, b) in enumerate(zip(actual, expected, strict=True)) if a != b), None)
    return "" if place is None else f"byte {place} is {actual[place]:#x} instead of {expected[place]:#x}"
