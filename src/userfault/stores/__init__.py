"""Where a region's bytes live.

* ``base``: ``Store``, what a store promises; subclass it for one of your own.
* ``memory``: ``MemoryStore``, bytes that are there already.
* ``file``: ``FileStore``, a file or a part of one; with ``page_cache`` and ``belief``, which tell whether
  reading it would wait, and ``descriptors``, which keeps thousands of files within the limit on open ones.
* ``opening``: ``open_store``, from what a user writes to a store.

Stores run in the pager's processes: nothing here costs memory before it is used.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .base import Store, check_store
    from .file import FileStore
    from .memory import MemoryStore
    from .opening import open_store

_HOME = {
    "FileStore": "file",
    "MemoryStore": "memory",
    "Store": "base",
    "check_store": "base",
    "open_store": "opening",
}

__all__ = ["FileStore", "MemoryStore", "Store", "check_store", "open_store"]


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
