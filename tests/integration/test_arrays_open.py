"""open_array: every type without objects, both orders, any shape, every version of the header; and raw items."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.lib import format as npy

import userfault
from userfault import FileStore, MemoryStore, PagedArray, open_array
from userfault.testing import PatternStore

pytestmark = pytest.mark.usefixtures("default_pager")

TYPES: dict[str, Any] = {
    **{name: name for name in ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")},
    **{name: name for name in (">i2", ">u4", ">f8", ">c16", ">U3", ">M8[s]", "S1", "S7", "U1", "U5", "V1", "V13")},
    "longdouble": np.longdouble,
    "clongdouble": np.clongdouble,
    "datetime": "M8[us]",
    "date": "M8[D]",
    "timedelta": "m8[ns]",
    "time without unit": "m8",
    "structured": [("x", "i4"), ("y", ">f8"), ("name", "S5")],
    "aligned": np.dtype([("a", "i1"), ("b", "f8"), ("c", "i2")], align=True),
    "offsets": np.dtype({"names": ["a", "b"], "formats": ["i2", "f4"], "offsets": [2, 10], "itemsize": 20}),
    "nested": [("p", [("x", "f4"), ("q", [("deep", "u2", (2,))])]), ("n", "i8")],
    "subarrays": [("m", "f8", (2, 3)), ("s", "U2", (4,))],
    "titles": [(("a title", "t"), "i4"), ("u", "f2")],
}


def values(dtype: Any, count: int) -> np.ndarray:
    """Items with a pattern in every byte that means something in this type."""
    kind = np.dtype(dtype)
    raw = np.frombuffer(PatternStore(count * kind.itemsize).expected(0, count * kind.itemsize), "u1")
    if kind.kind in "SU":
        return np.array([f"{i:x}"[: kind.itemsize] for i in range(count)], kind)
    if kind.kind == "b":
        return (raw % 2).view(kind)
    if kind.kind in "fc":
        return (np.arange(count) / 7 - 3).astype(kind)
    return raw.copy().view(kind) if kind.kind != "V" or kind.names is None else structured(kind, count)


def structured(kind: np.dtype[Any], count: int) -> np.ndarray:
    made = np.zeros(count, kind)
    for name in kind.names or ():
        field = kind[name]
        base = values(field.base, count * math.prod(field.shape))
        made[name] = base.reshape(count, *field.shape)
    return made


def saved(tmp_path: Path, array: np.ndarray, version: tuple[int, int] | None = None) -> Path:
    path = tmp_path / "saved.npy"
    with open(path, "wb") as file:
        npy.write_array(file, array, version)
    return path


def same(opened: PagedArray, array: np.ndarray) -> None:
    """Type, shape, order and every byte."""
    assert type(opened) is PagedArray
    assert opened.dtype == array.dtype
    assert opened.dtype.isnative == array.dtype.isnative
    assert opened.shape == array.shape
    assert opened.flags.f_contiguous == array.flags.f_contiguous
    assert opened.tobytes("A") == array.tobytes("A")
    assert not opened.flags.writeable


@pytest.fixture(autouse=True)
def every_region_ends(default_pager: userfault.Pager) -> Iterator[None]:
    yield
    assert default_pager.regions == 0


# -- .npy -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Stored array in format:UserWarning")
@pytest.mark.parametrize("name", TYPES)
def test_every_type_without_objects(name: str, tmp_path: Path) -> None:
    array = values(TYPES[name], 60).reshape(3, 20)
    for order in (array, np.asfortranarray(array)):
        with open_array(saved(tmp_path, order), block_size=4096) as opened:
            same(opened, order)
            assert opened[1, 2] == array[1, 2] or opened[1, 2].tobytes() == array[1, 2].tobytes()


SHAPES = [(), (1,), (1000,), (30, 40), (1, 1, 1), (7, 1, 11), (2, 3, 4, 5), (2, 1, 3, 1, 4), (1,) * 32]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{len(shape)}-d {shape[:5]}")
def test_every_shape_in_both_orders(shape: tuple[int, ...], tmp_path: Path) -> None:
    array = np.arange(math.prod(shape), dtype="i4").reshape(shape)
    for order in (array, np.asfortranarray(array)):
        with open_array(saved(tmp_path, order)) as opened:
            same(opened, order)
            assert np.array_equal(opened, order)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_the_header(version: tuple[int, int], tmp_path: Path) -> None:
    array = values(TYPES["nested"], 500)
    with open_array(saved(tmp_path, array, version)) as opened:
        same(opened, array)


@pytest.mark.filterwarnings("ignore:Stored array in format:UserWarning")
@pytest.mark.parametrize("fields", [["größe", "naïve"], ["温度", "圧力"], ["🌡", "x"]])
def test_field_names_in_any_language(fields: list[str], tmp_path: Path) -> None:
    array = np.zeros(10, [(field, "f8") for field in fields])
    array[fields[0]] = np.arange(10)
    with open_array(saved(tmp_path, array)) as opened:
        same(opened, array)
        assert opened[fields[0]].sum() == 45


@pytest.mark.filterwarnings("ignore:Stored array in format:UserWarning")
def test_a_long_header(tmp_path: Path) -> None:
    kind = [(f"a field with a long name, number {i}", "u1") for i in range(150)]
    with open_array(saved(tmp_path, np.ones(50, kind))) as opened:
        assert opened.region.size > 5000
        same(opened, np.ones(50, kind))


@pytest.mark.parametrize("count", [511, 512, 513, 8176, 8192, 100_000])
def test_sizes_around_pages_and_blocks(count: int, tmp_path: Path) -> None:
    array = np.arange(count, dtype="f8")
    with open_array(saved(tmp_path, array), block_size="4KiB") as opened:
        assert opened[-1] == count - 1
        same(opened, array)


def test_what_follows_the_data_is_ignored(tmp_path: Path) -> None:
    path = saved(tmp_path, np.arange(10))
    with open(path, "ab") as file:
        file.write(b"more")
    with open_array(path) as opened:
        same(opened, np.arange(10))


def test_a_path_may_be_text_or_path_and_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, np.arange(10))
    monkeypatch.chdir(tmp_path)
    for source in (path, str(path), "saved.npy", Path("saved.npy")):
        with open_array(source) as opened:
            monkeypatch.chdir("/")  # before the first touch
            same(opened, np.arange(10))
        monkeypatch.chdir(tmp_path)


def test_any_store_will_do(tmp_path: Path) -> None:
    array = np.arange(5000.0).reshape(50, 100)
    data = saved(tmp_path, array).read_bytes()
    (tmp_path / "shifted").write_bytes(b"#" * 999 + data)
    for store in (MemoryStore(data), FileStore(tmp_path / "saved.npy"), FileStore(tmp_path / "shifted", 999)):
        with open_array(store) as opened:
            same(opened, array)
            assert opened.region.store is store


def test_what_is_expected_may_be_said(tmp_path: Path) -> None:
    path = saved(tmp_path, np.zeros((3, 4), ">i2"))
    for dtype, shape in ((">i2", None), (None, (3, 4)), (np.dtype(">i2"), [3, 4])):
        with open_array(path, dtype=dtype, shape=shape) as opened:
            assert opened.shape == (3, 4)


npy_arrays = hnp.arrays(
    dtype=st.one_of(
        hnp.scalar_dtypes(),
        hnp.byte_string_dtypes(min_len=1),
        hnp.unicode_string_dtypes(min_len=1),
        hnp.array_dtypes(hnp.scalar_dtypes(), allow_subarrays=True),
        hnp.nested_dtypes(hnp.scalar_dtypes(), max_leaves=4),
    ).filter(lambda dtype: dtype.itemsize > 0),
    shape=hnp.array_shapes(min_dims=0, max_dims=5, max_side=4),
)


@pytest.mark.filterwarnings("ignore:Stored array in format:UserWarning")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(array=npy_arrays, fortran=st.booleans())
def test_whatever_numpy_saves_is_opened_as_numpy_loads_it(array: np.ndarray, fortran: bool) -> None:
    file = io.BytesIO()
    np.save(file, np.asfortranarray(array) if fortran else array, allow_pickle=False)
    file.seek(0)
    loaded = np.load(file)
    with open_array(MemoryStore(file.getvalue())) as opened:
        same(opened, loaded)


# -- raw ------------------------------------------------------------------------------------------------------------

DATA = np.arange(12_000, dtype="u2")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "raw.bin"
    path.write_bytes(DATA.tobytes())
    return path


def test_raw_bytes_are_bytes_by_default(raw: Path) -> None:
    with open_array(raw) as opened:
        same(opened, DATA.view("u1"))


@pytest.mark.parametrize("dtype", ["u2", ">u2", "u4", "f8", "S3", "V5", [("a", "u2"), ("b", "u4")], np.uint16, int])
def test_raw_items_go_to_the_end(raw: Path, dtype: Any) -> None:
    with open_array(raw, dtype=dtype) as opened:
        same(opened, DATA.view(dtype))


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4096, 23_000, 23_998])
def test_raw_items_begin_where_one_says(raw: Path, offset: int) -> None:
    data = DATA.tobytes()[offset:]
    with open_array(raw, dtype="u1", offset=offset) as opened:
        assert opened.tobytes() == data
    with open_array(raw, dtype="u2", shape=1, offset=offset) as opened:  # aligned or not
        assert opened[0] == int.from_bytes(data[:2], "little")


@pytest.mark.parametrize(
    "shape", [5, (5,), [5], (3, 4), (1, 2, 3), (12_000,), (), np.array([2, 6]), np.int64(7)], ids=repr
)
@pytest.mark.parametrize("order", ["C", "F"])
def test_raw_items_have_the_shape_one_gives(raw: Path, shape: Any, order: Any) -> None:
    wanted = tuple(np.atleast_1d(shape)) if not isinstance(shape, tuple) else shape
    expected = DATA[: math.prod(map(int, wanted))].reshape(wanted, order=order)
    with open_array(raw, dtype="u2", shape=shape, order=order) as opened:
        assert opened.shape == expected.shape
        assert np.array_equal(opened, expected)
        assert opened.flags.f_contiguous == expected.flags.f_contiguous


def test_a_npy_file_is_raw_if_one_asks(tmp_path: Path) -> None:
    path = saved(tmp_path, np.arange(100, dtype="u1"))
    with open_array(path, dtype="u1", offset=128) as opened:
        same(opened, np.arange(100, dtype="u1"))


def test_options_reach_the_region(raw: Path) -> None:
    with open_array(raw, "c", "u2", block_size="8KiB", budget="1MiB") as opened:
        assert (opened.region.block_size, opened.region.budget, opened.region.mode) == (8192, 1 << 20, "c")
        assert opened.flags.writeable
        opened[5] = 1
        assert opened[5] == 1
    assert raw.read_bytes() == DATA.tobytes()


# -- what an array can do besides -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "blocks"),
    [
        (np.s_[0], [0]),
        (np.s_[5, 7], [0]),
        (np.s_[...], range(8)),
        (np.s_[:], range(8)),
        (np.s_[20:40], [2, 3, 4]),
        (np.s_[::63], [0, 7]),
        (np.s_[::16, 3], [0, 2, 4, 6]),
        (np.s_[40::-20], [0, 2, 5]),
        (np.s_[:, 3], range(8)),
        (np.s_[63:62:-1, 1020:], [7]),
        (np.s_[-1], [7]),
        (np.s_[5:5], []),
        (np.s_[1, ..., 3], [0]),
        (np.s_[..., None], range(8)),
        (np.int64(15), [1]),
    ],
)
def test_ensure_takes_what_stands_between_brackets(index: Any, blocks: Any, tmp_path: Path) -> None:
    store = PatternStore(64 * 1024 * 8)  # 64 rows of 8 KiB, so a block is 8 rows
    with open_array(store, dtype="f8", shape=(64, 1024)) as opened:
        opened.ensure(index)
        assert [number for number, state in enumerate(opened.region.residency()) if state] == list(blocks)
        assert opened.region.stats().faults == 0


def test_ensure_for_writing(raw: Path) -> None:
    with open_array(raw, "c", "u2", block_size=4096) as opened:
        opened.ensure(np.s_[:10], write=True)
        assert opened.region.residency()[:2] == bytes([userfault.BlockState.PRIVATE, userfault.BlockState.ABSENT])
        opened[:2048] = 5
        assert opened.region.stats().faults == 0


@pytest.mark.parametrize("index", [100_000, (0, 0), slice("x"), -100_000])
def test_ensure_of_nothing_there_is_an_error_of_numpys(raw: Path, index: Any) -> None:
    with open_array(raw, dtype="u2") as opened, pytest.raises((IndexError, TypeError)):
        opened.ensure(index)


@pytest.mark.parametrize(
    "index", ["x", 1.5, True, [1, 2], np.array([1, 2]), np.array([True]), ([1], 2), (True,), np.array(3)]
)
def test_ensure_takes_no_fancy_index(raw: Path, index: Any) -> None:
    with open_array(raw, dtype="u2") as opened, pytest.raises(TypeError, match="integers and slices"):
        opened.ensure(index)


def test_slices_have_a_region(raw: Path) -> None:
    with open_array(raw, dtype="u2") as opened:
        region = opened.region
        views = [opened[5:], opened[::2], opened.reshape(3, -1).T, opened.view("u1"), opened[3:4][0:1], opened[...]]
        assert all(isinstance(view, PagedArray) and view.region is region for view in views)
        views.clear()


def test_results_are_ordinary_arrays_and_scalars(raw: Path) -> None:
    with open_array(raw, dtype="u2") as opened:
        assert type(opened + 1) is type(np.add(opened, opened)) is type(opened.cumsum()) is np.ndarray
        assert type(opened.sum()) is type(DATA.sum())
        assert type(opened[5]) is np.uint16
        assert type(opened.max()) is np.uint16
        for copied in (opened.copy(), opened[[1, 2]], np.sort(opened), opened.astype("f4"), opened[opened > 5]):
            assert not np.shares_memory(copied, opened)
            if isinstance(copied, PagedArray):
                with pytest.raises(userfault.RegionClosedError, match="ordinary memory"):
                    copied.region  # noqa: B018  # a property that raises
                copied.close()  # does nothing


def test_flush_has_nothing_to_do(raw: Path) -> None:
    with open_array(raw) as opened:
        opened.flush()
    with pytest.raises(userfault.RegionClosedError):
        opened.flush()
