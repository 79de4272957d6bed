"""What an array looks like: the header of a `.npy` file, read without reading the file.

NumPy's own reader does the parsing (`numpy.lib.format`, NEP 1); this module decides what to refuse, and says why.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from tokenize import TokenError

import numpy as np
from numpy.lib import format as npy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Literal

    from userfault.stores import Store

MAGIC = npy.MAGIC_PREFIX
MOST = 1 << 20
"""Bytes that are read of a header, which has some hundred."""
MOST_EVALUATED = 10_000
"""As NumPy: Python's parser is not made for texts of a stranger's."""
_DAMAGE = ValueError, TokenError, TypeError, RecursionError, MemoryError
"""What evaluating a header raises: the last two of one that is nested too deeply."""


@dataclass(frozen=True, slots=True)
class Header:
    """Shape, type, order ("C" or "F"), and where the data begin, in bytes of the store."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    order: Literal["C", "F"]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(store: Store) -> Header | None:
    """Read the header of a `.npy` store; None if it does not begin like one.

    Raises:
        ValueError: if it begins like one and is damaged or truncated, or holds Python objects.
    """
    start = bytearray(min(store.size, 4096))
    store.read_into(0, memoryview(start))
    if not start.startswith(MAGIC):
        return None
    if len(start) >= 12 and (length := _header_length(bytes(start[:12]))) > len(start):
        start = bytearray(min(store.size, length, MOST))
        store.read_into(0, memoryview(start))
    header = _parse(bytes(start), store.describe())
    missing = header.offset + header.nbytes - store.size
    if missing > 0:
        raise ValueError(
            f"{store.describe()} is truncated: its header promises {header.nbytes} bytes of {header.dtype} "
            f"{header.shape}, and {missing} of them are missing"
        )
    return header


def _header_length(start: bytes) -> int:
    """Bytes up to the end of the header: magic, version, a length of 2 bytes (version 1) or 4, and that many."""
    if start[6] == 1:
        return 10 + int.from_bytes(start[8:10], "little")
    return 12 + int.from_bytes(start[8:12], "little")


def _parse(start: bytes, name: str) -> Header:
    file = io.BytesIO(start)
    try:
        shape, fortran, dtype = _read_fields(file, npy.read_magic(file))
    except _DAMAGE as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"{name} has a damaged .npy header: {reason}") from error
    return Header(shape, check_dtype(dtype, name), "F" if fortran else "C", file.tell())


def _read_fields(file: io.BytesIO, version: tuple[int, int]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    if version == (1, 0):
        fields = npy.read_array_header_1_0(file)
    elif version == (2, 0):
        fields = npy.read_array_header_2_0(file)
    elif version == (3, 0):
        fields = _read_version_3(file)
    else:
        raise ValueError(f"version {version[0]}.{version[1]} is not 1.0, 2.0 or 3.0")
    shape = fields[0]
    if not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"shape {shape} is not a tuple of numbers from 0 on")
    return fields


def _read_version_3(file: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read a header in UTF-8 (field names outside Latin-1): NumPy has no public function for version 3."""
    length = int.from_bytes(file.read(4), "little")
    text = file.read(length)
    if len(text) < length:
        raise ValueError(f"it ends after {len(text)} of {length} bytes")
    if length > MOST_EVALUATED:
        raise ValueError(f"it has {length} bytes, and at most {MOST_EVALUATED} are evaluated")
    import ast

    try:
        fields = ast.literal_eval(text.decode())
        shape, fortran, descr = fields["shape"], fields["fortran_order"], fields["descr"]
        dtype = npy.descr_to_dtype(descr)
    except (SyntaxError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(str(error)) from error
    if len(fields) != 3:
        raise ValueError(f"it has the keys {sorted(map(str, fields))}")
    if type(shape) is not tuple or type(fortran) is not bool:
        raise ValueError(f"shape {shape!r} is no tuple, or fortran_order {fortran!r} is not True or False")
    return shape, fortran, dtype


def check_dtype(dtype: object, name: str) -> np.dtype[Any]:
    """Return a type whose items are bytes in a file.

    Raises:
        TypeError: if NumPy does not know it.
        ValueError: if it holds Python objects, or its items have no size.
    """
    try:
        result: np.dtype[Any] = np.dtype(dtype)  # type: ignore[call-overload]  # the TypeError is the check
    except TypeError:
        raise TypeError(f"dtype {dtype!r} is not a type that NumPy knows") from None
    if result.hasobject:
        raise ValueError(
            f"{name}: dtype {result} holds Python objects, which are pointers, not data; save it as plain values"
        )
    if not result.itemsize:
        raise ValueError(f"{name}: dtype {result} has items of no size; say how long they are")
    return result
