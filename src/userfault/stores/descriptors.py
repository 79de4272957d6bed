"""Open files, kept within the limit on descriptors.

A process may have a thousand file stores alive and is allowed 1024 descriptors, most of them for other
things. So the stores of a process share a small table of open files, the least recently used of which is
closed first and opened again by its path when it is needed. A path may mean another file by then, so an open
file is known by its identity too.

**No lock.** A reader holds a reference to the ``OpenFile``; leaving the table only drops the table's. The
descriptor is closed with the last reference, so never under a read of another thread. Single operations of
``dict`` are atomic; two threads that open one file at once open it twice, and one of the two is closed when
its reader is done. After a fork the child shares the open files, which does no harm as all reads are by
position.
"""

from __future__ import annotations

import os
from errno import EMFILE, ENFILE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeAlias

    Identity: TypeAlias = tuple[int, int, int, int]

__all__ = [
    "LIMIT",
    "OURS",
    "FileChangedError",
    "OpenFile",
    "difference",
    "forget",
    "identify",
    "limit_open_files",
    "open_file",
]

LIMIT = 256
"""Open files at once, at most: a quarter of the usual limit of 1024. The rest is for sockets and the application."""
LEAST = 4

OURS = -1
"""In place of a file's time of modification: it is written to by us, and the time says nothing."""
_FLAGS = os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK  # the last: opening a pipe must not wait

_close = os.close  # a name of our own: os may be gone when the last file closes, at exit
_table: dict[tuple[str, Identity], OpenFile] = {}
_limit = LIMIT


def limit_open_files(number: int) -> None:
    """Keep at most so many files open from now on, between LEAST and LIMIT: what else needs descriptors is growing."""
    global _limit  # noqa: PLW0603  # the table is the process's, and so is its size
    _limit = max(LEAST, min(number, LIMIT))


class FileChangedError(Exception):
    """A path does not mean the file any more that it meant; internal, becomes a ``StoreError``."""


class OpenFile:
    """A descriptor that closes itself with its last reference: ``fd`` is good while this object is held."""

    __slots__ = ("fd",)

    def __init__(self, path: str, writable: bool = False) -> None:
        self.fd = -1
        self.fd = os.open(path, _FLAGS | (os.O_RDWR if writable else os.O_RDONLY))

    def __del__(self) -> None:
        if self.fd >= 0:
            _close(self.fd)


def identify(status: os.stat_result, writable: bool = False) -> Identity:
    """Return device, inode, size and time of modification; instead of the last, OURS if we write to it.

    A change is missed if it keeps the size and falls into the same tick of the kernel's clock (4 ms, less
    since Linux 6.13), or is made through a mapping of pages that are dirty already.
    """
    return status.st_dev, status.st_ino, status.st_size, OURS if writable else status.st_mtime_ns


def difference(expected: Identity, found: Identity) -> str:
    """Say in words what differs between two identities; empty when nothing does."""
    if expected[:2] != found[:2]:
        return f"another file has taken its name (inode {expected[1]}, now {found[1]})"
    if expected[2] != found[2]:
        return f"it had {expected[2]} bytes and has {found[2]} now"
    return "it has been written to" if expected != found else ""


def open_file(path: str, identity: Identity) -> OpenFile:
    """Return the file, open for reading, and for writing if it is ours; from the table if it is there.

    Raises:
        FileChangedError: The path means another file now, or the file has changed.
        OSError: It cannot be opened.
    """
    key = path, identity
    file = _table.pop(key, None)
    if file is None:
        writable = identity[3] == OURS
        file = _open(path, writable)
        if text := difference(identity, identify(os.fstat(file.fd), writable)):
            raise FileChangedError(text)
    _table[key] = file  # the youngest stands last
    while len(_table) > _limit:
        _drop_oldest()
    return file


def forget(path: str, identity: Identity) -> None:
    """Close the file as soon as nobody reads from it."""
    _table.pop((path, identity), None)


def _open(path: str, writable: bool) -> OpenFile:
    """Open a file; when there are too many, close those of the table first."""
    try:
        return OpenFile(path, writable)
    except OSError as error:
        if error.errno not in (EMFILE, ENFILE) or not _table:
            raise
    _table.clear()
    return OpenFile(path, writable)


def _drop_oldest() -> None:
    try:
        _table.pop(next(iter(_table)), None)
    except (RuntimeError, StopIteration):
        pass  # another thread changed the table meanwhile; the next one to open a file will try again
