"""The end of an array: refused while another view lives, whatever kind of view it is, and quiet otherwise."""

from __future__ import annotations

import ctypes
import gc
import io
import pickle
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from userfault import PagedArray, Pager, Region, RegionClosedError, open_array
from userfault.testing import PatternStore, run_child

ROWS = np.arange(60_000.0).reshape(60, 1000)


class Sub(np.ndarray):
    pass


VIEWS: dict[str, Callable[[Any], Any]] = {
    "slice": lambda a: a[1:],
    "slice of a slice": lambda a: a[1:][2:, ::3],
    "transpose": lambda a: a.T,
    "reshape": lambda a: a.reshape(-1),
    "ravel": lambda a: a.ravel(),
    "view of another type": lambda a: a.view("u1"),
    "field": lambda a: a.view([("x", "f8")])["x"],
    "pieces": lambda a: np.split(a, 3),
    "diagonal": np.diagonal,
    "three dimensions": np.atleast_3d,
    "rows of a list": list,
    "asarray": np.asarray,
    "asarray of a slice": lambda a: np.asarray(a[1:]),
    "slice of asarray": lambda a: np.asarray(a)[1:],
    "ndarray": lambda a: a.view(np.ndarray),
    "frombuffer": np.frombuffer,
    "ndarray over it": lambda a: np.ndarray((5,), "f8", a),
    "base": lambda a: a.base,
    "as_strided": lambda a: np.lib.stride_tricks.as_strided(a, (3,)),
    "windows": lambda a: np.lib.stride_tricks.sliding_window_view(a, 2, axis=1),
    "broadcast_to": lambda a: np.broadcast_to(a, (2, 60, 1000)),
    "masked": lambda a: np.ma.array(a, copy=False),
    "masked data": lambda a: np.ma.array(a, copy=False).data,
    "recarray": lambda a: a.view(np.recarray),
    "matrix": lambda a: a.view(np.matrix),
    "memmap": lambda a: a.view(np.memmap),
    "another subclass": lambda a: a.view(Sub),
    "flat": lambda a: a.flat,
    "enumerate": np.ndenumerate,
    "memoryview": memoryview,
    "memoryview of a slice": lambda a: memoryview(a[1:]),
    "slice of a memoryview": lambda a: memoryview(a)[1:],
    "cast": lambda a: memoryview(a).cast("B"),
    "data": lambda a: a.data,
    "PickleBuffer": pickle.PickleBuffer,
    "ctypes": lambda a: a.ctypes,
    "ctypes pointer": lambda a: a.ctypes.data_as(ctypes.POINTER(ctypes.c_double)),
    "ctypes array": (ctypes.c_char * 10).from_buffer,
    "dlpack": np.from_dlpack,
    "memory of the region": lambda a: a.region.memory,
    "held by a closure": lambda a: lambda part=a[1:]: part,
    "held by a generator": lambda a: started(x for x in a[1:]),
}
NO_VIEWS: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda _: None,
    "another name": lambda a: a,
    "in a list": lambda a: [a, {"a": a}],
    "region": lambda a: a.region,
    "method": lambda a: a.sum,
    "iterator": iter,
    "item": lambda a: a[0, 0],
    "copy": lambda a: a[1:].copy(),
    "fancy": lambda a: a[[1, 2]],
    "sum": lambda a: a + a[::-1],
    "bytes": bytes,
    "pickled": lambda a: pickle.loads(pickle.dumps(a, 5)),
    "mask": lambda a: a > 5,
    "shape, type and address": lambda a: (a.shape, a.dtype, a.__array_interface__),
}


def started(generator: Iterator[Any]) -> Iterator[Any]:
    next(generator)
    return generator


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("close") / "rows.npy"
    np.save(path, ROWS)
    return path


Count = Callable[[], int]


@pytest.fixture
def regions(default_pager: Pager) -> Count:
    """How many regions the test has open."""
    before = default_pager.regions
    return lambda: default_pager.regions - before


def await_end(regions: Count) -> None:
    deadline = time.monotonic() + 20
    while regions():
        assert time.monotonic() < deadline, f"{regions()} regions are still open"
        gc.collect()


@pytest.mark.parametrize("kind", VIEWS)
def test_close_is_refused_while_there_is_another_view(kind: str, path: Path, regions: Count) -> None:
    array = open_array(path, "c")
    view = [VIEWS[kind](array)]
    for _ in range(2):
        with pytest.raises(BufferError, match="another view"):
            array.close()
    assert regions() == 1
    assert np.array_equal(array, ROWS), "nothing has changed"
    view.clear()
    array.close()
    assert regions() == 0


@pytest.mark.parametrize("kind", NO_VIEWS)
def test_what_is_no_view_does_not_hold_it(kind: str, path: Path, regions: Count) -> None:
    array = open_array(path)
    held = NO_VIEWS[kind](array)
    array.close()
    assert regions() == 0
    del held


