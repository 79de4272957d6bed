"""open_array: from a path or a store to an array."""

from __future__ import annotations

import operator

import numpy as np

from userfault.arrays.creating import check_shape, create, is_npy
from userfault.arrays.header import Header, check_dtype, read_header
from userfault.arrays.lease import Lease
from userfault.arrays.paged import PagedArray, array_of
from userfault.blocks.geometry import DEFAULT_BLOCK_SIZE
from userfault.region import Region
from userfault.stores import Store, open_store

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence
    from typing import Any, Literal

    from numpy.typing import DTypeLike

    from userfault.blocks.policies import EvictionPolicy
    from userfault.retry import RetryPolicy


def open_array(  # noqa: PLR0913  # all of the array's options and all of its region's
    source: str | os.PathLike[str] | Store,
    mode: str = "r",
    dtype: DTypeLike | None = None,
    shape: int | Sequence[int] | None = None,
    offset: int = 0,
    order: str = "C",
    block_size: int | str = DEFAULT_BLOCK_SIZE,
    budget: str | float | None = None,
    store_options: Mapping[str, object] | None = None,
    *,
    retry_policy: RetryPolicy | None = None,
    sync_interval: float | None = None,
    policy: str | EvictionPolicy | None = None,
) -> PagedArray:
    """Open a file or a store as an array that is brought in block by block, at the first touch.

    Args:
        source: A path or a store. A `.npy` file is recognised by its first bytes; anything else is raw items.
        mode: As `numpy.memmap`: `"r"`: read only. `"r+"`: changes are written back to the store. `"w+"`: the same, in a
            new file of zeros, which takes the place of any other; it becomes a `.npy` file if its name says so. `"c"`:
            copy on write: changes stay in memory.
        dtype: Type of raw items, `uint8` by default; for a `.npy` file, what it has to be.
        shape: Shape of raw items, by default one dimension to the end; for a `.npy` file, what it has to be.
        offset: Bytes before the first raw item.
        order: `"C"` or `"F"`, for raw items, and for a new file.
        block_size: As `Region`.
        budget: As `Region`.
        store_options: Options of the store that a path is opened with; files have none.
        retry_policy: As `Region`.
        sync_interval: As `Region`.
        policy: As `Region`.

    Returns:
        The array. Its `region` gives statistics, residency and eviction.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: as `open`.
        TypeError, ValueError: naming the argument, or what is wrong with the file.
        StoreError, UnsupportedError, PagerLostError: as `Region`.

    Example:
        >>> import numpy as np, userfault
        >>> np.save("x.npy", np.arange(1000.0))
        >>> a = userfault.open_array("x.npy")
        >>> float(a[10:20].sum())
        145.0
    """
    layout = _check_order(order)
    if mode == "w+":
        create(source, dtype, shape, offset, layout)
        mode = "r+"
        if is_npy(source):  # it says the rest itself
            offset, layout = 0, "C"
    store = open_store(source, writable=mode == "r+")
    if store_options:
        raise ValueError(f"store_options {sorted(store_options)} were given, but {store.describe()} takes none")
    try:
        header = _npy(store, dtype, shape, offset, layout) or _raw(store, dtype, shape, offset, layout)
    finally:
        store.close()  # what reading the header opened here; the pager has a store of its own
    if not header.nbytes:
        raise ValueError(
            f"{store.describe()}: an array of shape {header.shape} has no bytes; a region needs at least one"
        )
    options: dict[str, Any] = {"retry_policy": retry_policy, "sync_interval": sync_interval, "policy": policy}
    region = Region(store, mode, block_size, budget, **options)
    region.owned_by_views()
    try:
        return array_of(Lease(region), header.shape, header.dtype, header.offset, order=header.order)
    except BaseException:  # NumPy has limits of its own, such as 64 dimensions
        region.revoke()
        raise


def _npy(
    store: Store,
    dtype: DTypeLike | None,
    shape: int | Sequence[int] | None,
    offset: int,
    order: Literal["C", "F"],
) -> Header | None:
    """Read a `.npy` header and compare it with what the caller expects; None if raw items were asked for."""
    if offset or order != "C":
        return None
    header = read_header(store)
    if header is None:
        return None
    if dtype is not None and check_dtype(dtype, store.describe()) != header.dtype:
        raise ValueError(
            f"{store.describe()} holds {header.dtype}, not dtype={np.dtype(dtype)}; leave dtype out to take it as it is"
        )
    if shape is not None and check_shape(shape) != header.shape:
        raise ValueError(
            f"{store.describe()} has shape {header.shape}, not shape={check_shape(shape)}; "
            "leave shape out to take it as it is"
        )
    return header


def _raw(
    store: Store,
    dtype: DTypeLike | None,
    shape: int | Sequence[int] | None,
    offset: int,
    order: Literal["C", "F"],
) -> Header:
    """Describe raw items."""
    kind = check_dtype(np.uint8 if dtype is None else dtype, store.describe())
    start = operator.index(offset)
    if not 0 <= start < store.size:
        raise ValueError(f"offset {offset} is not inside the {store.size} bytes of {store.describe()}")
    room = store.size - start
    if shape is None:
        if room % kind.itemsize:
            raise ValueError(f"{room} bytes are no whole number of {kind} items of {kind.itemsize} bytes; give shape=")
        return Header((room // kind.itemsize,), kind, order, start)
    header = Header(check_shape(shape), kind, order, start)
    if header.nbytes > room:
        raise ValueError(
            f"shape {header.shape} of {kind} takes {header.nbytes} bytes, "
            f"and {store.describe()} has {room} from offset {start}"
        )
    return header


def _check_order(order: str) -> Literal["C", "F"]:
    if order == "C":
        return "C"
    if order == "F":
        return "F"
    raise ValueError(f"order must be 'C' or 'F', got {order!r}")
