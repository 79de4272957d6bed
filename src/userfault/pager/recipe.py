"""How a store travels to the pager: by pickle, as with multiprocessing's `spawn`.

The recipe of a store is its pickle, and whatever large buffers the pickle hands out of band (protocol 5), so that a
store over a gigabyte of memory is neither copied into the pickle nor out of it: in the worker its buffer is the shared
memory itself.  A store of the user's own also needs the user's `sys.path`; for the stores that come with us nothing is
imported that was not asked for.  Pickles are read by the pager from its application, never the other way round.
"""

from __future__ import annotations

import marshal
import os
import site
import struct
import sys
from _pickle import dumps, loads  # the C half: the Python half drags in half of the standard library

from userfault.blocks.geometry import PAGE_SIZE, round_up
from userfault.errors import StoreError
from userfault.stores.base import Store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pickle import PickleBuffer

_LENGTH = struct.Struct("=Q")
_REMEDY = (
    "a store travels to the pager by pickle, as with multiprocessing's spawn: "
    "define its class in a module that can be imported, and give it arguments that pickle"
)


class Recipe:
    """A store, ready to be written into a memfd."""

    __slots__ = ("_buffers", "_head", "length")

    def __init__(self, store: Store) -> None:
        """Pickle `store`.

        Raises:
            StoreError: if it cannot travel; the message says what it would take.
        """
        kind = type(store)
        if kind.__module__ == "__main__":
            raise StoreError(
                f"class {kind.__qualname__} is defined in __main__, which no other process can import; {_REMEDY}"
            )
        buffers: list[PickleBuffer] = []
        try:
            pickled = dumps(store, protocol=5, buffer_callback=buffers.append)
        except Exception as error:
            raise StoreError(f"{kind.__qualname__} does not pickle ({error}); {_REMEDY}") from error
        self._buffers = [memoryview(buffer.raw()) for buffer in buffers]
        foreign = not kind.__module__.startswith("userfault.")
        lengths = [len(buffer) for buffer in self._buffers]
        head = marshal.dumps((sys.path if foreign else [], pickled, lengths))
        self._head = _LENGTH.pack(len(head)) + head
        self.length = len(self._head) + sum(PAGE_SIZE + round_up(n, PAGE_SIZE) for n in lengths)

    def write(self, fd: int, offset: int) -> None:
        """Write it into a file at `offset`, a multiple of the page size."""
        _write_all(fd, memoryview(self._head), offset)
        offset += round_up(len(self._head), PAGE_SIZE)
        for buffer in self._buffers:
            _write_all(fd, buffer, offset)
            offset += round_up(len(buffer), PAGE_SIZE)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(fd, data[: 1 << 30], offset)
        data, offset = data[done:], offset + done


def load(recipe: memoryview) -> Store:
    """Make the store of a recipe, in the pager. The result may use the recipe's memory as long as it lives.

    Raises:
        StoreError: if it cannot be made here; `cause` says why.
    """
    (length,) = _LENGTH.unpack_from(recipe)
    path, pickled, lengths = marshal.loads(recipe[_LENGTH.size : _LENGTH.size + length])  # noqa: S302  # our own
    offset, buffers = round_up(_LENGTH.size + length, PAGE_SIZE), []
    for size in lengths:
        buffers.append(recipe[offset : offset + size])
        offset += round_up(size, PAGE_SIZE)
    _extend_path(path)
    try:
        try:
            store: Store = loads(pickled, buffers=buffers)
        except ModuleNotFoundError:
            _run_path_files(path)  # an editable installation is found by a hook that only `site` installs
            store = loads(pickled, buffers=buffers)
    except BaseException as error:
        cause = f"{type(error).__name__}: {error}"
        raise StoreError(f"the pager could not make the store; {_REMEDY}", cause=cause) from error
    return store


class LateStore(Store):
    """Stands for a store that a former worker had and this one could not make again; each read tries once more.

    So one data base that is down fails its own region's blocks, and not the worker with all its regions.
    """

    concurrency = 1

    def __init__(self, recipe: memoryview, size: int) -> None:
        self.size = size
        self._recipe = recipe
        self._store: Store | None = None

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Make the store if there is none yet, and read from it."""
        store = self._store = self._store or load(self._recipe)
        if store.size != self.size:
            raise StoreError(f"the store has {store.size} bytes now, and had {self.size}")
        store.read_into(offset, buffer)


def _extend_path(path: list[str]) -> None:
    sys.path += [entry for entry in path if entry and entry not in sys.path]


def _run_path_files(path: list[str]) -> None:
    for entry in path:
        if entry.endswith(("site-packages", "dist-packages")):
            site.addsitedir(entry)