@pytest.mark.parametrize("order", ["view first", "array first"])
@pytest.mark.parametrize("kind", VIEWS)
def test_del_ends_the_region_with_its_last_view(kind: str, order: str, path: Path, regions: Count) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        array: Any = open_array(path, "c")
        view = VIEWS[kind](array)
        if order == "view first":
            del view
            assert regions() == 1
            assert array[1, 1] == ROWS[1, 1]
            del array
        else:
            del array
            gc.collect()
            assert regions() == 1
            del view
        await_end(regions)


@pytest.mark.parametrize(
    "kind", ["slice", "transpose", "asarray", "memoryview", "cast", "PickleBuffer", "masked", "flat"]
)
def test_a_view_goes_on_after_its_array(kind: str, path: Path, regions: Count) -> None:
    array: Any = open_array(path)
    view = VIEWS[kind](array)
    expected = VIEWS[kind](ROWS)
    del array
    gc.collect()
    assert np.array_equal(np.asarray(view), np.asarray(expected))
    del view
    await_end(regions)


def test_a_closed_array_is_empty_and_has_no_region(path: Path, regions: Count) -> None:
    array = open_array(path)
    assert array[5, 5] == ROWS[5, 5]
    array.close()
    array.close()
    assert array.size == 0
    assert array.shape == (0,)
    assert "PagedArray" in repr(array)
    assert bytes(array) == b""
    for use in (lambda: array.region, array.ensure, array.flush):
        with pytest.raises(RegionClosedError, match="closed"):
            use()
    with pytest.raises(IndexError):
        array[0]
    assert regions() == 0


def test_with_closes(path: Path, regions: Count) -> None:
    with open_array(path) as array:
        assert array.sum() == ROWS.sum()
    assert array.size == 0
    assert regions() == 0


def test_with_a_slice_closes(path: Path, regions: Count) -> None:
    cut: Any = open_array(path)[10:]
    with cut as part:
        assert part[0, 0] == ROWS[10, 0]
    assert regions() == 0


def test_an_error_inside_with_is_not_lost(path: Path, regions: Count) -> None:
    with pytest.raises(ZeroDivisionError), open_array(path):
        raise ZeroDivisionError
    assert regions() == 0


def test_the_region_of_an_array_is_not_closed_under_it(path: Path, regions: Count) -> None:
    array = open_array(path)
    with pytest.raises(BufferError):
        array.region.close()
    assert array.sum() == ROWS.sum()
    array.close()


def test_closing_in_another_thread(path: Path, regions: Count) -> None:
    array = open_array(path)
    thread = threading.Thread(target=array.close)
    thread.start()
    thread.join()
    assert regions() == 0


def test_closing_under_a_tracer(path: Path, regions: Count) -> None:
    """Debuggers and coverage tools look at frames, and so hold their variables for a moment."""
    seen: list[int] = []

    def trace(frame: Any, event: str, argument: object) -> Any:
        seen.append(len(frame.f_locals))
        return trace

    array = open_array(path)
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        array.close()
    finally:
        sys.settrace(before)
    assert seen
    assert regions() == 0


def test_hundreds_of_arrays_are_forgotten_quietly(path: Path, regions: Count) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(300):
            assert open_array(path)[3, 3] == ROWS[3, 3]
        await_end(regions)


def test_an_address_that_was_kept_meets_a_signal_never_others_bytes(path: Path) -> None:
    """What C code alone holds cannot be counted. It must not see the bytes of the region that comes after."""
    result = run_child(
        """
import ctypes, userfault
path, = args
array = userfault.open_array(path)
address = array.ctypes.data
assert ctypes.string_at(address, 8) == bytes(8)
array.close()
others = [userfault.open_array(path) for _ in range(50)]
assert all(not o.region.address <= address < o.region.address + o.region.size for o in others)
print("touching", flush=True)
ctypes.string_at(address, 8)
print("not reached")
""",
        str(path),
    )
    assert result.stdout == "touching\n"
    assert result.signal is not None
    assert result.signal.name == "SIGSEGV"


def test_closing_a_copy_does_nothing(path: Path, regions: Count) -> None:
    with open_array(path) as array:
        copied = array.copy()
        assert isinstance(copied, PagedArray)
        copied.close()
        assert np.array_equal(copied, ROWS)
        assert regions() == 1


def test_an_array_over_a_users_region(regions: Count) -> None:
    store = PatternStore(100_000)
    region = Region(store)
    array = np.frombuffer(region.memory, "u1")
    with pytest.raises(BufferError):
        region.close()
    assert array.tobytes() == store.expected(0, 100_000)
    del array
    region.close()


def test_saving_a_closed_array_saves_nothing(path: Path, regions: Count) -> None:
    array = open_array(path)
    array.close()
    file = io.BytesIO()
    np.save(file, array)
    file.seek(0)
    assert np.load(file).size == 0
