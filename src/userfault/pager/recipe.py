"""How a store, and an eviction policy, travel to the pager: by pickle, as with multiprocessing's `spawn`.

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
from threading import Lock

from userfault.blocks import ledger as book
from userfault.blocks.geometry import PAGE_SIZE, round_up
from userfault.blocks.policies import DEFAULT, make_policy
from userfault.errors import StoreError
from userfault.pager.failure import name_of
from userfault.stores.base import Store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from pickle import PickleBuffer
    from typing import Any

    from userfault.blocks.ledger import Ledger
    from userfault.blocks.policies import EvictionPolicy

MOST_DEATHS = 3
_LENGTH = struct.Struct("=Q")
_STORE, _POLICY = "store", "eviction policy"
"""What travels, in the words of the messages."""
_REMEDY = (
    "a {} travels to the pager by pickle, as with multiprocessing's spawn: "
    "define its class in a module that can be imported, and give it arguments that pickle"
)


class Recipe:
    """A store, ready to be written into a memfd."""

    __slots__ = ("_buffers", "_head", "length")

    def __init__(self, store: Store, policy: str | EvictionPolicy = DEFAULT) -> None:
        """Pickle both.

        Raises:
            StoreError: if one cannot travel; the message says what it would take.
        """
        buffers: list[PickleBuffer] = []
        pickled = _pickle(_STORE, store, buffers.append)
        chosen = _pickle(_POLICY, policy, None)
        self._buffers = [memoryview(buffer.raw()) for buffer in buffers]
        path = sys.path if _is_users(store) or _is_users(policy) else []
        lengths = [len(buffer) for buffer in self._buffers]
        head = marshal.dumps(
            (path, store.concurrency, pickled, lengths, name_of(store)[:1000], _is_users(store), chosen)
        )
        self._head = _LENGTH.pack(len(head)) + head
        self.length = len(self._head) + sum(PAGE_SIZE + round_up(n, PAGE_SIZE) for n in lengths)

    def write(self, fd: int, offset: int) -> None:
        """Write it into a file at `offset`, a multiple of the page size."""
        _write_all(fd, memoryview(self._head), offset)
        offset += round_up(len(self._head), PAGE_SIZE)
        for buffer in self._buffers:
            _write_all(fd, buffer, offset)
            offset += round_up(len(buffer), PAGE_SIZE)


def _is_users(thing: object) -> bool:
    return not type(thing).__module__.startswith(("userfault.", "builtins"))


def _pickle(role: str, thing: object, keep: Callable[[PickleBuffer], object] | None) -> bytes:
    kind = type(thing)
    remedy = _REMEDY.format(role)
    if kind.__module__ == "__main__":
        raise StoreError(
            f"class {kind.__qualname__} is defined in __main__, which no other process can import; {remedy}"
        )
    try:
        return dumps(thing, protocol=5, buffer_callback=keep)
    except Exception as error:
        raise StoreError(f"{kind.__qualname__} does not pickle ({error}); {remedy}") from error


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(fd, data[: 1 << 30], offset)
        data, offset = data[done:], offset + done


class _Head:
    """What a recipe begins with: the rest are the store's buffers, each on pages of its own, from `end` on."""

    __slots__ = ("concurrency", "end", "foreign", "lengths", "name", "path", "pickled", "policy")

    def __init__(self, recipe: memoryview) -> None:
        (length,) = _LENGTH.unpack_from(recipe)
        fields = marshal.loads(recipe[_LENGTH.size : _LENGTH.size + length])  # noqa: S302  # our own application's
        self.path: list[str]
        self.concurrency: int
        self.pickled: bytes
        self.lengths: list[int]
        self.name: str
        self.foreign: bool
        self.policy: bytes
        self.path, self.concurrency, self.pickled, self.lengths, self.name, self.foreign, self.policy = fields
        self.end = round_up(_LENGTH.size + length, PAGE_SIZE)


def load(recipe: memoryview, size: int) -> Store:
    """Make the store of a recipe, in the pager. The result may use the recipe's memory as long as it lives.

    Raises:
        StoreError: if it cannot be made here, or does not have `size` bytes; `cause` says why.
    """
    head = _Head(recipe)
    buffers, offset = [], head.end
    for length in head.lengths:
        buffers.append(recipe[offset : offset + length])
        offset += round_up(length, PAGE_SIZE)
    store: Store = _unpickle(_STORE, head.path, head.pickled, buffers)
    if store.size != size:
        raise StoreError(
            f"the store has {store.size} bytes, but had {size} when the region was opened", store=store.describe()
        )
    return store


def _unpickle(role: str, path: list[str], pickled: bytes, buffers: list[memoryview]) -> Any:
    try:
        _extend_path(path)
        try:
            return loads(pickled, buffers=buffers)
        except ModuleNotFoundError:
            _run_path_files(path)  # an editable installation is found by a hook that only `site` installs
            return loads(pickled, buffers=buffers)
    except BaseException as error:
        cause = f"{type(error).__name__}: {error}"
        raise StoreError(f"the pager could not make the {role}; {_REMEDY.format(role)}", cause=cause) from error


def load_policy(recipe: memoryview) -> EvictionPolicy:
    """Make the eviction policy of a recipe, in the pager.

    Raises:
        StoreError: if it cannot be made here; `cause` says why.
    """
    head = _Head(recipe)
    return make_policy(_unpickle(_POLICY, head.path, head.policy, []))


def load_counted(ledger: Ledger) -> Store:
    """Make the store of a region, and keep count in its ledger of the workers that die of it.

    Raises:
        StoreError: as `load`; or if it has ended three of them in a row.
    """
    words = ledger.words
    if words[book.W_DEATHS] >= MOST_DEATHS:
        raise StoreError(f"{words[book.W_DEATHS]} processes died while they made the store", permanent=True)
    words[book.W_DEATHS] += 1
    try:
        return load(ledger.recipe, ledger.geometry.size)
    finally:
        words[book.W_DEATHS] = 0


class LateStore(Store):
    """Stands for a store that a former worker had: made at the first read, by a reader, and tried again if need be.

    So a store that takes long to make delays no other region after a restart, and one that cannot be made again (a data
    base is down) fails its own region's blocks and not the worker with all its regions.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.size = ledger.geometry.size
        head = _Head(ledger.recipe)
        self._name = head.name
        self.concurrency = max(1, head.concurrency)
        self._ledger = ledger
        self._store: Store | None = None
        self._lock = Lock()

    def _made(self) -> Store:
        with self._lock:
            self._store = self._store or load_counted(self._ledger)
            return self._store

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Make the store if there is none yet, and read from it."""
        self._made().read_into(offset, buffer)

    def write(self, offset: int, data: memoryview) -> None:
        """Make the store if there is none yet, and write to it."""
        self._made().write(offset, data)

    def flush(self) -> None:
        """Make the store if there is none yet, and flush it."""
        self._made().flush()

    def describe(self) -> str:
        """Return what the store has called itself when it was passed in."""
        return self._name

    def close(self) -> None:
        """Close the store if there is one."""
        if self._store is not None:
            self._store.close()


def described(recipe: memoryview) -> str:
    """Return what the store has called itself when it was passed in."""
    return _Head(recipe).name


def is_foreign(recipe: memoryview) -> bool:
    """Whether the store is of a class of the user's own, of which nothing is known."""
    return _Head(recipe).foreign


def _extend_path(path: list[str]) -> None:
    sys.path += [entry for entry in path if entry and entry not in sys.path]


def _run_path_files(path: list[str]) -> None:
    for entry in path:
        if entry.endswith(("site-packages", "dist-packages")):
            site.addsitedir(entry)
