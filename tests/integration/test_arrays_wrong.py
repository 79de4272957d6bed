"""Wrong input: each a clear, typed error that names the value and the remedy, with nothing left behind."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import userfault
from userfault import KernelError, MemoryStore, Pager, Region, StoreError, open_array
from userfault.testing import LyingSizeStore, PatternStore, UnpicklableStore

HEADER = "{'descr': '<f8', 'fortran_order': False, 'shape': (10,), }"
STORE = PatternStore(100_000)


@pytest.fixture(autouse=True)
def nothing_is_opened(default_pager: Pager) -> Iterator[None]:
    """No region, and no descriptor anywhere, of a call that failed."""
    processes = os.getpid(), default_pager.pid, default_pager.worker_pid

    def held() -> set[tuple[int, str]]:
        return {(pid, fd) for pid in processes for fd in os.listdir(f"/proc/{pid}/fd")}

    before = held()
    yield
    assert default_pager.regions == 0
    deadline = time.monotonic() + 5
    while held() - before and time.monotonic() < deadline:
        time.sleep(0.002)  # the supervisor hears of a region's end after we do, and looks into /proc now and then
    assert not held() - before
    assert default_pager.restarts == 0


def npy(header: str | bytes, version: tuple[int, int] = (1, 0), data: bytes = bytes(80)) -> bytes:
    """A .npy file with whatever header."""
    text = header if isinstance(header, bytes) else header.encode("utf8")
    length = len(text).to_bytes(2 if version[0] == 1 else 4, "little")
    return b"\x93NUMPY" + bytes(version) + length + text + data


# -- sources --------------------------------------------------------------------------------------------------------


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npy"):
        open_array(tmp_path / "nowhere.npy")


def test_a_directory(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match=tmp_path.name):
        open_array(tmp_path)


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match=r"empty' is empty: a region needs at least one byte"):
        open_array(tmp_path / "empty")


def test_a_device() -> None:
    with pytest.raises(ValueError, match=r"'/dev/zero' is not a regular file"):
        open_array("/dev/zero")


def test_a_pipe_does_not_wait_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        open_array(tmp_path / "pipe")


@pytest.mark.parametrize(
    "source", [5, None, b"x.npy", object(), np.zeros(3), ["x.npy"]], ids=lambda s: type(s).__name__
)
def test_no_source(source: Any) -> None:
    with pytest.raises((TypeError, FileNotFoundError)) as caught:
        open_array(source)
    if isinstance(caught.value, TypeError):
        assert type(source).__name__ in str(caught.value)


@pytest.mark.parametrize("url", ["s3://bucket/x.npy", "http://host/x", "gs://a"])
def test_an_address_that_no_store_knows(url: str) -> None:
    with pytest.raises(ValueError, match=url.partition("://")[0]):
        open_array(url)


def test_options_that_a_file_does_not_have(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"123")
    with pytest.raises(ValueError, match=r"store_options \['retries'\]"):
        open_array(tmp_path / "x", store_options={"retries": 5})


# -- .npy -----------------------------------------------------------------------------------------------------------

WHOLE = npy(HEADER + " " * 59 + "\n")


@pytest.mark.parametrize("length", [6, 7, 8, 9, 10, 11, 60, 127])
def test_a_header_that_is_cut(length: int) -> None:
    with pytest.raises(ValueError, match=r"MemoryStore\(\d+ bytes\) has a damaged .npy header: .*EOF"):
        open_array(MemoryStore(WHOLE[:length]))


@pytest.mark.parametrize("missing", [1, 79, 80])
def test_data_that_are_cut(missing: int, tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(WHOLE[:-missing])
    with pytest.raises(ValueError, match="truncated") as caught:
        open_array(tmp_path / "x.npy")
    assert "x.npy" in str(caught.value)
    assert "promises 80 bytes of float64 (10,)" in str(caught.value)
    assert f"{missing} of them are missing" in str(caught.value)


BAD_HEADERS: dict[str, str | bytes] = {
    "nothing": "",
    "no dictionary": "[1, 2]",
    "not closed": "{'descr': '<f8', ",
    "a call": "__import__('os').abort()",
    "a key missing": "{'descr': '<f8', 'shape': (10,)}",
    "unknown type": HEADER.replace("<f8", "zz"),
    "type is a number": HEADER.replace("'<f8'", "5"),
    "type is None": HEADER.replace("'<f8'", "None"),
    "order is a number": HEADER.replace("False", "7"),
    "shape is a number": HEADER.replace("(10,)", "10"),
    "shape is text": HEADER.replace("(10,)", "'ten'"),
    "shape is negative": HEADER.replace("10", "-10"),
    "shape is twice negative": HEADER.replace("10,", "-2, -5"),
    "shape is a float": HEADER.replace("10", "1.5"),
    "shape is true": HEADER.replace("10", "True"),
    "a zero byte": HEADER + "\0",
    "parentheses": "(" * 5000 + ")" * 5000,
    "no text": b"\xff\xfe\xfd",
}


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)], ids=["1.0", "2.0", "3.0"])
@pytest.mark.parametrize("header", BAD_HEADERS)
def test_a_damaged_header(header: str, version: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"MemoryStore\(\d+ bytes\) has a damaged .npy header: "):
        open_array(MemoryStore(npy(BAD_HEADERS[header], version)))


@pytest.mark.parametrize("version", [(0, 0), (1, 1), (2, 1), (4, 0), (255, 255)], ids=str)
def test_a_version_that_nobody_knows(version: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"version {version[0]}.{version[1]}"):
        open_array(MemoryStore(npy(HEADER, version)))


def test_a_header_that_says_it_is_endless() -> None:
    for version in (2, 3):
        with pytest.raises(ValueError, match=r"damaged \.npy header"):
            open_array(MemoryStore(b"\x93NUMPY" + bytes([version, 0]) + b"\xff" * 4 + b" " * 100))


def test_a_shape_beyond_all_measure() -> None:
    with pytest.raises(ValueError, match="truncated"):
        open_array(MemoryStore(npy(HEADER.replace("10", "10" * 20))))


def test_too_many_dimensions() -> None:
    with pytest.raises(ValueError, match="dimension"):
        open_array(MemoryStore(npy(HEADER.replace("10,", "1," * 65))))


@pytest.mark.parametrize("shape", ["(0,)", "(5, 0)", "(0, 10000000000000000000000)"])
def test_an_empty_shape(shape: str) -> None:
    with pytest.raises(ValueError, match="has no bytes; a region needs at least one") as caught:
        open_array(MemoryStore(npy(HEADER.replace("(10,)", shape))))
    assert shape in str(caught.value)


@pytest.mark.parametrize("version", [(1, 0), (3, 0)], ids=["1.0", "3.0"])
@pytest.mark.parametrize("descr", ["'|O'", "[('a', '|O')]", "[('a', [('b', '<f8'), ('c', '|O', (2,))])]"])
def test_objects_are_refused(descr: str, version: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="holds Python objects, which are pointers"):
        open_array(MemoryStore(npy(HEADER.replace("'<f8'", descr), version)))


def test_objects_as_numpy_saves_them(tmp_path: Path) -> None:
    np.save(tmp_path / "o.npy", np.array([1, "x", None], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"o.npy.*dtype object holds Python objects"):
        open_array(tmp_path / "o.npy")


@pytest.mark.parametrize("descr", ["|S0", "<U0", "|V0"])
def test_items_of_no_size(descr: str) -> None:
    with pytest.raises(ValueError, match="no size"):
        open_array(MemoryStore(npy(HEADER.replace("<f8", descr))))


@pytest.mark.parametrize("dtype", ["f4", ">f8", "i8", "V8", [("x", "f8")]])
def test_another_type_than_expected(dtype: Any) -> None:
    with pytest.raises(ValueError, match="holds float64, not dtype=") as caught:
        open_array(MemoryStore(WHOLE), dtype=dtype)
    assert str(np.dtype(dtype)) in str(caught.value)
    assert "leave dtype out" in str(caught.value)


@pytest.mark.parametrize("shape", [9, 11, (10, 1), (2, 5), ()])
def test_another_shape_than_expected(shape: Any) -> None:
    with pytest.raises(ValueError, match=r"has shape \(10,\), not shape=") as caught:
        open_array(MemoryStore(WHOLE), shape=shape)
    assert "leave shape out" in str(caught.value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.binary(max_size=80), version=st.sampled_from([(1, 0), (2, 0), (3, 0)]), cut=st.integers(0, 100))
def test_any_bytes_are_an_array_or_a_value_error(header: bytes, version: tuple[int, int], cut: int) -> None:
    data = npy(header, version)
    try:
        open_array(MemoryStore(data[: max(len(data) - cut, 6)])).close()
    except ValueError as error:
        assert "MemoryStore" in str(error)  # noqa: PT017  # most raise, some may not


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(6, 140), value=st.integers(0, 255))
def test_a_byte_that_flips_is_no_crash(at: int, value: int) -> None:
    data = bytearray(WHOLE)
    data[at] = value
    try:
        with open_array(MemoryStore(data)) as array:
            assert array.nbytes <= 80
    except ValueError as error:
        assert "MemoryStore" in str(error)  # noqa: PT017  # a flipped byte may as well be harmless


# -- raw items ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["nonsense", "f3", 5, object(), "U-1"])
def test_a_type_that_numpy_does_not_know(dtype: Any) -> None:
    with pytest.raises(TypeError, match="is not a type that NumPy knows") as caught:
        open_array(STORE, dtype=dtype)
    assert repr(dtype) in str(caught.value)


@pytest.mark.parametrize("dtype", ["O", object, [("a", "O")]])
def test_raw_objects(dtype: Any) -> None:
    with pytest.raises(ValueError, match="Python objects"):
        open_array(STORE, dtype=dtype)


def test_raw_items_that_do_not_fill_the_store() -> None:
    with pytest.raises(ValueError, match=r"100000 bytes are no whole number of .*7.* items of 7 bytes; give shape="):
        open_array(STORE, dtype="S7")


@pytest.mark.parametrize("shape", [12_501, (2, 6251), (10**30,)])
def test_a_shape_larger_than_the_store(shape: Any) -> None:
    with pytest.raises(ValueError, match="has 100000 from offset 0") as caught:
        open_array(STORE, dtype="f8", shape=shape)
    assert str(math.prod(np.atleast_1d(shape).tolist()) * 8) in str(caught.value)


@pytest.mark.parametrize("shape", [0, (0,), (5, 0)])
def test_a_raw_shape_of_nothing(shape: Any) -> None:
    with pytest.raises(ValueError, match="has no bytes"):
        open_array(STORE, shape=shape)


@pytest.mark.parametrize("shape", [-1, (-1,), (2, -3), (-2, -3)])
def test_a_raw_shape_below_nothing(shape: Any) -> None:
    with pytest.raises(ValueError, match="negative"):
        open_array(STORE, shape=shape)


@pytest.mark.parametrize("shape", [1.5, "ab", (1.5,), ("2",), object()], ids=repr)
def test_a_raw_shape_of_no_numbers(shape: Any) -> None:
    with pytest.raises(TypeError):
        open_array(STORE, shape=shape)


@pytest.mark.parametrize("offset", [-1, 100_000, 100_001, 10**30])
def test_an_offset_outside(offset: int) -> None:
    with pytest.raises(ValueError, match=f"offset {offset} is not inside the 100000 bytes of PatternStore"):
        open_array(STORE, offset=offset)


@pytest.mark.parametrize("offset", [1.5, "1", None])
def test_an_offset_that_is_no_integer(offset: Any) -> None:
    with pytest.raises(TypeError):
        open_array(STORE, dtype="u1", offset=offset)


@pytest.mark.parametrize("order", ["A", "K", "c", "", None, 5])
def test_an_order_that_is_none(order: Any) -> None:
    with pytest.raises(ValueError, match=f"order must be 'C' or 'F', got {order!r}"):
        open_array(STORE, order=order)


# -- regions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["w", "x", "", "R", "cr", None, 5, b"r", [], {}], ids=repr)
def test_a_mode_that_is_none(mode: Any) -> None:
    for opening in (lambda: Region(STORE, mode), lambda: open_array(STORE, mode)):
        with pytest.raises(ValueError, match="mode") as caught:
            opening()
        assert repr(mode) in str(caught.value)


@pytest.mark.parametrize("opening", [Region, open_array])
def test_a_store_that_cannot_be_written_to(opening: Any) -> None:
    with pytest.raises(ValueError, match=r"is not writable; .* mode='c' keeps changes in memory"):
        opening(STORE, "r+")


def test_a_new_file_needs_a_path_and_a_shape(tmp_path: Path) -> None:
    new = tmp_path / "new.npy"
    with pytest.raises(ValueError, match="mode must be 'r'"):
        Region(STORE, "w+")
    with pytest.raises(TypeError, match="makes a new file, so it takes a path"):
        open_array(STORE, "w+", shape=1)
    for wrong, text in [
        ({}, "say its shape="),
        ({"shape": (3, 0)}, "has no bytes"),
        ({"shape": -1}, "negative"),
        ({"shape": 3, "offset": 8}, "offset 8"),
        ({"shape": 3, "dtype": object}, "object|dtype"),
        ({"shape": 3, "order": "X"}, "order"),
    ]:
        with pytest.raises((ValueError, TypeError), match=text):
            open_array(new, "w+", **wrong)  # type: ignore[arg-type]  # a test's
    assert not new.exists()


@pytest.mark.parametrize(
    "block_size", [0, 1, 1000, 2048, 4097, 12_288, 4 << 20, 1 << 40, "3KiB", "4MiB", "many", "", -4096]
)
def test_a_block_size_that_is_none(block_size: Any) -> None:
    with pytest.raises(ValueError, match="block_size") as caught:
        Region(STORE, block_size=block_size)
    assert repr(block_size) in str(caught.value)
    assert any(word in str(caught.value) for word in ("power of two", "negative", "is not a size"))


@pytest.mark.parametrize("block_size", [None, 4096.0, b"4096", []], ids=repr)
def test_a_block_size_of_another_type(block_size: Any) -> None:
    with pytest.raises(TypeError, match="block_size must be bytes as an integer or text such as '2GiB'"):
        Region(STORE, block_size=block_size)


@pytest.mark.parametrize("budget", [0, 1, 65_535, "64KB", "nothing", -1, "-1"], ids=repr)
def test_a_budget_that_is_too_small(budget: Any) -> None:
    with pytest.raises(ValueError, match="budget") as caught:
        Region(STORE, budget=budget)
    assert repr(budget) in str(caught.value)


@pytest.mark.parametrize("budget", [1e9, math.nan, -math.inf, [], b"1"], ids=repr)
def test_a_budget_of_another_type(budget: Any) -> None:
    with pytest.raises(TypeError, match="budget must be bytes as an integer or text"):
        Region(STORE, budget=budget)


@pytest.mark.parametrize("store", ["x.npy", None, b"data", 5, PatternStore], ids=repr)
def test_no_store(store: Any) -> None:
    with pytest.raises(TypeError, match="FileStore"):
        Region(store)


def test_no_pager() -> None:
    with pytest.raises(TypeError, match=r"pager must be a userfault.Pager, not int"):
        Region(STORE, pager=5)  # type: ignore[arg-type]  # that is the point


def test_a_store_that_does_not_pickle() -> None:
    with pytest.raises(StoreError, match="UnpicklableStore does not pickle") as caught:
        Region(UnpicklableStore(100))
    assert "define its class in a module that can be imported" in str(caught.value)


class Holding(PatternStore):
    def __init__(self, thing: object) -> None:
        super().__init__(100)
        self.thing = thing


class Elsewhere(PatternStore):
    pass


@pytest.mark.parametrize("thing", [lambda: 0, threading.Lock()], ids=["lambda", "lock"])
def test_a_store_that_holds_what_does_not_pickle(thing: object) -> None:
    with pytest.raises(StoreError, match="Holding does not pickle"):
        open_array(Holding(thing))


def test_a_store_whose_class_is_in_main(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Elsewhere, "__module__", "__main__")
    with pytest.raises(StoreError, match="Elsewhere is defined in __main__"):
        Region(Elsewhere(100))


def test_a_store_that_the_pager_cannot_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """The class is importable here, by a trick, and nowhere else."""
    import sys
    import types

    module = types.ModuleType("made_up_here")
    vars(module)["Elsewhere"] = Elsewhere
    monkeypatch.setattr(Elsewhere, "__module__", "made_up_here")
    monkeypatch.setitem(sys.modules, "made_up_here", module)
    with pytest.raises(StoreError, match="could not make the store") as caught:
        Region(Elsewhere(100))
    assert "made_up_here" in caught.value.cause


@pytest.mark.parametrize("size", [0, -1, -(1 << 62)])
def test_a_store_of_no_size(size: int) -> None:
    with pytest.raises(ValueError, match=str(size)):
        Region(LyingSizeStore(STORE, size))


@pytest.mark.parametrize("size", ["100", 5.0, None, True], ids=repr)
def test_a_store_whose_size_is_no_integer(size: Any) -> None:
    with pytest.raises(TypeError, match=f"size must be an integer, not {size!r}"):
        Region(LyingSizeStore(STORE, size))


@pytest.mark.parametrize("power", [47, 50, 62, 63, 64, 100])
def test_a_store_larger_than_the_address_space(power: int) -> None:
    with pytest.raises((KernelError, ValueError), match=str(1 << power)):
        Region(PatternStore(1 << power))


def test_a_pager_that_is_closed() -> None:
    with userfault.Pager() as pager:
        pass
    with pytest.raises(userfault.PagerLostError, match="closed"):
        Region(STORE, pager=pager)
