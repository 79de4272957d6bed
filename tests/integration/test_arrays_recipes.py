"""Recipes: how an array is opened again, and how many share a region. In one process; see `processes`."""

from __future__ import annotations

import dataclasses
import gc
import math
import pickle
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import userfault
from userfault import (
    ArrayRecipe,
    FileStore,
    MemoryStore,
    PagedArray,
    Pager,
    RegionClosedError,
    RetryPolicy,
    StoreError,
    open_array,
)
from userfault.testing import PatternStore

ROWS = np.arange(60_000.0).reshape(60, 1000)


def sent(thing: Any) -> Any:
    """What comes out at the other end of multiprocessing's pickles."""
    return pickle.loads(ForkingPickler.dumps(thing))


def pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "rows.npy"
    np.save(path, ROWS)
    return path


Count = Callable[[], int]


@pytest.fixture
def regions(default_pager: Pager) -> Iterator[Count]:
    """How many regions the test has open; none at its end."""
    before = default_pager.regions
    yield lambda: default_pager.regions - before
    gc.collect()
    deadline = time.monotonic() + 20
    while default_pager.regions > before and time.monotonic() < deadline:
        time.sleep(0.001)  # what nobody holds ends when the pager has answered
    assert default_pager.regions == before


# -- recipes --------------------------------------------------------------------------------------------------------

VIEWS: dict[str, Callable[[Any], Any]] = {
    "all": lambda a: a,
    "rows": lambda a: a[10:20],
    "a row": lambda a: a[10],
    "a column": lambda a: a[:, 3],
    "backwards": lambda a: a[::-1, ::-3],
    "transposed": lambda a: a.T[5:],
    "of another type": lambda a: a.view("<u2")[5:, 1:],
    "a field": lambda a: a.view([("x", "f4"), ("y", "u4")])["y"],
    "of no dimensions": lambda a: a[5, 5, ...],
    "with a new dimension": lambda a: a[:, None, 5:6],
    "repeated": lambda a: np.broadcast_to(a[3], (5, 1000), subok=True),
    "windows": lambda a: np.lib.stride_tricks.sliding_window_view(a, 3, 1, subok=True),
    "big-endian": lambda a: a.view(">f8"),
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("mode", ["r", "c"])
def test_a_recipe_opens_the_same_array(name: str, mode: str, path: Path, regions: Count) -> None:
    view = VIEWS[name](open_array(path, mode))
    again = pickled(view.recipe()).open()

    assert type(again) is PagedArray
    assert (again.shape, again.strides, again.dtype) == (view.shape, view.strides, view.dtype)
    assert again.tobytes() == view.tobytes() == VIEWS[name](ROWS).tobytes()
    assert not np.shares_memory(again, view)
    assert again.flags.writeable == (mode == "c")
    assert again.recipe() == view.recipe()
    assert regions() == 2


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), order=st.sampled_from("CF"), kind=st.sampled_from(["u1", ">i2", "f8", "V3"]))
def test_whatever_is_cut_out_of_an_array(data: st.DataObject, order: str, kind: str, regions: Count) -> None:
    shape = data.draw(hnp.array_shapes(max_dims=4, max_side=6))
    store = PatternStore(math.prod(shape) * np.dtype(kind).itemsize + 5, concurrency=0)
    whole = open_array(store, dtype=kind, shape=shape, offset=5, order=order)
    view = whole[data.draw(hnp.basic_indices(shape, allow_ellipsis=True, allow_newaxis=True))]
    if not isinstance(view, PagedArray) or not view.size:
        return
    again = view.recipe().open()
    assert again.tolist() == view.tolist()
    assert sent(view).tolist() == view.tolist()
    assert regions() == 2


def test_a_recipe_is_small_and_says_what_it_is(path: Path, regions: Count) -> None:
    policy = RetryPolicy(attempts=1)
    array = open_array(path, "c", block_size="4KiB", budget="1MiB", retry_policy=policy)
    recipe = array[1:3].recipe()

    geometry = 128 + 8000, (2, 1000), (8000, 8), ROWS.dtype
    expected = ArrayRecipe(FileStore(path), "c", 4096, 1 << 20, policy, "s3fifo", *geometry)
    assert recipe == expected
    assert hash(recipe) == hash(expected)
    assert repr(recipe).startswith(
        f"ArrayRecipe(store=FileStore('{path}'), mode='c', block_size=4096, budget=1048576, "
    )
    assert len(pickle.dumps(recipe)) < 1000
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.mode = "r"
    assert array.region.stats().faults == 0


def test_options_can_be_replaced(path: Path, regions: Count) -> None:
    recipe = open_array(path).recipe()
    for budget, got in (("1MiB", 1 << 20), (math.inf, None)):
        array = dataclasses.replace(recipe, budget=budget).open()
        assert array.region.budget == got
    assert open_array(path, budget=math.inf).recipe().budget == math.inf
    with pytest.raises(ValueError, match="mode must be"):
        dataclasses.replace(recipe, mode="w").open()
    with pytest.raises((ValueError, TypeError)):
        dataclasses.replace(recipe, shape=(10**9,)).open()
    with pytest.raises((ValueError, TypeError)):
        dataclasses.replace(recipe, offset=-5).open()


