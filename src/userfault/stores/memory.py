"""A store whose bytes are there already: the simplest one, and the one for tests."""

from __future__ import annotations

from userfault.kernel.memory import address_of

from .base import Store, check_range

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from typing_extensions import Buffer

__all__ = ["MemoryStore"]


class MemoryStore(Store):
    """Bytes in memory.

    With pickle protocol 5 and ``buffer_callback`` the data travel out of band, and arrive as a view of what
    the receiver has got: gigabytes reach the pager without a copy on the way. They are the bytes of the
    moment of pickling.

    Any thread may read. After a fork the child has its own copy.

    Args:
        data: Anything that is one contiguous buffer: ``bytes``, ``bytearray``, ``mmap``, a C-contiguous
            array. It is looked at, not copied, and cannot be resized as long as the store lives.

    Raises:
        TypeError: Not a buffer, or not contiguous.
        ValueError: Empty.

    Example:
        >>> store = MemoryStore(b"hello, world")
        >>> store.size
        12
    """

    concurrency = 0

    def __init__(self, data: Buffer) -> None:
        view = memoryview(data)
        if not view.c_contiguous:
            raise TypeError("data is not C-contiguous: pass a contiguous copy, such as bytes(data)")
        if not view.nbytes:
            raise ValueError("data is empty: a region needs at least one byte")
        self._view = view.cast("B").toreadonly()
        self._address = address_of(self._view)
        self.size = view.nbytes

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Copy from memory; see ``Store.read_into``.

        Raises:
            ValueError: The range is not in the store.
        """
        check_range(self, offset, buffer.nbytes)
        buffer[:] = self._view[offset : offset + buffer.nbytes]

    def locate(self, offset: int, length: int) -> int:
        """Return the address of the bytes: they never need waiting for."""
        return self._address + offset

    def read_now(self, offset: int, buffer: memoryview) -> bool:
        """Copy from memory; never ``False``."""
        buffer[:] = self._view[offset : offset + buffer.nbytes]
        return True

    def describe(self) -> str:
        """Return the type and the size."""
        return f"MemoryStore({self.size} bytes)"

    def __eq__(self, other: object) -> bool:
        return self._view == other._view if isinstance(other, MemoryStore) else NotImplemented

    def __hash__(self) -> int:
        # Equal stores have equal sizes. The bytes themselves may change, if the owner of the data writes to
        # it.
        return hash((MemoryStore, self.size))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        if protocol < 5:
            return type(self), (self._view.tobytes(),)
        from pickle import PickleBuffer

        return type(self), (PickleBuffer(self._view),)
