"""From what a user writes to a store."""

from __future__ import annotations

import os

from .base import Store, check_store

__all__ = ["open_store"]


def open_store(source: str | os.PathLike[str] | Store, writable: bool = False) -> Store:
    """Return the store that a path or a store means; `writable` has a path opened for writing too.

    Raises:
        TypeError: Neither a path nor a store.
        ValueError: A URL: there is no store for its scheme; or an empty file.
        OSError: The file cannot be read: ``FileNotFoundError``, ``IsADirectoryError``, ``PermissionError``.
    """
    if isinstance(source, Store):
        return check_store(source)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            f"expected a path or a Store, got {type(source).__name__}; "
            "for bytes in memory pass userfault.stores.MemoryStore(data)"
        )
    path = os.fsdecode(source)
    scheme, separator, _ = path.partition("://")
    if separator and scheme.isalnum():
        raise ValueError(f"no store for {scheme}:// addresses: pass a path, or a Store of your own")
    from .file import FileStore

    return FileStore(path, writable=writable)
