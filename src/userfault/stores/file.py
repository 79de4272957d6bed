"""A store over a file, or a part of one.

Hot bytes, those in the page cache, are copied by the kernel straight from a mapping of the file; cold ones
are read by a thread of their own. Telling them apart happens once for each fault, so it is a look into a
table (``belief``), filled by asking the kernel now and then (``page_cache``).

The mapping is only ever read by system calls that answer EFAULT when the file has shrunk. ``read_into`` reads
the descriptor, since a thread that reads such a mapping itself dies by SIGBUS.
"""

from __future__ import annotations

import os
from errno import EISDIR
from operator import index
from stat import S_ISDIR, S_ISREG
from time import monotonic

from userfault.errors import KernelError, StoreError
from userfault.kernel import memory
from userfault.kernel.abi import MAP_NORESERVE

from . import page_cache
from .base import Store, check_range
from .belief import CHUNK, CHUNK_SHIFT, Belief
from .descriptors import OURS, FileChangedError, OpenFile, difference, forget, identify, open_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Hashable

    from .descriptors import Identity

    State = tuple[str, int, int, Identity]

__all__ = ["CHECK_S", "FileStore"]

CHECK_S = 0.05
"""How often the file's identity is checked, at most, while its bytes come from the page cache."""


class FileStore(Store):
    """A file, or a part of one, for reading, or for writing too.

    It is opened in whichever process uses it, and holds no descriptor of its own: thousands of them live well
    under the usual limit. It travels by recipe (absolute path, range, identity), so the pager must be able to
    open the same path.

    The file's **identity** (device, inode, size, time of modification) is taken here. A file that is
    replaced, written to, truncated or removed later is a ``StoreError`` from then on, never a mixture of old
    and new bytes: checked after every cold read, and every 50 ms at most while the bytes come from the page
    cache. A writable file changes by our own hand, so there the time of modification does not count: nobody else
    should write to it meanwhile, and nobody would be noticed who does.

    Writing goes to the page cache, as with `os.pwrite`; ``flush`` is `os.fsync`. The file keeps its size.

    The first block is always read by ``read_into``, which opens the file and finds out what its file system can do.

    Any thread may call ``read_into`` and ``write``. After a fork, parent and child may both go on.

    Args:
        path: The file.
        offset: First byte of the part.
        size: Bytes of the part; by default all from ``offset`` to the end.
        writable: Whether ``write`` and ``flush`` work, for regions of mode ``r+``.

    Raises:
        FileNotFoundError: There is no such file.
        IsADirectoryError: The path is a directory.
        PermissionError: It may not be read, or not written to.
        TypeError: ``offset`` or ``size`` is not an integer.
        ValueError: Not a regular file, an empty one or an empty part, or a part that is not inside the file.
    """

    def __init__(
        self, path: str | os.PathLike[str], offset: int = 0, size: int | None = None, writable: bool = False
    ) -> None:
        path = os.path.abspath(os.fsdecode(path))
        identity = _examine(path, bool(writable))
        offset, size = _check_part(path, offset, size, identity[2])
        self.__setstate__((path, offset, size, identity))

    def __getstate__(self) -> State:
        return self._path, self._offset, self.size, self._identity

    def __setstate__(self, state: State) -> None:
        self._path, self._offset, self.size, self._identity = state
        self.writable = self._identity[3] == OURS
        self._mapping = self._mapping_length = 0
        self._base = 0  # address of the store's first byte
        self._believed: dict[int, float] = {}  # by chunk: until when locate() need not look again
        self._belief = Belief()
        self._checked_until = 0.0
        self._mode: int | None = None  # how to read without waiting; the first read finds out
        self._asks = True  # until the kernel says that it does not tell what is cached
        self._refused = -1  # where locate() was last told that a block is cold

    # -- reading, however long it takes ----------------------------------------------------------------------

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Read from the file; see ``Store.read_into``.

        Raises:
            StoreError: The file is gone, has changed, or cannot be read.
            ValueError: The range is not in the store.
        """
        length = buffer.nbytes
        check_range(self, offset, length)
        try:
            file = open_file(self._path, self._identity)
            self._fill(file, offset, buffer)
            self._check()
            if self._mode is None:
                self._mode = page_cache.reading_mode(file.fd)
        except FileChangedError as error:
            raise self._failure("the file has changed beneath us", offset, length, error) from None
        except OSError as error:
            raise self._failure("the file cannot be read", offset, length, error) from error

    def _fill(self, file: OpenFile, offset: int, buffer: memoryview) -> None:
        done = 0
        while done < buffer.nbytes:
            got = os.preadv(file.fd, (buffer[done:],), self._offset + offset + done)
            if not got:
                raise FileChangedError(f"it ends after {self._offset + offset + done} bytes")
            done += got

    def _check(self) -> None:
        """Raise unless the path still means the file, unchanged. After a read, this vouches for its bytes."""
        if text := difference(self._identity, identify(os.stat(self._path), self.writable)):
            raise FileChangedError(text)

    def _failure(self, message: str, offset: int, length: int, cause: Exception) -> StoreError:
        gone = isinstance(cause, FileChangedError)
        text = str(cause)
        return StoreError(message, store=self.describe(), offset=offset, length=length, cause=text, permanent=gone)

    # -- writing ---------------------------------------------------------------------------------------------

    def write(self, offset: int, data: memoryview) -> None:
        """Write to the file; see ``Store.write``. The bytes are in the page cache when it returns.

        Raises:
            StoreError: The file is gone, has changed, or cannot be written to.
            ValueError: The range is not in the store.
            io.UnsupportedOperation: The store is not writable.
        """
        length = data.nbytes
        check_range(self, offset, length)
        if not self.writable:
            super().write(offset, data)
        try:
            file = open_file(self._path, self._identity)
            self._check()  # a file that was cut off would grow again, with a hole in it
            done = 0
            while done < length:
                done += os.pwrite(file.fd, data[done:], self._offset + offset + done)
        except FileChangedError as error:
            raise self._failure("the file has changed beneath us", offset, length, error) from None
        except OSError as error:
            raise self._failure("the file cannot be written to", offset, length, error) from error

    def flush(self) -> None:
        """Make what was written durable: `os.fsync`.

        Raises:
            StoreError: The file is gone, or the disk has failed; what of it has reached the disk, nobody knows.
            io.UnsupportedOperation: The store is not writable.
        """
        if not self.writable:
            super().flush()
        try:
            file = open_file(self._path, self._identity)  # held: another store's close() may forget it meanwhile
            os.fsync(file.fd)
        except FileChangedError as error:
            raise self._failure("the file has changed beneath us", 0, 0, error) from None
        except OSError as error:
            raise self._failure("the file cannot be made durable", 0, 0, error) from error

    # -- reading without waiting -----------------------------------------------------------------------------

    def locate(self, offset: int, length: int) -> int:
        """Return the address of a hot block in a mapping of the file, else 0; see ``Store.locate``."""
        if monotonic() < self._believed.get(offset >> CHUNK_SHIFT, 0.0):
            return self._base + offset
        return self._base + offset if self._look(offset, length) else 0

    def _look(self, offset: int, length: int) -> bool:
        """Tell whether a block is hot, when the table does not know; with its whole chunk, put that there."""
        now, chunk = monotonic(), offset >> CHUNK_SHIFT
        if not self._can_tell(now):
            return False
        if now >= self._belief.until(chunk):
            if not self._belief.is_due(chunk, length, now):
                return self._is_hot_block(offset, length, now)
            start = chunk << CHUNK_SHIFT
            known = self._belief.has_seen(chunk)
            hot = self._is_hot(start, min(CHUNK, self.size - start), settled=known)
            self._belief.learn(chunk, now, hot=hot)
            if not hot:
                return self._is_hot_block(offset, length, now)
        self._believed[chunk] = min(self._belief.until(chunk), self._checked_until)
        return True

    def _is_hot_block(self, offset: int, length: int, now: float) -> bool:
        if self._is_hot(offset, length):
            return True
        self._belief.doubt(now)
        return False

    def _is_hot(self, offset: int, length: int, *, settled: bool = False) -> bool:
        """Ask the kernel whether all of a range is in the page cache; if so, see to it that it is mapped.

        Pages that are being read count as cached, so the last one must be read, for trial: reading ahead goes
        forward. ``settled``: that has been done before.
        """
        self._refused = -1
        file = self._file()
        if length <= 0 or file is None or not self._asks:
            return False
        start = self._offset + offset
        answer = page_cache.cached(file.fd, start, length)
        self._asks = answer is not None
        if answer and (
            settled
            or self._mode == page_cache.PLAIN
            or page_cache.try_read(file.fd, bytearray(1), start + length - 1, page_cache.NOWAIT) == 1
        ):
            return bool(self._mapping or self._map(file))
        if self._asks:
            self._refused = offset
        return False

    def read_now(self, offset: int, buffer: memoryview) -> bool:
        """Read a block that is in the page cache; see ``Store.read_now``.

        The way for files about which the kernel tells us nothing: not ours, or before Linux 6.5.
        """
        refused, self._refused = self._refused, -1
        file = self._file() if offset != refused and self._can_tell(monotonic()) else None
        mode = self._mode
        if file is None or mode is None:  # cold, as locate() has just been told; or nothing is known
            return False
        start, length = self._offset + offset, buffer.nbytes
        if self._asks:
            # Trying to read what is cold would begin to read it, here in the fault loop: better ask.
            answer = page_cache.cached(file.fd, start, length)
            self._asks = answer is not None
            if answer is False:
                return False
        if mode == page_cache.PLAIN and not self._asks:
            return False
        return page_cache.try_read(file.fd, buffer, start, mode) == length

    def _can_tell(self, now: float) -> bool:
        """Tell whether hot can be told from cold, and the file is what it was, CHECK_S ago at most.

        Not before the first read: on a network, opening a file may take long, and this is the fault loop.
        """
        if now < self._checked_until:
            return True
        if self._mode is None or self._mode == page_cache.CANNOT:
            return False
        self._believed.clear()
        try:
            self._check()
        except (OSError, FileChangedError):
            self._checked_until = 0.0
            return False
        self._checked_until = now + CHECK_S
        return True

    def _file(self) -> OpenFile | None:
        """Return the open file; ``None`` if it cannot be had: ``read_into`` will say why."""
        try:
            return open_file(self._path, self._identity)
        except (OSError, FileChangedError):
            return None

    def _map(self, file: OpenFile) -> bool:
        """Map the part of the file: address space only, however large it is."""
        skipped = self._offset % memory.PAGE_SIZE
        length = skipped + self.size
        flags = memory.MAP_PRIVATE | MAP_NORESERVE
        try:
            address = memory.map_memory(
                length, fd=file.fd, offset=self._offset - skipped, prot=memory.PROT_READ, flags=flags
            )
        except KernelError:  # a file system that cannot, or no address space left: then nothing is ever hot
            self._mode, self._checked_until = page_cache.CANNOT, 0.0
            return False
        self._mapping, self._mapping_length, self._base = address, length, address + skipped
        return True

    # -- the rest --------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Give back the mapping and the descriptor; a later read opens the file again.

        Addresses from ``locate`` are dead afterwards.
        """
        self._believed.clear()
        self._belief.clear()
        mapping, self._mapping, self._base = self._mapping, 0, 0
        if mapping:
            memory.unmap(mapping, self._mapping_length)
        forget(self._path, self._identity)

    def __del__(self) -> None:
        if "_mode" in self.__dict__:  # else the constructor has raised
            self.close()

    def identity(self) -> Hashable:
        """Return the file's identity and the part."""
        return self._identity, self._offset, self.size

    def lies_in(self, path: str | os.PathLike[str]) -> bool:
        """Return whether a path means this store's file."""
        try:
            return identify(os.stat(path))[:2] == self._identity[:2]
        except FileNotFoundError:
            return False

    def describe(self) -> str:
        """Return the path, and the part if it is not the whole."""
        whole = not self._offset and self.size == self._identity[2]
        part = "" if whole else f", offset={self._offset}, size={self.size}"
        return f"FileStore({self._path!r}{part}{', writable=True' if self.writable else ''})"

    def __eq__(self, other: object) -> bool:
        return self.__getstate__() == other.__getstate__() if isinstance(other, FileStore) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.__getstate__())


