"""What a store is: the one interface between a region and the place where its bytes live.

The pager calls a store in three ways, the quickest first:

1. ``locate()``: are the bytes in this process's memory already? Then the kernel copies them from there.
2. ``read_now()``: can they be had without waiting?
3. ``read_into()``: have them, however long it takes, on a thread of its own.

Only the third must be written. The first two are called in the fault loop, which serves every region of the
application: **they must never wait**, and answer "no" when in doubt.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Hashable

__all__ = ["Store", "check_range", "check_store"]


class Store(ABC):
    """Where a region's bytes live. Runs in the pager; may be called from several threads at once.

    A store of your own travels to the pager by pickle: the class must be importable and its state picklable.
    Open files, sockets and locks are therefore made at the first read, not in the constructor. The pager is
    started by exec and never forks, so a store meets no fork; in the application, a forked child must not use
    its parent's connections.

    A store that fails raises; whatever it raises becomes the cause of a ``StoreError``.
    ``userfault.testing.StoreTests`` checks a store against everything that is promised here.

    Example:
        >>> class Zeros(Store):
        ...     size = 1 << 20
        ...     concurrency = 0
        ...     def read_into(self, offset, buffer):
        ...         buffer[:] = bytes(len(buffer))

    Attributes:
        size: Bytes; at least 1; does not change.
        writable: Whether ``write`` and ``flush`` work.
        concurrency: Reads that may be in flight at once. 0: it answers from memory and is called in the fault
            loop.
    """

    size: int
    writable: bool = False
    concurrency: int = 8

    @abstractmethod
    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill all of the buffer with the bytes from ``offset`` on, or raise.

        Any thread, several at once. The GIL should be released while it waits. The buffer must not be kept.

        Args:
            offset: First byte, in the store.
            buffer: Writable bytes (format ``"B"``); offset plus length is at most ``size``.
        """

    def locate(self, offset: int, length: int) -> int:
        """Return the address, in this process, of bytes that can be copied now without waiting; else 0.

        Called once for each fault, so it must be quick, and by one thread at a time. The range is one block:
        it lies in one 2 MiB piece of the store, counted from the store's start. The address must stay valid
        until ``close()``. It is used at once, and only by system calls such as ``UFFDIO_COPY``, which answer
        EFAULT rather than crash should a file have shrunk beneath it.
        """
        return 0

    def read_now(self, offset: int, buffer: memoryview) -> bool:
        """Fill the buffer if that needs no waiting, and say so. After ``False`` its content means nothing.

        Called in the fault loop by one thread at a time. It raises nothing: ``read_into`` will say what is
        wrong.
        """
        return False

    def write(self, offset: int, data: memoryview) -> None:
        """Take these bytes. Any thread, several at once, never two for one byte.

        What was taken is what is read from then on, in another process too: this one may be killed at any moment. Only
        against the end of the machine does it wait for ``flush``.

        Raises:
            io.UnsupportedOperation: The store is not writable.
        """
        raise io.UnsupportedOperation(f"{self.describe()} is not writable")

    def flush(self) -> None:
        """Make everything written durable before returning.

        Raises:
            io.UnsupportedOperation: The store is not writable.
        """
        raise io.UnsupportedOperation(f"{self.describe()} is not writable")

    def close(self) -> None:  # noqa: B027  # most stores have nothing to give back
        """Give back what the store holds in this process. Twice is fine."""

    def identity(self) -> Hashable:
        """Return what is equal for the same, unchanged bytes in every process; ``None``: cannot tell."""
        return None

    def describe(self) -> str:
        """Return one line that names the store in messages."""
        return type(self).__name__

    def __repr__(self) -> str:
        return self.describe()


def check_store(store: object) -> Store:
    """Return a store if it keeps the rules that can be checked without reading from it.

    Raises:
        TypeError: Not a ``Store``, or one of its attributes is of the wrong type.
        ValueError: An attribute is out of range.
    """
    if not isinstance(store, Store):
        raise TypeError(
            f"expected a Store, got {type(store).__name__}: pass a path, userfault.stores.MemoryStore(data), "
            "or an instance of a subclass of userfault.stores.Store"
        )
    name = store.describe()
    _check_number(f"{name}: size", getattr(store, "size", None), least=1)
    _check_number(f"{name}: concurrency", store.concurrency, least=0)
    return store


def _check_number(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_range(store: Store, offset: int, length: int) -> None:
    """Refuse a range that does not lie in the store; for the ``read_into`` of a store.

    Raises:
        ValueError: It begins before the start or ends past the end.
    """
    if offset < 0 or offset + length > store.size:
        raise ValueError(f"{store.describe()}: offset {offset}, length {length} is outside its {store.size} bytes")
