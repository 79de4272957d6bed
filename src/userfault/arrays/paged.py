"""PagedArray: an ordinary NumPy array whose memory is a region.

Closing an array
----------------
Facts about NumPy (2.x): a view of any kind keeps alive, as its `base`, the object that owns the memory, but the chain
of bases is only shortened while the types are the same.  So slices of a `PagedArray`, being of its type, hold it;
plain arrays made from it hold what lies beneath it, a hidden plain array, the root; and buffers (`memoryview`,
`ctypes`, `PickleBuffer`) hold the array itself.  NumPy counts none of them.

`close()` is to end the region while the variable of the user still holds the array, and to refuse while other views
live.  Each kind of holder is counted where it can be: slices share one small object, the *lease*; plain arrays show in
the references to the root; buffers are found by the garbage collector.  If none is found, the array is detached from
the memory and becomes an empty one that can do nothing (not zeros, which could be mistaken for data).

Arrays that were opened from recipes may share a region.  Each has a lease and a root of its own, and is closed like any
other; the memory itself is taken away with the last of them.

What could still be missed is a buffer held by C code alone.  For that the addresses stay reserved, inaccessible, until
the array object itself is gone: a touch through it is a SIGSEGV, never somebody else's bytes.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from pickle import PickleBuffer
from types import SimpleNamespace

import numpy as np

from userfault.arrays.extent import block_runs, pin
from userfault.arrays.lease import Lease, shared
from userfault.errors import RegionClosedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType
    from typing import Any, Literal, Self

    from userfault.arrays.recipe import ArrayRecipe
    from userfault.region import Region

_BUFFER_HOLDERS = ("managedbuffer", PickleBuffer.__name__)
_NOTHING = np.dtype("V1")


class PagedArray(np.ndarray):  # generic in stubs only
    """A `numpy.ndarray` whose pages come from a store at the first touch. Made by `open_array`.

    Slices, views, ufuncs, `np.save`, `pickle` and the buffer protocol work as for any array; results of computations
    are ordinary arrays in ordinary memory.  When the last view goes, the region ends, as with `numpy.memmap`; `close()`
    ends it at once.

    `pickle` carries the values; `recipe()` says how to open the same array in another process, and that is how it
    travels through `multiprocessing` (see `userfault.ArrayRecipe`).

    Threads: as any array.  Fork: a child does not inherit the memory; a touch there is a SIGSEGV.
    """

    _lease: Lease | None
    _closed: Region | None = None
    """The region that the array had before it was closed: the addresses stay reserved as long as this object lives."""

    if TYPE_CHECKING:  # NumPy's stubs say that slices are plain arrays

        def __getitem__(self, key: Any, /) -> Any: ...

    def __array_finalize__(self, obj: object) -> None:
        """Share the lease of the array that this one is a view of."""
        lease = getattr(obj, "_lease", None)
        self._lease = lease if lease is not None and np.may_share_memory(self, lease.root) else None

    def __array_wrap__(
        self, array: np.ndarray[Any, Any], context: object = None, return_scalar: bool = False
    ) -> Any:  # as NumPy's own
        """Return results of computations as what they are: arrays and scalars in ordinary memory."""
        del context
        if self is array or type(self) is not PagedArray:
            return array
        return array[()] if return_scalar else array.view(np.ndarray)

    def __reduce__(self) -> str | tuple[Any, ...]:
        """Pickle the values, as any array."""
        return np.asarray(self).__reduce__()

    def __reduce_ex__(self, protocol: Any) -> str | tuple[Any, ...]:  # as NumPy's own
        """Pickle the values, as any array; with protocol 5 and a buffer callback, out of band."""
        return np.asarray(self).__reduce_ex__(protocol)

    # What would hold this object itself, uncounted, is made from a plain array over the same memory: that one counts.

    def view(self, *args: Any, **kwargs: Any) -> Any:
        """As `numpy.ndarray.view`."""
        kinds = [kind for kind in (*args, *kwargs.values()) if isinstance(kind, type) and issubclass(kind, np.ndarray)]
        source = self if all(issubclass(kind, PagedArray) for kind in kinds) else np.asarray(self)
        return np.ndarray.view(source, *args, **kwargs)

    @property
    def ctypes(self) -> Any:
        """As `numpy.ndarray.ctypes`."""
        return np.asarray(self).ctypes

    @property
    def flat(self) -> Any:
        """As `numpy.ndarray.flat`."""
        return np.asarray(self).flat

    @flat.setter
    def flat(self, value: Any) -> None:
        np.asarray(self).flat = value  # type: ignore[misc]  # NumPy's stubs forget that it can be set

    def __dlpack__(self, **kwargs: Any) -> Any:
        """As `numpy.ndarray.__dlpack__`."""
        return np.asarray(self).__dlpack__(**kwargs)

    @property
    def region(self) -> Region:
        """The region beneath.

        Raises:
            RegionClosedError: if the array was closed, or is not a view of a region.
        """
        return self._held().region

    def _held(self) -> Lease:
        if self._lease is None:
            raise RegionClosedError("this array has no region: it was closed, is empty, or is in ordinary memory")
        return self._lease

    def ensure(self, index: object = ..., write: bool = False) -> None:
        """Bring the part `array[index]` into memory, so that errors of the store come as exceptions.

        Only the blocks that its items lie in are brought in. They may be evicted again later; `pinned` keeps them.

        Args:
            index: As between brackets: `numpy.s_[10:20]`; the whole array by default.
            write: Give write access too (modes `r+` and `c`).

        Raises:
            IndexError: as NumPy.
            StoreError, ValueError, PagerLostError, RegionClosedError: as `Region.ensure`.
        """
        with self.pinned(index, write):
            pass

    @contextlib.contextmanager
    def pinned(self, index: object = ..., write: bool = False) -> Iterator[PagedArray]:
        """Like `ensure`, and the part stays in memory inside the `with` block, whose value is a view of it.

        So whatever a whole expression touches is there, and errors of the store come before it, as exceptions:

            with a.pinned(np.s_[10:20]) as rows, b.pinned(np.s_[:, 3]) as column:
                result = rows @ column

        Afterwards the view is one like any other. Either all of the part is pinned, or nothing.

        Args:
            index: As between brackets: `numpy.s_[10:20]`; the whole array by default.
            write: Give write access too (modes `r+` and `c`).

        Raises:
            IndexError: as NumPy.
            StoreError, ValueError, PagerLostError, RegionClosedError: as `Region.pinned`.
        """
        part = self._part(index)
        with contextlib.ExitStack() as pins:
            if part.size or self._closed is not None:
                region = self.region
                runs = block_runs(self._offset(part), part.shape, part.strides, part.itemsize, region.block_size)
                pin(pins, region, runs, write)
            yield part

    def _part(self, index: object) -> PagedArray:
        """Return `array[index]` as a view, without touching the memory; of an item, the array around it."""
        keys = index if isinstance(index, tuple) else (index,)
        if not all(map(_is_basic, keys)):  # anything else makes a copy, in other memory
            raise TypeError(f"a part is given by integers and slices, as numpy.s_[10:20], not {index!r}")
        part: PagedArray = self[keys if ... in keys else (*keys, ...)]  # the ellipsis makes an item a view too
        return part

    def _offset(self, part: PagedArray) -> int:
        """Return where a view of this array begins in the region. Asks nobody, and works in a forked child."""
        return _address(part) - _address(self._held().root)

    def recipe(self) -> ArrayRecipe:
        """Return how to open the same array in another process, or once more in this one.

        It pickles, and is small: it holds the store, not the bytes. (A `MemoryStore` is its bytes.) A forked child may
        ask an inherited array for it.

        Raises:
            RegionClosedError: if the array has no region; or of mode `c` and in a forked child.
            ValueError: if the region has changes in memory, which only the values carry: `pickle` takes those.
        """
        from userfault.arrays.recipe import recipe_of  # which knows this class

        return recipe_of(self.region, self._offset(self), self)

    def flush(self) -> None:
        """Write changes back, of the whole region, and make them durable; see `Region.flush`.

        Raises:
            StoreError, PagerLostError, RegionClosedError: as `Region.flush`.
        """
        self.region.flush()

    def close(self) -> None:
        """End the region, with its changes written back. The array is empty afterwards; twice is fine.

        Raises:
            BufferError: if another view of the memory is alive; nothing is changed then.
            StoreError: if changes could not be written back; nothing is changed then either.
        """
        if self._lease is None:
            return
        with shared.lock:  # nobody joins meanwhile
            last = len(self._lease.tenants) == 1
            if _other_views(self, last=last):
                raise BufferError(
                    "another view of the array is alive: delete the slices, arrays and buffers made from it first"
                )
            region = self.region
            if last and not region.closed:  # as it is in a forked child
                region.flush()
            self._lease = None
            self._closed = region
            nothing: tuple[Any, ...] = (1, (0,), _NOTHING, False, b"")  # version, shape, type, order, data
            np.ndarray.__setstate__(self, nothing)
        if last:
            region.revoke()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _address(array: np.ndarray[Any, Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _counts(array: PagedArray) -> tuple[int, int]:
    """References to the lease and to the root, as this expression sees them; compared only with one another.

    No local variable holds what is counted: a debugger's look at the frame would count as well.
    """
    return sys.getrefcount(vars(array)["_lease"]), sys.getrefcount(vars(array)["_lease"].root)


def _base_count(array: PagedArray) -> int:
    return sys.getrefcount(array.base)


def _is_basic(key: object) -> bool:
    return key is None or key is ... or (isinstance(key, int | np.integer | slice) and not isinstance(key, bool))


def _other_views(array: PagedArray, *, last: bool) -> bool:
    """Whether anything but `array` holds its memory; `last`: no other array has been opened over it."""
    slices, arrays = (now - alone for now, alone in zip(_counts(array), _alone_counts, strict=True))
    if isinstance(array.base, PagedArray) and _base_count(array) == _alone_base:
        slices -= 1  # the array is a slice, and the one that it was made from has no other holder
    if slices or arrays or (last and array.region.views() > 1):  # the root's own
        return True
    return any(type(holder).__name__ in _BUFFER_HOLDERS for holder in gc.get_referrers(array))


def array_of(
    lease: Lease,
    shape: Sequence[int],
    dtype: np.dtype[Any],
    offset: int,
    *,
    strides: Sequence[int] | None = None,
    order: Literal["C", "F"] = "C",
) -> PagedArray:
    """Make an array over a region.

    Raises:
        ValueError: if it does not lie in it, or NumPy cannot have it.
    """
    array = np.ndarray.__new__(PagedArray, shape, dtype, lease.root, offset, strides, order)
    array._lease = lease  # noqa: SLF001  # the one place that gives it
    return array


def _calibrate() -> tuple[tuple[int, int], int]:
    """Count the references of an array that nothing else holds: versions of Python differ in what they count."""
    nothing: Any = SimpleNamespace(memory=bytes(2))
    array = array_of(Lease(nothing), (2,), np.dtype(np.uint8), 0)
    alone = _counts(array)
    part = array[1:].view(PagedArray)
    del array
    return alone, _base_count(part)


_alone_counts, _alone_base = _calibrate()