def _examine(path: str, writable: bool) -> Identity:
    """Open a path once, to see that it can be read or written to, and return its identity."""
    file = OpenFile(path, writable)
    try:
        status = os.fstat(file.fd)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error
    if S_ISDIR(status.st_mode):
        raise IsADirectoryError(EISDIR, os.strerror(EISDIR), path)
    if not S_ISREG(status.st_mode):
        raise ValueError(f"{path!r} is not a regular file: a store needs a file of a known, fixed size")
    return identify(status, writable)


def _check_part(path: str, offset: int, size: int | None, whole: int) -> tuple[int, int]:
    """Return offset and size of a part of a file of ``whole`` bytes."""
    if not whole:
        raise ValueError(f"{path!r} is empty: a region needs at least one byte")
    offset = index(offset)
    if not 0 <= offset < whole:
        raise ValueError(f"offset {offset} is not in {path!r}, which has {whole} bytes: use 0 to {whole - 1}")
    size = whole - offset if size is None else index(size)
    if size < 1:
        raise ValueError(f"size {size} is not positive: leave it out for everything from the offset on")
    if size > whole - offset:
        raise ValueError(
            f"size {size} at offset {offset} ends after the end of {path!r}, which has {whole} bytes: "
            f"use at most {whole - offset}"
        )
    return offset, size
