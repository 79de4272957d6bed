"""What every store shares: defaults, checks, and what a user may write instead of a store."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

import userfault.stores
from userfault.stores import FileStore, MemoryStore, Store, check_store, open_store
from userfault.stores.base import check_range
from userfault.testing import LyingSizeStore, PatternStore, run_child


class Zeros(Store):
    """The least that a store must be."""

    size = 100

    def read_into(self, offset: int, buffer: memoryview) -> None:
        check_range(self, offset, buffer.nbytes)
        buffer[:] = bytes(buffer.nbytes)


def test_the_least_store_has_defaults_for_all_the_rest() -> None:
    store = Zeros()

    assert store.locate(0, 10) == 0
    assert store.read_now(0, memoryview(bytearray(10))) is False
    assert (store.writable, store.concurrency) == (False, 8)
    assert store.identity() is None
    assert store.describe() == repr(store) == "Zeros"
    store.close()


def test_a_store_that_is_not_writable_refuses_to_write() -> None:
    with pytest.raises(io.UnsupportedOperation, match="Zeros is not writable"):
        Zeros().write(0, memoryview(b"x"))
    with pytest.raises(io.UnsupportedOperation, match="Zeros is not writable"):
        Zeros().flush()


def test_a_store_must_be_able_to_read() -> None:
    class Nothing(Store):
        size = 1

    with pytest.raises(TypeError, match="abstract method"):
        Nothing()  # type: ignore[abstract]


def test_a_good_store_passes_its_check() -> None:
    store = Zeros()

    assert check_store(store) is store


@pytest.mark.parametrize("size", [12.0, "12", None, True])
def test_a_size_of_the_wrong_type_is_refused(size: Any) -> None:
    with pytest.raises(TypeError, match=r"LyingSizeStore\(.*\): size must be an integer, not "):
        check_store(LyingSizeStore(PatternStore(10), size))


@pytest.mark.parametrize("size", [0, -1])
def test_a_size_out_of_range_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"size must be at least 1, got {size}"):
        check_store(LyingSizeStore(PatternStore(10), size))


def test_a_store_without_a_size_is_refused() -> None:
    class Sizeless(Zeros):
        size = property(lambda self: None)

    with pytest.raises(TypeError, match="Sizeless: size must be an integer, not None"):
        check_store(Sizeless())


@pytest.mark.parametrize(("concurrency", "error"), [(-1, ValueError), (1.5, TypeError), (None, TypeError)])
def test_a_wrong_concurrency_is_refused(concurrency: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="concurrency must be"):
        check_store(PatternStore(10, concurrency=concurrency))


@pytest.mark.parametrize("thing", [b"data", None, 7, Zeros])
def test_what_is_no_store_is_refused_with_a_remedy(thing: object) -> None:
    with pytest.raises(TypeError, match=r"expected a Store, got .*: pass a path, userfault\.stores\.MemoryStore"):
        check_store(thing)


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (100, 1), (0, 101), (99, 2)])
def test_a_range_outside_is_refused(offset: int, length: int) -> None:
    with pytest.raises(ValueError, match=f"Zeros: offset {offset}, length {length} is outside its 100 bytes"):
        check_range(Zeros(), offset, length)


# -- open_store -----------------------------------------------------------------------------------------------


def test_a_path_opens_a_file(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"hello")

    assert open_store(path) == open_store(str(path)) == FileStore(path)


def test_a_store_opens_as_itself() -> None:
    store = MemoryStore(b"hello")

    assert open_store(store) is store


def test_a_bad_store_does_not_open() -> None:
    with pytest.raises(ValueError, match="size must be at least 1"):
        open_store(LyingSizeStore(PatternStore(10), 0))


def test_an_address_without_a_store_is_refused() -> None:
    with pytest.raises(ValueError, match="no store for s3:// addresses: pass a path, or a Store"):
        open_store("s3://bucket/key")


def test_bytes_are_refused_with_a_remedy() -> None:
    with pytest.raises(TypeError, match=r"got bytes; for bytes in memory pass .*MemoryStore\(data\)"):
        open_store(b"data")  # type: ignore[arg-type]


# -- the package ----------------------------------------------------------------------------------------------


def test_every_public_name_is_there() -> None:
    assert all(getattr(userfault.stores, name) for name in userfault.stores.__all__)
    assert dir(userfault.stores) == userfault.stores.__all__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Nope'"):
        userfault.stores.Nope  # noqa: B018


_HEAVY = "typing dataclasses inspect re logging asyncio subprocess concurrent.futures numpy pathlib random pytest"


@pytest.mark.parametrize("module", ["base", "memory", "file", "opening", "belief", "page_cache", "descriptors"])
def test_a_pager_gets_a_store_without_heavy_modules(module: str) -> None:
    source = f"""
import sys
before = set(sys.modules)
import userfault.stores.{module}
print(sorted((set(sys.modules) - before) & set({_HEAVY.split()!r})))
"""
    assert run_child(source).check().stdout == "[]\n"
