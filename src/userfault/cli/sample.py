"""The file that the demo reads: real numbers, made at the speed of the disk, each row like no other."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

import numpy as np
from numpy.lib import format as npy

from userfault.cli import figures
from userfault.cli.command import CommandError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeAlias

    Rows: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

COLUMNS = 1024
ROW = COLUMNS * 8
"""8 KiB a row: two pages, an eighth of a block."""
CHUNK_ROWS = 2048
_SPARE = 64 << 20
"""Room that the file system keeps for others."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A `.npy` file of `rows` times `COLUMNS` numbers."""

    path: str
    rows: int

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers."""
        return self.rows * ROW

    def is_there(self) -> bool:
        """Tell whether an earlier run has left just this file.

        Raises:
            CommandError: if something else stands in its place.
        """
        if not os.path.lexists(self.path):
            return False
        with contextlib.suppress(OSError, ValueError):
            array = np.load(self.path, mmap_mode="r")
            last = self.rows - 1
            if array.shape == (self.rows, COLUMNS) and array.dtype == np.float64:
                return bool((array[0] == row(0)).all() and (array[last] == row(last)).all())
        raise CommandError(
            f"{self.path} is there and is not the demo's file of this size: remove it, or use another --folder"
        )

    def check_room(self) -> None:
        """See that the file system has room for it.

        Raises:
            CommandError: if it has not; with the numbers.
        """
        folder = os.path.dirname(self.path)
        status = os.statvfs(folder)
        free = status.f_bavail * status.f_frsize
        if free < self.nbytes + _SPARE:
            raise CommandError(
                f"{folder} has {figures.size(free)} free, and the file takes {figures.size(self.nbytes)}: "
                "use a smaller --size, or another --folder"
            )

    def make(self, advance: Callable[[int], None]) -> None:
        """Write it; whatever interrupts that leaves nothing behind.

        Raises:
            CommandError: if the disk is full after all.
        """
        partial = f"{self.path}.partial"
        try:
            with open(partial, "wb") as file:
                npy.write_array_header_1_0(file, _header(self.rows))
                for first in range(0, self.rows, CHUNK_ROWS):
                    chunk = rows(first, min(first + CHUNK_ROWS, self.rows))
                    file.write(chunk.data)
                    advance(chunk.nbytes)
            os.rename(partial, self.path)
        except OSError as error:
            raise CommandError(f"{self.path} cannot be made: {error.strerror}") from error
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(partial)


def _header(count: int) -> dict[str, Any]:
    return {"descr": npy.dtype_to_descr(np.dtype(np.float64)), "fortran_order": False, "shape": (count, COLUMNS)}


def _noise() -> Rows:
    """Return as many random rows as one chunk has; they are the same in every run."""
    return np.random.default_rng(2014).random((CHUNK_ROWS, COLUMNS))


_cache: list[Rows] = []


def rows(first: int, stop: int) -> Rows:
    """Return some rows of one chunk: noise between 0 and 1, plus the number of the row."""
    if not _cache:
        _cache.append(_noise())
    begin = first % CHUNK_ROWS
    numbers = np.arange(first, stop, dtype=np.float64)[:, np.newaxis]
    result: Rows = _cache[0][begin : begin + stop - first] + numbers
    return result


def row(number: int) -> Rows:
    """Return one row."""
    return rows(number, number + 1).reshape(COLUMNS)
