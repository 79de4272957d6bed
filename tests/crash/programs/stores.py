"""Stores of the victims. They run in the worker, and do to it from within what no signal could do at that point."""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import struct
import threading
import time
from typing import TYPE_CHECKING, Any

from userfault.blocks import ledger
from userfault.kernel import abi
from userfault.kernel.memory import address_of
from userfault.pager import wire
from userfault.pager.served import Served
from userfault.testing import PatternStore, RefusingStore
from userfault.testing.patterns import RecipeStore

if TYPE_CHECKING:
    from collections.abc import Callable


class GilStallingStore(PatternStore):
    """Reads do not return, and no other thread of Python runs meanwhile."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        ctypes.PyDLL(None).pause()


class LateCrashingStore(PatternStore):
    """Reads take a while, and then end the worker."""

    def __init__(self, size: int, seconds: float) -> None:
        super().__init__(size)
        self.seconds = seconds

    def read_into(self, offset: int, buffer: memoryview) -> None:
        time.sleep(self.seconds)
        die()


class TimedStore(PatternStore):
    """Reads fail; a file gets a line with the time of each."""

    def __init__(self, size: int, path: str) -> None:
        super().__init__(size)
        self.path = path

    def read_into(self, offset: int, buffer: memoryview) -> None:
        with open(self.path, "a", encoding="ascii") as file:
            file.write(f"{time.monotonic()}\n")
        raise OSError("not yet")


class FailsThenStallsStore(PatternStore):
    """The first read in a process fails, a second one never returns; it makes a path to say so."""

    def __init__(self, size: int, stalled: str) -> None:
        super().__init__(size)
        self.stalled = stalled
        self.failed = False

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if not self.failed:
            self.failed = True
            raise OSError("the first read")
        with open(self.stalled, "w", encoding="ascii"):
            pass
        while True:
            signal.pause()


class SlowlyMadeStore(PatternStore):
    """Takes a while to appear in the worker, as one does that imports half the world."""

    def __init__(self, size: int, seed: int, seconds: float) -> None:
        super().__init__(size, seed)
        self.seconds = seconds

    def __setstate__(self, state: dict[str, Any]) -> None:
        time.sleep(state["seconds"])
        self.__dict__.update(state)


class MadeOnceStore(PatternStore):
    """Appears in the first worker, and in none after it, until a path is gone."""

    def __init__(self, size: int, path: str) -> None:
        super().__init__(size)
        self.path = path

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if not once(self.path):
            raise ConnectionError("the data base is down")


class MinedStore(PatternStore):
    """A store that lays a mine in the worker: a function in which the process dies, every other time it is called.

    Args:
        size: Bytes of the pattern.
        mine: As the arguments of `lay`.
        kind: `"hot"`: the bytes are in memory, as of a hot file; `"at hand"`: they can be had at once; `"inline"`: they
            are computed in the fault loop; `"pool"`: by readers.
        bad: An offset that cannot be read.
        healed: As soon as this path exists, it can.
    """

    def __init__(self, size: int, mine: tuple[str, str, str, int], kind: str, bad: int, healed: str) -> None:
        super().__init__(size, 0, 0 if kind == "inline" else 8)
        self.mine, self.kind, self.bad, self.healed = mine, kind, bad, healed
        self.address = 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.data = self.expected(0, self.size) + bytes(4096)
        self.address = address_of(self.data)
        lay(*self.mine)

    def _can_give(self, offset: int, length: int) -> bool:
        return not offset <= self.bad < offset + length or os.path.exists(self.healed)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if not self._can_give(offset, len(buffer)):
            raise OSError("out of tape")
        super().read_into(offset, buffer)

    def locate(self, offset: int, length: int) -> int:
        return self.address + offset if self.kind == "hot" and self._can_give(offset, length) else 0

    def read_now(self, offset: int, buffer: memoryview) -> bool:
        if self.kind != "at hand" or not self._can_give(offset, len(buffer)):
            return False
        super().read_into(offset, buffer)
        return True


class MinedFileStore(RefusingStore):
    """A writable file behind a class of the user's own, which lays a mine in the worker; see `MinedStore`."""

    def __init__(self, path: str, mine: tuple[str, str, str, int]) -> None:
        super().__init__(path)
        self.mine = mine

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        lay(*self.mine)


