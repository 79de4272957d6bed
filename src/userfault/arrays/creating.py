"""New files for arrays: what `open_array(mode="w+")` begins with."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable

import numpy as np

from userfault.arrays.header import check_dtype

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal

    from numpy.typing import DTypeLike


def is_npy(path: object) -> bool:
    """Whether a new file of this name becomes a `.npy` file."""
    return isinstance(path, str | os.PathLike) and os.fsdecode(path).endswith(".npy")


def create(
    path: object,
    dtype: DTypeLike | None,
    shape: int | Sequence[int] | None,
    offset: int,
    order: Literal["C", "F"],
) -> None:
    """Make a file for an array of zeros; where there was one, its content is gone. It takes no room on the disk yet.

    Raises:
        TypeError: if `path` is no path.
        ValueError: if dtype or shape is missing or of no use; then nothing has been changed.
        OSError: as `open`.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"mode='w+' makes a new file, so it takes a path, not {path!r}; for a store use mode='r+'")
    if shape is None:
        raise ValueError("mode='w+' makes a new file: say its shape=")
    kind = check_dtype(np.uint8 if dtype is None else dtype, os.fsdecode(path))
    numbers = check_shape(shape)
    length = int(np.prod(numbers, dtype=object)) * kind.itemsize
    if not length:
        raise ValueError(f"an array of shape {numbers} of {kind} has no bytes; a region needs at least one")
    start = operator.index(offset)
    if start < 0 or (start and is_npy(path)):
        raise ValueError(f"offset {offset} is for raw items, and not negative; leave it out")
    if is_npy(path):
        np.lib.format.open_memmap(os.fsdecode(path), "w+", kind, numbers, fortran_order=order == "F")
        return
    with open(path, "wb") as file:
        file.truncate(start + length)


def check_shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    """Return the shape that a user passed.

    Raises:
        TypeError, ValueError: if it is none.
    """
    numbers = shape if isinstance(shape, Iterable) else (shape,)
    result = tuple(operator.index(n) for n in numbers)
    if any(n < 0 for n in result):
        raise ValueError(f"shape {result} has a negative number")
    return result
