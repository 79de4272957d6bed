"""Stores that misbehave, each in one way, on purpose.

They run in the pager, so what they wait for and what they report are **paths**: a store waits until a path
appears, and makes one to say that it has begun. A test can see and make those from any process, and no
descriptor is involved.

None of them answers ``locate`` or ``read_now``: their misbehaviour would be missed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import time

from userfault.errors import StoreError

from .patterns import PatternStore, RecipeStore

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any, NoReturn

    from userfault.stores.base import Store

__all__ = [
    "CrashingStore",
    "FailingStore",
    "GilHoldingStore",
    "LyingSizeStore",
    "RefusingStore",
    "ShortStore",
    "SlowStore",
    "StallingStore",
    "UnpicklableStore",
    "WrongErrorStore",
]

_POLL_S = 0.002


class _Wrapper(RecipeStore):
    """A store around another, which has the bytes."""

    def __init__(self, inner: Store, concurrency: int | None = None) -> None:
        self.inner, self.size, self.writable = inner, inner.size, inner.writable
        self.concurrency = inner.concurrency if concurrency is None else concurrency

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Pass the read on."""
        self.inner.read_into(offset, buffer)

    def write(self, offset: int, data: memoryview) -> None:
        """Pass the write on."""
        self.inner.write(offset, data)

    def flush(self) -> None:
        """Pass it on."""
        self.inner.flush()

    def close(self) -> None:
        """Close the inner store."""
        self.inner.close()

    def describe(self) -> str:
        """Return the type and the inner store."""
        return f"{type(self).__name__}({self.inner.describe()})"


class SlowStore(_Wrapper):
    """Every read takes a while; the GIL is released meanwhile.

    Args:
        inner: The store that has the bytes.
        seconds: How long a read takes, at least.
        concurrency: As of ``Store``; by default 8, even if the inner one has 0.
    """

    def __init__(self, inner: Store, seconds: float, concurrency: int = 8) -> None:
        super().__init__(inner, concurrency)
        self.seconds = seconds

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Sleep, then read."""
        time.sleep(self.seconds)
        super().read_into(offset, buffer)


class StallingStore(_Wrapper):
    """Reads do not return until a path appears; never, if it never does.

    Args:
        inner: The store that has the bytes.
        release: The path to wait for.
        entered: A path that the first read makes before it waits, so that a test knows without sleeping.
        offsets: Only reads that touch one of these bytes stall; by default all.
    """

    def __init__(
        self,
        inner: Store,
        release: str | os.PathLike[str],
        entered: str | os.PathLike[str] | None = None,
        offsets: Iterable[int] | None = None,
    ) -> None:
        super().__init__(inner, inner.concurrency or 8)
        self.release = os.fspath(release)
        self.entered = None if entered is None else os.fspath(entered)
        self.offsets = None if offsets is None else tuple(offsets)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Wait for the path, then read."""
        if _touches(self.offsets, offset, buffer.nbytes):
            if self.entered is not None:
                _make(self.entered)
            while not os.path.exists(self.release):
                time.sleep(_POLL_S)
        super().read_into(offset, buffer)


class FailingStore(PatternStore):
    """Reads raise ``OSError``; elsewhere the bytes are those of ``PatternStore(size)``.

    Args:
        size: Bytes.
        message: What the error says.
        fail_offsets: Only reads that touch one of these bytes fail; by default all.
        healed_by: A path; reads succeed as soon as it exists.
        times: Reads that fail, in each process, before they succeed; by default all.
    """

    def __init__(
        self,
        size: int,
        message: str = "the store is on fire",
        fail_offsets: Iterable[int] | None = None,
        *,
        healed_by: str | os.PathLike[str] | None = None,
        times: int | None = None,
    ) -> None:
        super().__init__(size)
        self.message, self.times = message, times
        self.fail_offsets = None if fail_offsets is None else tuple(fail_offsets)
        self.healed_by = None if healed_by is None else os.fspath(healed_by)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fail, or compute the bytes.

        Raises:
            OSError: As ordered.
        """
        if _touches(self.fail_offsets, offset, buffer.nbytes) and not self._is_healed():
            raise OSError(self.message)
        super().read_into(offset, buffer)

    def _is_healed(self) -> bool:
        if self.healed_by is not None and os.path.exists(self.healed_by):
            return True
        if self.times is None:
            return False
        self.times -= 1
        return self.times < 0


class ShortStore(_Wrapper):
    """Reads fill too little, and say nothing.

    Args:
        inner: The store that has the bytes.
        missing: How many bytes at the end of each read are left as they were; at most all.
    """

    def __init__(self, inner: Store, missing: int = 1) -> None:
        super().__init__(inner)
        self.missing = missing

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill all but the end."""
        super().read_into(offset, buffer[: max(buffer.nbytes - self.missing, 0)])