class WholeBlocksStore(RecipeStore):
    """A folder with a file for each block, which is replaced whole: nobody ever sees a half of the new one."""

    writable = True

    def __init__(self, folder: str, blocks: int, block_size: int) -> None:
        self.folder, self.size, self.block_size = folder, blocks * block_size, block_size

    def path(self, block: int) -> str:
        """Return the file of a block."""
        return os.path.join(self.folder, str(block))

    def read_into(self, offset: int, buffer: memoryview) -> None:
        with open(self.path(offset // self.block_size), "rb") as file:
            if file.readinto(buffer) != self.block_size:
                raise OSError("a part of a block was asked for")

    def write(self, offset: int, data: memoryview) -> None:
        for at in range(0, len(data), self.block_size):
            path = self.path((offset + at) // self.block_size)
            with open(f"{path}.new", "wb") as file:
                file.write(data[at : at + self.block_size])
            os.rename(f"{path}.new", path)

    def flush(self) -> None:
        pass


class LateWritingStore(RefusingStore):
    """A file of which one block is being written when its region ends in the worker, as chance may have it.

    Args:
        path: The file.
        log: Gets a line when that write has ended, and one when the region has.
    """

    def __init__(self, path: str, log: str) -> None:
        super().__init__(path)
        self.log = log

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.entered, self.closed = threading.Event(), threading.Event()
        self.ending = False
        close = Served.close

        def write_and_close(region: Served, *args: Any) -> None:
            if region.writeback is not None:
                self.ending = True
                region.writeback.flush(None)  # as a tick does, for what stays dirty since it is pinned
                self.entered.wait()
            close(region, *args)
            self.note("closed")
            self.closed.set()

        Served.close = write_and_close  # type: ignore[assignment,method-assign]  # that is the purpose

    def note(self, word: str) -> None:
        """Write a word to the log."""
        with open(self.log, "a", encoding="ascii") as file:
            file.write(f"{word}\n")

    def write(self, offset: int, data: memoryview) -> None:
        if self.ending:
            self.entered.set()
            self.closed.wait(0.3)  # long enough for who does not wait
        super().write(offset, data)
        if self.ending:
            self.note("written")


ALSO = {"userfault.kernel.userfaultfd.ioctl": ("userfault.pager.faults.ioctl",)}
"""Other names of a function, in modules that have imported it by name."""


def lay(function: str, moment: str, path: str, times: int) -> None:
    """Replace a function by one in which the process dies, at the first call, the third, and so on, `times` in all.

    Args:
        function: Its dotted name.
        moment: `"before"`, `"after"` or `"half"`, and which calls count: an ioctl, a kind of message, or `"r+"` for
            those about the memory of a region that writes back.
        path: What counts the calls, in all workers together.
        times: How often.
    """
    places = [_find(path) for path in (function, *ALSO.get(function, ()))]
    original: Callable[..., Any] = getattr(*places[0])
    when, _, which = moment.partition(" ")

    def mined(*args: Any, **named: Any) -> Any:
        if not _counts(which, args):
            return original(*args, **named)
        number = _count(f"{path}.calls")
        dies = number % 2 == 1 and number < 2 * times
        if not dies:
            return original(*args, **named)
        _count(f"{path}.deaths")
        if when != "before":
            original(*(_half(args) if when == "half" else args), **named)
        return die()

    for owner, name in places:
        setattr(owner, name, mined)


def _counts(which: str, args: tuple[Any, ...]) -> bool:
    """Tell whether this is a call of `ioctl(fd, request, argument)` or `send(socket, message)` that counts."""
    if not which:
        return True
    if which == "r+":
        return ledger.read_words(args[0])[ledger.W_MODE] == ledger.READ_WRITE
    if which.startswith("UFFDIO"):
        return bool(args[1] == getattr(abi, which))
    return bool(args[1].kind == getattr(wire, which))


def _half(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cut a UFFDIO_COPY, or what is done to a range of memory, to half of its pages; and a write to half its bytes."""
    if isinstance(args[-1], memoryview):
        return *args[:-1], args[-1][: len(args[-1]) // 2]
    if isinstance(args[-1], int):
        fd, offset, length = args
        return fd, offset, _half_length(length)
    fd, request, argument, *rest = args
    struct.pack_into("=Q", argument, 16, _half_length(struct.unpack_from("=Q", argument, 16)[0]))
    return fd, request, argument, *rest


def _half_length(length: int) -> int:
    return max(length // 2 & -4096, 4096)


def _count(path: str) -> int:
    """Return how often this was called with this path, now included."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
    os.write(fd, b".")
    number = os.lseek(fd, 0, os.SEEK_CUR)
    os.close(fd)
    return number


def _find(function: str) -> tuple[Any, str]:
    """Return the module or class that a function belongs to, and its name there."""
    path, _, name = function.rpartition(".")
    try:
        return importlib.import_module(path), name
    except ModuleNotFoundError:
        module, _, kind = path.rpartition(".")
        return getattr(importlib.import_module(module), kind), name


def once(path: str) -> bool:
    """Make a file; return whether this call did."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC))
    except FileExistsError:
        return False
    return True


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