def test_what_has_no_recipe(path: Path, regions: Count) -> None:
    array: Any = open_array(path)
    for other in (array.copy(), array[5:5], array[[1, 2]]):
        with pytest.raises(RegionClosedError, match="no region"):
            other.recipe()
    array.close()
    with pytest.raises(RegionClosedError, match="closed"):
        array.recipe()


def test_changes_have_no_recipe(path: Path, regions: Count) -> None:
    array = open_array(path, "c")
    recipe = array.recipe()
    array[3, 3] = -1
    for view in (array, array[50:]):
        with pytest.raises(ValueError, match="would be lost"):
            view.recipe()
    assert recipe.open()[3, 3] == ROWS[3, 3]


def test_a_file_that_changed_is_never_taken_for_the_old_one(path: Path, tmp_path: Path, regions: Count) -> None:
    other = tmp_path / "rows.npy"
    other.write_bytes(path.read_bytes())
    recipe = open_array(other).recipe()
    np.save(other, -ROWS)
    with pytest.raises(StoreError, match="changed"):
        recipe.open().ensure()
    assert open_array(other).recipe().open()[1, 1] == -ROWS[1, 1]


# -- one region for many --------------------------------------------------------------------------------------------


def test_a_thousand_slices_open_one_region(path: Path, regions: Count) -> None:
    array = open_array(path)
    parts = [pickled(array[n % 60, n:].recipe()).open() for n in range(500)]
    parts += [sent(array[n % 60, n:]) for n in range(500, 1000)]
    assert regions() == 2
    assert len({part.region.address for part in parts}) == 1
    for n, part in enumerate(parts):
        assert np.array_equal(part, ROWS[n % 60, n:])


def test_each_array_is_closed_by_itself_and_the_region_ends_with_the_last(path: Path, regions: Count) -> None:
    recipe = open_array(path).recipe()
    one, two = recipe.open(), recipe.open()
    assert regions() == 1
    row = two[5]
    one.close()
    assert one.size == 0
    with pytest.raises(BufferError, match="another view"):
        two.close()
    assert np.array_equal(row, ROWS[5])
    del row
    memory = two.region.memory
    with pytest.raises(BufferError, match="another view"):
        two.close()
    memory.release()
    assert np.array_equal(two, ROWS)
    with recipe.open() as three:
        assert three.region is two.region
    two.close()
    assert regions() == 0
    with recipe.open() as four:
        assert np.array_equal(four, ROWS)
    assert regions() == 0


def test_the_region_ends_quietly_with_its_last_view(path: Path, regions: Count) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recipe = open_array(path).recipe()
        plain = np.asarray(recipe.open()[3:5])
        gc.collect()
        assert np.array_equal(plain, ROWS[3:5])
        del plain
        gc.collect()


def test_what_differs_has_regions_of_its_own(path: Path, regions: Count) -> None:
    array = open_array(path)
    kept = [array.recipe().open(), array.recipe().open(), dataclasses.replace(array.recipe(), block_size=4096).open()]
    assert regions() == 3
    changing = open_array(path, "c")
    one, two = changing.recipe().open(), sent(changing)
    one[0, 0], two[0, 1] = -1, -2
    assert (one[0, 0], one[0, 1], two[0, 0], two[0, 1]) == (-1, 1, 0, -2)
    assert np.array_equal(changing, ROWS)
    assert regions() == 6
    del kept


def test_stores_in_memory_are_told_apart_by_their_bytes(regions: Count) -> None:
    arrays = [open_array(MemoryStore(bytes([n]) * 5000)) for n in (1, 2, 2)]
    opened = [pickled(array.recipe()).open() for array in arrays]
    assert [array[77] for array in opened] == [1, 2, 2]
    assert opened[0].region is not opened[1].region is opened[2].region


def test_a_region_that_was_revoked_is_not_shared(path: Path, regions: Count) -> None:
    recipe = open_array(path).recipe()
    old = recipe.open()
    old.region.revoke()
    new = recipe.open()
    assert new.region is not old.region
    assert new[5, 5] == ROWS[5, 5]


def test_threads_that_open_at_once_share_one(path: Path, regions: Count) -> None:
    recipe = open_array(path).recipe()
    opened: list[PagedArray] = []
    barrier = threading.Barrier(8)

    def work() -> None:
        for _ in range(10):
            barrier.wait()
            array = recipe.open()
            opened.append(array)
            barrier.wait()
            if len({id(one.region) for one in opened}) != 1 or not np.array_equal(array[7], ROWS[7]):
                wrong.append(array)
            barrier.wait()
            array.close()
            opened.clear()

    wrong: list[PagedArray] = []
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert regions() == 0


def test_the_room_says_its_names() -> None:
    assert userfault.ArrayRecipe is userfault.arrays.ArrayRecipe