class RefusingStore(RecipeStore):
    """A writable file that takes nothing while a path exists, as a disk that is full or broken.

    Args:
        path: The file with the bytes.
        refuse: While this path exists, `write` raises the errno that is written there, ENOSPC if nothing is.
        stall: While this path exists, `write` waits.
        lose: While this path exists, `flush` raises EIO.
        crash: While this path exists, `write` ends the process.
    """

    writable = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        refuse: str | os.PathLike[str] = "",
        stall: str | os.PathLike[str] = "",
        lose: str | os.PathLike[str] = "",
        crash: str | os.PathLike[str] = "",
    ) -> None:
        self._path, self.size = os.fspath(path), os.path.getsize(path)
        self._refuse, self._stall = os.fspath(refuse), os.fspath(stall)
        self._lose, self._crash = os.fspath(lose), os.fspath(crash)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Read from the file."""
        with open(self._path, "rb") as file:
            file.seek(offset)
            if file.readinto(buffer) != len(buffer):
                raise StoreError("the file has become shorter")

    def write(self, offset: int, data: memoryview) -> None:
        """Write to the file, unless it is to fail."""
        if self._crash and os.path.exists(self._crash):
            os.abort()
        while self._stall and os.path.exists(self._stall):
            time.sleep(_POLL_S)
        if self._refuse and os.path.exists(self._refuse):
            with open(self._refuse, encoding="ascii") as file:
                number = int(file.read() or errno.ENOSPC)
            raise OSError(number, os.strerror(number))
        with open(self._path, "r+b") as file:
            file.seek(offset)
            file.write(data)

    def flush(self) -> None:
        """Say that everything is durable, unless it is to fail."""
        if self._lose and os.path.exists(self._lose):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def describe(self) -> str:
        """Return the type and the file."""
        return f"RefusingStore({self._path!r})"


class WrongErrorStore(PatternStore):
    """Reads raise what a store has no business raising.

    Args:
        size: Bytes.
        kind: ``"SystemExit"``, ``"KeyboardInterrupt"``, ``"GeneratorExit"``, ``"MemoryError"``,
            ``"RecursionError"``, ``"unpicklable"`` (an error that cannot travel), ``"unprintable"`` (whose
            text raises), ``"StoreError"`` (one that names another store), or ``"huge"`` (a text of a
            megabyte).
    """

    def __init__(self, size: int, kind: str) -> None:
        super().__init__(size)
        self.kind = kind

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Raise it."""
        raise _wrong_error(self.kind)


class CrashingStore(PatternStore):
    """Reads end the process they run in.

    Args:
        size: Bytes; those of ``PatternStore(size)``, when it does not crash.
        how: ``"exit"`` (at once, status 3), ``"segv"``, ``"abort"`` or ``"kill"``.
        offsets: Only reads that touch one of these bytes crash; by default all.
        once: A path that is made before the crash; if it exists, reads work. So a second process succeeds.
    """

    def __init__(
        self,
        size: int,
        how: str = "exit",
        offsets: Iterable[int] | None = None,
        once: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(size)
        self.how = how
        self.offsets = None if offsets is None else tuple(offsets)
        self.once = None if once is None else os.fspath(once)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Crash, or compute the bytes."""
        if _touches(self.offsets, offset, buffer.nbytes) and (self.once is None or _make(self.once)):
            _crash(self.how)
        super().read_into(offset, buffer)


class LyingSizeStore(_Wrapper):
    """A store that says another size than it has.

    Args:
        inner: The store that has the bytes.
        size: What it says: more, less, negative, or no integer at all.
    """

    def __init__(self, inner: Store, size: Any) -> None:
        super().__init__(inner)
        self.size = size


class GilHoldingStore(_Wrapper):
    """Every read takes a while **and keeps the GIL**, so that no other thread of Python runs meanwhile.

    Args:
        inner: The store that has the bytes.
        seconds: How long a read takes, at least.
    """

    def __init__(self, inner: Store, seconds: float) -> None:
        super().__init__(inner, 8)
        self.seconds = seconds

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Sleep with the GIL held, then read."""
        ctypes.PyDLL(None).usleep(ctypes.c_uint(int(self.seconds * 1e6)))
        super().read_into(offset, buffer)


class UnpicklableStore(PatternStore):
    """A store that cannot travel to the pager."""

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("cannot pickle 'UnpicklableStore' object")


# -- how -----------------------------------------------------------------------------------------------------


class _UnpicklableError(Exception):
    def __reduce__(self) -> NoReturn:
        raise TypeError("this error cannot be pickled")


class _UnprintableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("this error has no text")

    __repr__ = __str__


def _wrong_error(kind: str) -> BaseException:
    errors: dict[str, BaseException] = {
        "SystemExit": SystemExit(7),
        "KeyboardInterrupt": KeyboardInterrupt(),
        "GeneratorExit": GeneratorExit(),
        "MemoryError": MemoryError(),
        "RecursionError": RecursionError("maximum recursion depth exceeded"),
        "unpicklable": _UnpicklableError("cannot travel"),
        "unprintable": _UnprintableError("no text"),
        "StoreError": StoreError("somebody else's", store="another store", offset=1, length=2),
        "huge": OSError("x" * (1 << 20)),
    }
    return errors[kind]


def _touches(offsets: tuple[int, ...] | None, offset: int, length: int) -> bool:
    return offsets is None or any(offset <= byte < offset + length for byte in offsets)


def _make(path: str) -> bool:
    """Make an empty file, and tell whether this call did."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
    except FileExistsError:
        return False
    return True


def _crash(how: str) -> None:
    if how == "exit":
        os._exit(3)
    elif how == "segv":
        ctypes.string_at(8)
    elif how == "abort":
        os.abort()
    elif how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise ValueError(f"how must be 'exit', 'segv', 'abort' or 'kill', not {how!r}")
