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

What could still be missed is a buffer held by C code alone.  For that the addresses stay reserved, inaccessible, until
the array object itself is gone: a touch through it is a SIGSEGV, never somebody else's bytes.
"""

from __future__ import annotations

import gc
import sys
from pickle import PickleBuffer

import numpy as np

from userfault.errors import RegionClosedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any, Self

    from userfault.arrays.header import Header
    from userfault.region import Region

_BUFFER_HOLDERS = ("managedbuffer", PickleBuffer.__name__)
_NOTHING = np.dtype("V1")


class _Lease:
    """Held by an array and each of its slices; the count of its references is the count of them."""

    __slots__ = ("region", "root")

    def __init__(self, region: Region, root: np.ndarray[Any, Any]) -> None:
        self.region = region
        self.root = root


class PagedArray(np.ndarray):  # generic in stubs only
    """A `numpy.ndarray` whose pages come from a store at the first touch. Made by `open_array`.

    Slices, views, ufuncs, `np.save`, `pickle` and the buffer protocol work as for any array; results of computations
    are ordinary arrays in ordinary memory.  When the last view goes, the region ends, as with `numpy.memmap`; `close()`
    ends it at once.

    Threads: as any array.  Fork: a child does not inherit the memory; a touch there is a SIGSEGV.
    """

    _lease: _Lease | None

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
        if self._lease is None:
            raise RegionClosedError("this array has no region: it was closed, or is a copy in ordinary memory")
        return self._lease.region

    def ensure(self, index: object = ..., write: bool = False) -> None:
        """Bring the part `array[index]` into memory, so that errors of the store come as exceptions.

        Everything between the first and the last byte of the part is brought in.

        Args:
            index: As between brackets: `numpy.s_[10:20]`; the whole array by default.
            write: Give write access too (mode `c`).

        Raises:
            IndexError: as NumPy.
            StoreError, ValueError, PagerLostError, RegionClosedError: as `Region.ensure`.
        """
        region = self.region
        part = self._part(index)
        if part.size:
            low, high = np.lib.array_utils.byte_bounds(part)
            region.ensure(low - region.address, high - low, write)

    def _part(self, index: object) -> np.ndarray[Any, Any]:
        """Return `array[index]` as a view, without touching the memory; of an item, the array around it."""
        keys = index if isinstance(index, tuple) else (index,)
        if not all(map(_is_basic, keys)):  # anything else makes a copy, in other memory
            raise TypeError(f"ensure takes integers and slices, as numpy.s_[10:20], not {index!r}")
        return np.asarray(self)[keys if ... in keys else (*keys, ...)]  # the ellipsis makes an item a view too

    def flush(self) -> None:
        """Write changes back: in the modes `r` and `c` there is nothing to write.

        Raises:
            RegionClosedError: if it was closed.
        """
        self.region.flush()

    def close(self) -> None:
        """End the region. The array is detached from the memory first, and is empty afterwards; twice is fine.

        Raises:
            BufferError: if another view of the memory is alive; nothing is changed then.
        """
        if self._lease is None:
            return
        if _other_views(self):
            raise BufferError(
                "another view of the array is alive: delete the slices, arrays and buffers made from it first"
            )
        region = self.region
        self._lease = None
        self._keep = region  # the addresses stay reserved as long as this object lives
        nothing: tuple[Any, ...] = (1, (0,), _NOTHING, False, b"")  # version, shape, type, order, data
        np.ndarray.__setstate__(self, nothing)
        region.revoke()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _counts(array: PagedArray) -> tuple[int, int]:
    """References to the lease and to the root, as this expression sees them; compared only with one another.

    No local variable holds what is counted: a debugger's look at the frame would count as well.
    """
    return sys.getrefcount(vars(array)["_lease"]), sys.getrefcount(vars(array)["_lease"].root)


def _base_count(array: PagedArray) -> int:
    return sys.getrefcount(array.base)


def _is_basic(key: object) -> bool:
    return key is None or key is ... or (isinstance(key, int | np.integer | slice) and not isinstance(key, bool))


def _other_views(array: PagedArray) -> bool:
    """Whether anything but `array` holds the memory."""
    slices, arrays = (now - alone for now, alone in zip(_counts(array), _alone_counts, strict=True))
    if isinstance(array.base, PagedArray) and _base_count(array) == _alone_base:
        slices -= 1  # the array is a slice, and the one that it was made from has no other holder
    if slices or arrays or array.region.views() > 1:  # the root's own
        return True
    return any(type(holder).__name__ in _BUFFER_HOLDERS for holder in gc.get_referrers(array))


def array_of(region: Region, header: Header) -> PagedArray:
    """Make the array that a header describes, over a region of the whole file."""
    root = np.frombuffer(region.memory, dtype=np.uint8)
    array = np.ndarray.__new__(PagedArray, header.shape, header.dtype, root, header.offset, None, header.order)
    array._lease = _Lease(region, root)  # noqa: SLF001  # the one place that makes it
    return array


def _calibrate() -> tuple[tuple[int, int], int]:
    """Count the references of an array that nothing else holds: versions of Python differ in what they count."""
    root = np.zeros(2, dtype=np.uint8)
    array = np.ndarray.__new__(PagedArray, (2,), np.uint8, root)
    array._lease = _Lease(None, root)  # type: ignore[arg-type] # noqa: SLF001
    del root
    alone = _counts(array)
    part = array[1:].view(PagedArray)
    del array
    return alone, _base_count(part)


_alone_counts, _alone_base = _calibrate()
