"""Parts of arrays brought in and kept: what fails is an exception, up front, and what came through does not fault."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from userfault import BlockState, PagedArray, RegionClosedError, StoreError, open_array
from userfault.testing import CountingStore, FailingStore, PatternStore, StallingStore, run_child

pytestmark = pytest.mark.usefixtures("default_pager")

PAGE = 4096
ROWS, WIDTH = 64, 2 * PAGE  # a row is two blocks
SIZE = ROWS * WIDTH
STORE = PatternStore(SIZE)
VALUES = np.frombuffer(STORE.expected(0, SIZE), "u1").reshape(ROWS, WIDTH)


def opened(store: Any = STORE, mode: str = "r", **options: Any) -> PagedArray:
    return open_array(store, mode, "u1", (ROWS, WIDTH), block_size=PAGE, **options)


def there(array: PagedArray) -> list[int]:
    return [block for block, state in enumerate(array.region.residency()) if state]


PARTS: dict[str, tuple[Any, list[int]]] = {
    "all": (..., list(range(128))),
    "rows": (np.s_[10:12], [20, 21, 22, 23]),
    "one row": (10, [20, 21]),
    "a column": (np.s_[:, 3], list(range(0, 128, 2))),
    "a column of the second half, upwards": (np.s_[::-1, PAGE + 3], list(range(1, 128, 2))),
    "columns at the border of two blocks": (np.s_[5::20, PAGE - 1 : PAGE + 1], [10, 11, 50, 51, 90, 91]),
    "an item": (np.s_[7, -1], [15]),
    "nothing": (np.s_[7:7], []),
    "nothing of a row": (np.s_[7, :0], []),
    "with a new dimension": (np.s_[None, 3, None, :10], [6]),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_is_brought_in_and_kept(name: str) -> None:
    index, blocks = PARTS[name]
    array = opened()
    with array.pinned(index) as part:
        assert isinstance(part, PagedArray)
        assert there(array) == blocks
        assert array.region.stats().pinned_bytes == len(blocks) * PAGE
        assert array.region.evict() == 0
        assert part.tolist() == VALUES[index].tolist()
        assert array.region.stats().faults == 0
    assert array.region.stats().pinned_bytes == 0
    assert part.tolist() == VALUES[index].tolist()
    assert array.region.evict() == len(blocks) * PAGE
    assert part.tolist() == VALUES[index].tolist()


@pytest.mark.parametrize("name", PARTS)
def test_ensure_brings_in_the_same(name: str) -> None:
    index, blocks = PARTS[name]
    with opened() as array:
        array.ensure(index)
        assert there(array) == blocks
        assert array.region.stats().pinned_bytes == 0


def test_slices_have_the_same_methods() -> None:
    array = opened()
    with array[10:12].pinned() as rows, array.T[3].pinned(np.s_[60:]) as column:
        assert there(array) == [20, 21, 22, 23, 120, 122, 124, 126]
        assert np.array_equal(rows, VALUES[10:12])
        assert np.array_equal(column, VALUES[60:, 3])
    array[::32, ::-1].ensure(np.s_[:, :1])
    assert there(array) == [1, 20, 21, 22, 23, 65, 120, 122, 124, 126]
    array[5:5].ensure()
    with array[5:5].pinned() as nothing:
        assert nothing.shape == (0, WIDTH)


@pytest.mark.parametrize("order", ["C", "F"])
def test_both_orders_and_items_larger_than_blocks(order: str) -> None:
    kind = np.dtype(("V", 3 * PAGE))
    array = open_array(PatternStore(24 * kind.itemsize), "r", kind, (4, 6), order=order, block_size=PAGE)
    expected = VALUES.reshape(-1)[: 24 * kind.itemsize].view(kind).reshape((4, 6), order=order)  # type: ignore[call-overload]
    first = 2 * 6 + 1 if order == "C" else 2 + 4
    with array.pinned(np.s_[2, 1]) as item:
        assert there(array) == [3 * first, 3 * first + 1, 3 * first + 2]
        assert item.tobytes() == expected[2, 1].tobytes()


def test_a_field_is_pinned_without_the_others() -> None:
    kind = np.dtype([("a", "u1"), ("pad", "V8191"), ("b", "u1"), ("more", "V8191")])
    array = open_array(PatternStore(8 * kind.itemsize), "r", kind, block_size=PAGE)
    with array["b"].pinned() as field:
        assert there(array) == list(range(2, 32, 4))
        assert field.tolist() == VALUES[1:16:2, 0].tolist()


def test_for_writing() -> None:
    array = opened(mode="c")
    with array.pinned(np.s_[::32, 0], write=True) as part:
        assert there(array) == [0, 64]
        assert array.region.residency()[64] == BlockState.PRIVATE
        part[:] = 7
        assert array.region.stats().faults == 0
    assert array[[0, 32, 33], 0].tolist() == [7, 7, VALUES[33, 0]]
    reading = opened()
    with pytest.raises(ValueError, match="mode 'r'"), reading.pinned(write=True):
        pass
    assert there(reading) == []


# -- what goes wrong ------------------------------------------------------------------------------------------------


def test_an_error_of_the_store_comes_before_the_block_and_leaves_no_pin(tmp_path: Path) -> None:
    run_child(_fail_up_front, tmp_path / "healed").check()  # a touch of what has failed would be a SIGBUS


def _fail_up_front(healed: Path) -> None:
    array = opened(FailingStore(SIZE, "no answer", fail_offsets=[40 * WIDTH], healed_by=healed))
    entered = []
    for index in (np.s_[:, 3], np.s_[30:50], np.s_[40, 3]):
        with pytest.raises(StoreError, match="no answer") as caught, array.pinned(index) as part:
            entered.append(part)
        assert (caught.value.offset, caught.value.length) == (40 * WIDTH, PAGE)
        with pytest.raises(StoreError, match="no answer"):
            array.ensure(index)
        assert array.region.stats().pinned_bytes == 0
    assert entered == []
    with array.pinned(np.s_[:, PAGE]) as column:  # the other halves of the rows
        assert np.array_equal(column, VALUES[:, PAGE])
    healed.touch()
    array.region.retry(40 * WIDTH, WIDTH)
    with array.pinned(np.s_[:, 3]) as column:
        assert np.array_equal(column, VALUES[:, 3])


def test_an_error_inside_the_block_is_not_lost_and_ends_the_pins() -> None:
    array = opened()
    with pytest.raises(ZeroDivisionError), array.pinned(np.s_[:, 3]):
        raise ZeroDivisionError
    assert array.region.stats().pinned_bytes == 0


def test_more_than_the_budget_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    store = CountingStore(STORE, tmp_path / "log")
    with opened(store, budget=32 * PAGE) as array:
        for index in (..., np.s_[:, 3], np.s_[:17]):
            with pytest.raises(ValueError, match=r"more than the budget of 131072 bytes holds at once; ask for less"):
                array.ensure(index)
        assert len(store.reads()) == 1  # of the header, when it was opened
        with contextlib.ExitStack() as pins:
            pins.enter_context(array.pinned(np.s_[:16, 3]))
            with pytest.raises(ValueError, match="would be pinned at once, and the budget holds 32"):
                pins.enter_context(array.pinned(np.s_[32:49, 3]))
            pins.enter_context(array.pinned(np.s_[:8]))  # of which half is pinned already
            assert array.region.stats().pinned_bytes == 24 * PAGE
        assert array.region.stats().pinned_bytes == 0


def test_arrays_without_a_region() -> None:
    array = opened()
    copied = array[:2].copy()
    array.close()
    for gone in (array, copied):
        for use in (gone.ensure, lambda gone=gone: gone.pinned().__enter__()):
            with pytest.raises(RegionClosedError, match="no region"):
                use()


@pytest.mark.parametrize("index", [[1, 2], np.array([True]), 1.5, "x", (0, [1])], ids=repr)
def test_what_is_no_slice(index: Any) -> None:
    array = opened()
    with pytest.raises(TypeError, match=r"integers and slices, as numpy\.s_"), array.pinned(index):
        pass


def test_the_array_is_not_closed_under_a_pin() -> None:
    array = opened()
    with array.pinned(np.s_[:2]) as rows, pytest.raises(BufferError):
        array.close()
    assert rows.sum() == VALUES[:2].sum()
    with pytest.raises(BufferError, match="delete the slices"):  # the slice is alive
        array.close()
    del rows
    array.close()


# -- many -----------------------------------------------------------------------------------------------------------


def test_the_runs_of_a_part_are_read_side_by_side(tmp_path: Path) -> None:
    """While the first is still on its way, others come in."""
    array = opened(StallingStore(STORE, tmp_path / "release", offsets=[WIDTH]))
    thread = threading.Thread(target=array.ensure, args=(np.s_[1:, 3],))
    thread.start()
    deadline = time.monotonic() + 60
    while len(there(array)) < 32 and time.monotonic() < deadline:
        time.sleep(0.001)  # it is shared memory that is looked at: there is nothing to wait for
    before = there(array)
    (tmp_path / "release").touch()
    thread.join()
    assert len(before) >= 32
    assert there(array) == list(range(2, 128, 2))


def test_threads_pin_and_evict_what_overlaps() -> None:
    array = opened(budget=64 * PAGE)
    wrong: list[object] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(40):
            start, step = int(rng.integers(0, 40)), int(rng.integers(1, 9))
            # All together may be beyond the budget.
            with contextlib.suppress(ValueError), array.pinned(np.s_[start : start + 8 : step, ::-1]) as part:
                array.region.evict()
                if not np.array_equal(part, VALUES[start : start + 8 : step, ::-1]):
                    wrong.append((seed, start, step))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert array.region.stats().pinned_bytes == 0
    assert array.region.stats().faults == 0


def test_inside_the_block_nothing_of_it_faults_even_without_a_pager() -> None:
    """The strongest form of it: with the worker stopped, any fault would hang, and the watchdog end the child."""
    result = run_child(_use_with_the_worker_stopped)
    assert result.check().value == [int(VALUES[:, 3].sum()), int(VALUES[10:20].sum())]


def _use_with_the_worker_stopped() -> list[int]:
    array = opened()
    pager = array.region.pager
    with array.pinned(np.s_[:, 3]) as column, array.pinned(np.s_[10:20]) as rows:
        for pid in (pager.pid, pager.worker_pid):  # both, or the other would start another
            os.kill(pid, signal.SIGSTOP)
            while " T " not in Path(f"/proc/{pid}/stat").read_text(encoding="ascii"):
                time.sleep(0.001)  # the kernel says nothing when it is done
        sums = [int(column.sum()), int(rows.sum())]
        for pid in (pager.worker_pid, pager.pid):
            os.kill(pid, signal.SIGCONT)
    return sums
