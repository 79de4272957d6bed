"""Recipes: how an array travels to another process without its bytes.

What travels how, and why
-------------------------
* `pickle` carries values.  That is what `numpy.memmap` does, and what whoever writes a pickle to a file expects.
* `multiprocessing` and `concurrent.futures` carry the recipe, as they carry handles for torch's tensors: their pickles
  (`ForkingPickler`) are read at once, by a process of the same program on the same machine.
* But only if the recipe is the truth and worth it.  What was changed in memory (mode `c`), and what is smaller than its
  own recipe (a part of a `MemoryStore`, which is its bytes), travels by value.

In the receiving process all arrays of one store, opened for reading with the same options, share one region.
"""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import dataclass

# Numpy has loaded nearly all that this needs: 1 ms of the 70 that both take. So there is no need for a hook that would
# register late, when somebody else imports it.
from multiprocessing.reduction import ForkingPickler

from userfault.arrays.lease import Lease, shared
from userfault.arrays.paged import PagedArray, array_of
from userfault.errors import RegionClosedError
from userfault.region import Region

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    import numpy as np

    from userfault.blocks.policies import EvictionPolicy
    from userfault.retry import RetryPolicy
    from userfault.stores import Store

SMALL = 1 << 16
"""Bytes of a recipe that are never too many; most have some hundred."""


@dataclass(frozen=True, slots=True)
class ArrayRecipe:
    """How to open an array, or the part of one, in any process: what `PagedArray.recipe` returns.

    It pickles, and holds a store where an array holds memory.  `dataclasses.replace` changes an option, such as the
    budget.  Threads may share it, and so may a forked child.

    Attributes:
        store: Where the bytes live.
        mode, block_size, budget, retry_policy, policy: As `Region`.
        offset: Of the array in the store, in bytes: of the item whose indices are all 0.
        shape, strides, dtype: As of any array; strides are in bytes.

    Example:
        >>> import numpy as np, userfault
        >>> np.save("x.npy", np.arange(1000.0))
        >>> recipe = userfault.open_array("x.npy")[10:20].recipe()
        >>> float(recipe.open().sum())  # in this process or another
        145.0
    """

    store: Store
    mode: str
    block_size: int | str
    budget: str | float | None
    retry_policy: RetryPolicy | None
    policy: str | EvictionPolicy | None
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype[Any]

    def open(self) -> PagedArray:
        """Open the array in this process, on its default pager.

        Arrays of one store in mode `r`, with the same options, share one region as long as one of them lives: keep the
        array, rather than open it anew for each access.

        Raises:
            TypeError, ValueError, StoreError, UnsupportedError, PagerLostError: as `Region`.
        """
        if self.mode == "r":
            lease = shared.lease(_digest(_pickled(self)), self._open_region)
        else:  # each has changes of its own
            lease = Lease(self._open_region())
        return array_of(lease, self.shape, self.dtype, self.offset, strides=self.strides)

    def _open_region(self) -> Region:
        options: dict[str, Any] = {"retry_policy": self.retry_policy, "policy": self.policy}
        region = Region(self.store, self.mode, self.block_size, self.budget, **options)
        region.owned_by_views()
        return region


def _pickled(recipe: ArrayRecipe) -> list[memoryview]:
    """Pickle what the region is made of; large buffers stay where they are."""
    buffers: list[pickle.PickleBuffer] = []
    options = recipe.mode, recipe.block_size, recipe.budget, recipe.retry_policy, recipe.policy
    pickled = pickle.dumps((recipe.store, options), 5, buffer_callback=buffers.append)
    return [memoryview(pickled), *(buffer.raw() for buffer in buffers)]


def _digest(parts: list[memoryview]) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()


def recipe_of(region: Region, offset: int, array: np.ndarray[Any, Any]) -> ArrayRecipe:
    """Return the recipe of an array that lies in a region at `offset`.

    Raises:
        RegionClosedError, ValueError: as `PagedArray.recipe`.
    """
    opening, _ = region.__reduce__()  # which knows when the store is not the whole truth
    geometry: dict[str, Any] = {"shape": array.shape, "strides": array.strides, "dtype": array.dtype}
    return ArrayRecipe(region.store, **opening.keywords, offset=offset, **geometry)


def _reduce(array: PagedArray) -> str | tuple[Any, ...]:
    """Pickle an array for another process of this program: its recipe if that says all, else its values."""
    try:
        region = array.region
    except RegionClosedError:  # in ordinary memory, or empty: there is nothing but values
        return array.__reduce__()
    try:
        recipe = array.recipe()
    except RegionClosedError:  # the memory is not here: a touch would be a SIGSEGV
        raise
    except ValueError:  # changes in memory
        return array.__reduce__()
    weight = sum(part.nbytes for part in _pickled(recipe))
    if region.closed or weight <= max(array.nbytes, SMALL):  # closed: in a forked child, which has no values
        return ArrayRecipe.open, (recipe,)
    return array.__reduce__()


ForkingPickler.register(PagedArray, _reduce)
