"""Pickles: what travels by recipe and what by value. In one process; see `processes`."""

from __future__ import annotations

import copy
import io
import math
import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from userfault import (
    FileStore,
    MemoryStore,
    PagedArray,
    Pager,
    Region,
    RegionClosedError,
    RetryPolicy,
    open_array,
)
from userfault.testing import PatternStore

ROWS = np.arange(60_000.0).reshape(60, 1000)

pytestmark = pytest.mark.usefixtures("default_pager")


def sent(thing: Any) -> Any:
    """What comes out at the other end of multiprocessing's pickles."""
    return pickle.loads(ForkingPickler.dumps(thing))


def pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pickles") / "rows.npy"
    np.save(path, ROWS)
    return path


# -- arrays ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_carry_values(protocol: int, path: Path) -> None:
    array = open_array(path)
    data = pickle.dumps(array[5:7], protocol)
    assert len(data) > 16_000
    assert b"userfault" not in data
    assert type(pickle.loads(data)) is np.ndarray
    assert np.array_equal(pickle.loads(data), ROWS[5:7])


def test_copies_carry_values(path: Path) -> None:
    array = open_array(path)
    for copied in (copy.copy(array), copy.deepcopy(array), copy.deepcopy({"a": [array]})["a"][0]):
        assert np.array_equal(copied, ROWS)
        assert not np.shares_memory(copied, array)
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(array, 5, buffer_callback=buffers.append)
    assert len(data) < 1000 < sum(buffer.raw().nbytes for buffer in buffers)
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    assert file.getvalue() == path.read_bytes()
    del buffers


def test_multiprocessing_carries_recipes(path: Path) -> None:
    array = open_array(path)
    assert len(ForkingPickler.dumps([array, array[5:], {"x": array.T}])) < 3000
    assert array.region.stats().faults == 0
    whole, part, inner = sent([array, array[5:], {"x": array.T}])
    for got, expected in ((whole, ROWS), (part, ROWS[5:]), (inner["x"], ROWS.T)):
        assert isinstance(got, PagedArray)
        assert np.array_equal(got, expected)
    assert whole.region is part.region is inner["x"].region


def test_multiprocessing_carries_changes_by_value(path: Path) -> None:
    array = open_array(path, "c")
    assert isinstance(sent(array), PagedArray)
    array[3, 3] = -1
    for view in (array, array[:5], array[50:]):  # the region has changes: that is all that is asked
        got = sent(view)
        assert type(got) is np.ndarray
        assert np.array_equal(got, view)
    assert sent(array)[3, 3] == -1


def test_write_access_alone_counts_as_a_change(path: Path) -> None:
    array = open_array(path, "c")
    array.ensure(np.s_[3], write=True)
    assert type(sent(array)) is np.ndarray


def test_a_change_is_seen_the_moment_it_is_made(tmp_path: Path) -> None:
    """A write is over only when its block is private: nothing is sent by recipe in between."""
    for n in range(40):
        array = open_array(PatternStore(200 * 4096), "c", block_size=4096)
        array[n * 4096] ^= 0xFF
        assert sent(array)[n * 4096] == array[n * 4096]
        array.close()


def test_what_is_smaller_than_its_store_travels_by_value() -> None:
    data = bytes(range(256)) * 4096
    array = open_array(MemoryStore(data))
    assert len(ForkingPickler.dumps(array[5:10])) < 1000
    assert type(sent(array[5:10])) is np.ndarray
    assert bytes(sent(array)) == data
    small = open_array(MemoryStore(data[:5000]))
    assert isinstance(sent(small[5:10]), PagedArray)
    assert bytes(sent(small)) == data[:5000]


def test_what_has_no_region_travels_by_value(path: Path) -> None:
    array: Any = open_array(path)
    for other in (array.copy(), array[5:5], array[[1, 2]], np.asarray(array), array + 1):
        got = sent(other)
        assert type(got) is np.ndarray
        assert np.array_equal(got, other)
    array.close()
    assert sent(array).size == 0


def test_an_array_whose_region_was_revoked_is_an_error_and_no_signal(path: Path) -> None:
    array = open_array(path)
    array.region.revoke()
    with pytest.raises(RegionClosedError):
        sent(array)


# -- regions --------------------------------------------------------------------------------------------------------


def test_a_region_pickles_to_how_it_is_opened(path: Path) -> None:
    policy = RetryPolicy(attempts=2, timeout=5)
    with Region(FileStore(path), "c", "4KiB", "1MiB", retry_policy=policy) as region:
        region.ensure(0, 4096)
        assert len(pickle.dumps(region)) < 1000
        for again in (pickled(region), sent(region), copy.copy(region)):
            with again:
                assert again is not region
                assert (again.mode, again.block_size, again.budget) == ("c", 4096, 1 << 20)
                assert (again.store, again.retry_policy) == (FileStore(path), policy)
                assert again.memory == region.memory
    with Region(FileStore(path), budget=math.inf) as region, pickled(region) as again:
        assert (again.mode, again.budget) == ("r", None)


def test_a_region_is_opened_on_the_default_pager(path: Path, default_pager: Pager) -> None:
    with Pager() as pager, Region(FileStore(path), pager=pager) as region, pickled(region) as again:
        assert again.pager is default_pager


def test_a_region_with_changes_does_not_pickle(path: Path) -> None:
    with Region(FileStore(path), "c") as region:
        with region.memory as memory:
            memory[100_000] ^= 1
        for pickling in (pickle.dumps, ForkingPickler.dumps, copy.copy):
            with pytest.raises(ValueError, match="changes in the region's memory would be lost: pickle its bytes"):
                pickling(region)


def test_a_closed_region_does_not_pickle(path: Path) -> None:
    for mode in ("r", "c"):
        with Region(FileStore(path), mode) as region:
            pass
        with pytest.raises(RegionClosedError, match="closed"):
            pickle.dumps(region)
