"""Reading from a store as the pager does: here, and in another process."""

from __future__ import annotations

import pickle

from .child import run_child

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from userfault.stores.base import Store

__all__ = ["POISON", "read_bytes", "read_elsewhere"]

POISON = 0xA5
"""What is in a buffer before it is read into: bytes that a store leaves as they were can be told from zeros."""


def read_bytes(store: Store, offset: int, length: int) -> bytes:
    """Read by ``read_into``, into a buffer that holds something else before."""
    buffer = bytearray([POISON]) * length
    store.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def read_elsewhere(store: Store, ranges: Sequence[tuple[int, int]], *, timeout: float = 60) -> list[bytes]:
    """Pickle a store to a fresh interpreter, and return what it reads there from each pair of offset and length.

    Raises:
        ChildError: It could not be unpickled there, or not read.
    """
    result: list[bytes] = run_child(_read_pickled, pickle.dumps(store, 5), ranges, timeout=timeout).check().value
    return result


def _read_pickled(pickled: bytes, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    store: Store = pickle.loads(pickled)
    try:
        return [read_bytes(store, offset, length) for offset, length in ranges]
    finally:
        store.close()
