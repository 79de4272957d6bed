"""MemoryStore beyond the conformance kit: kinds of buffers, and travelling without a copy."""

from __future__ import annotations

import array
import mmap
import pickle

import pytest

from userfault.kernel.memory import address_of
from userfault.stores import MemoryStore
from userfault.testing import touch
from userfault.testing.reading import read_bytes


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda data: array.array("H", data)])
def test_it_takes_any_contiguous_buffer(kind: type) -> None:
    store = MemoryStore(kind(b"abcdefgh"))

    assert store.size == 8
    assert read_bytes(store, 2, 4) == b"cdef"


def test_it_takes_a_mapping() -> None:
    with mmap.mmap(-1, 4096) as mapping:
        mapping[:5] = b"hello"
        store = MemoryStore(mapping)

        assert read_bytes(store, 0, 5) == b"hello"
        del store


def test_it_counts_bytes_not_elements() -> None:
    view = memoryview(bytes(24)).cast("d", (3,))

    assert MemoryStore(view).size == 24


def test_it_takes_several_dimensions() -> None:
    assert MemoryStore(memoryview(bytes(24)).cast("B", (4, 6))).size == 24


@pytest.mark.parametrize("data", [b"", bytearray(), memoryview(b"")])
def test_no_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="data is empty: a region needs at least one byte"):
        MemoryStore(data)


def test_scattered_bytes_are_refused() -> None:
    with pytest.raises(TypeError, match="not C-contiguous: pass a contiguous copy"):
        MemoryStore(memoryview(b"abcdef")[::2])


@pytest.mark.parametrize("thing", ["text", 7, None])
def test_what_is_no_buffer_is_refused(thing: object) -> None:
    with pytest.raises(TypeError, match="bytes-like"):
        MemoryStore(thing)  # type: ignore[arg-type]


def test_it_does_not_copy() -> None:
    data = bytearray(b"hello")
    store = MemoryStore(data)

    data[0] = ord("j")

    assert read_bytes(store, 0, 5) == b"jello"
    assert store.locate(1, 4) == address_of(data) + 1


def test_its_data_cannot_be_resized_beneath_it() -> None:
    data = bytearray(b"hello")
    store = MemoryStore(data)

    with pytest.raises(BufferError):
        data.append(0)
    assert touch(store.locate(0, 5), 5) == b"hello"


def test_it_travels_without_a_copy() -> None:
    data = bytes(1 << 20)
    buffers: list[pickle.PickleBuffer] = []
    stream = pickle.dumps(MemoryStore(data), 5, buffer_callback=buffers.append)

    received = bytearray(data)
    twin = pickle.loads(stream, buffers=[memoryview(received)])

    assert len(stream) < 500
    assert [address_of(buffer.raw()) for buffer in buffers] == [address_of(data)]
    assert twin.locate(0, 1) == address_of(received)


def test_it_hashes_like_its_equals() -> None:
    assert hash(MemoryStore(b"abc")) == hash(MemoryStore(bytearray(b"abc")))
    assert MemoryStore(b"abc") != MemoryStore(b"abd")
    assert MemoryStore(b"abc") != b"abc"


def test_it_describes_itself() -> None:
    assert MemoryStore(bytes(12)).describe() == "MemoryStore(12 bytes)"
