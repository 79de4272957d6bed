"""An arena for tests against the real kernel, and children for what may hang or die."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest
from tests.conformance.protocol_tools import Stage, Toucher

from userfault.kernel import Userfaultfd, memfd, memory, process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from userfault.kernel import Event

_SOURCES = Path(__file__).parents[2] / "src"
_TIMEOUT_S = 20

_PRELUDE = """\
import errno, faulthandler, os, signal, socket, sys, threading
faulthandler.enable()
faulthandler.dump_traceback_later({limit}, exit=True)
from userfault.errors import *
from userfault.kernel import *
from userfault.kernel import abi, memory, memfd, process
P = memory.PAGE_SIZE
"""


class RunChild(Protocol):
    """Run Python code in a process of its own, with a time limit; standard output is piped."""

    def __call__(
        self, code: str, *, timeout: float = ..., pass_fds: tuple[int, ...] = ...
    ) -> subprocess.CompletedProcess[str]: ...


class StartChild(Protocol):
    """The same without waiting for its end."""

    def __call__(self, code: str, *, pass_fds: tuple[int, ...] = ...) -> subprocess.Popen[str]: ...


def _command(code: str, limit: float) -> list[str]:
    # -S: children start in half the time, and need nothing that is installed.
    return [sys.executable, "-S", "-c", _PRELUDE.format(limit=limit) + textwrap.dedent(code)]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(_SOURCES)}


@pytest.fixture
def run_child() -> RunChild:
    def run(
        code: str, *, timeout: float = _TIMEOUT_S, pass_fds: tuple[int, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            _command(code, timeout),
            capture_output=True,
            text=True,
            timeout=timeout + 5,
            env=_environment(),
            pass_fds=pass_fds,
            check=False,
        )

    return run


@pytest.fixture
def start_child() -> Iterator[StartChild]:
    started: list[subprocess.Popen[str]] = []

    def start(code: str, *, pass_fds: tuple[int, ...] = ()) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            _command(code, _TIMEOUT_S),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_environment(),
            pass_fds=pass_fds,
        )
        started.append(child)
        return child

    yield start
    for child in started:
        child.kill()
        child.communicate(timeout=_TIMEOUT_S)


class Touch:
    """A thread that copies memory with the GIL released: this interpreter can serve its fault."""

    def __init__(self, dst: int, src: int, length: int, buffer: bytearray) -> None:
        self._buffer = buffer
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(dst, src, length), daemon=True)
        self._thread.start()
        assert self._ready.wait(_TIMEOUT_S)

    def _run(self, dst: int, src: int, length: int) -> None:
        self.thread_id = threading.get_native_id()
        self._ready.set()
        memory.memmove(dst, src, length)

    @property
    def waiting(self) -> bool:
        return self._thread.is_alive()

    def result(self) -> bytes:
        """Return what was read, or what was to be written, when the thread is through."""
        self._thread.join(_TIMEOUT_S)
        assert not self._thread.is_alive(), "the touching thread still waits"
        return bytes(self._buffer)


class Call(threading.Thread):
    """A thread for a call that waits until a message has been read."""

    def __init__(self, function: object, *arguments: object, **named: object) -> None:
        super().__init__(daemon=True)
        self._call = (function, arguments, named)
        self._answer: object = None
        self.start()

    def run(self) -> None:
        function, arguments, named = self._call
        assert callable(function)
        self._answer = function(*arguments, **named)

    def result(self) -> object:
        self.join(_TIMEOUT_S)
        assert not self.is_alive(), "the call still waits"
        return self._answer


class Arena:
    """Userfaultfds, mappings, files and threads, all given back when the test is over."""

    def __init__(self) -> None:
        self.page = memory.PAGE_SIZE
        self._uffds: list[Userfaultfd] = []
        self._mappings: list[tuple[int, int]] = []
        self._fds: list[int] = []
        self._threads: list[Touch | Call] = []
        self._kept: list[object] = []

    def uffd(self, features: int = 0, *, nonblock: bool = True, **named: object) -> Userfaultfd:
        uffd = Userfaultfd.open(features, nonblock=nonblock, **named)  # type: ignore[arg-type]
        return self.keep(uffd)

    def keep(self, uffd: Userfaultfd) -> Userfaultfd:
        self._uffds.append(uffd)
        return uffd

    def anonymous(self, pages: int, *, fill: bool = False) -> int:
        """Map private memory; fill page number n with bytes n + 1."""
        address = memory.map_memory(pages * self.page)
        self._mappings.append((address, pages * self.page))
        if fill:
            data = b"".join(bytes([number + 1]) * self.page for number in range(pages))
            memory.memmove(address, memory.address_of(data), len(data))
        return address

    def memfd(self, pages: int) -> int:
        fd = memfd.create("arena", pages * self.page)
        self._fds.append(fd)
        return fd

    def shared(self, fd: int, pages: int, **named: int) -> int:
        address = memory.map_memory(pages * self.page, fd=fd, **named)
        self._mappings.append((address, pages * self.page))
        return address

    def source(self, *bytes_of_pages: int) -> int:
        """Return the address of pages filled with these bytes."""
        data = b"".join(bytes([byte]) * self.page for byte in bytes_of_pages)
        self._kept.append(data)
        return memory.address_of(data)

    def forget(self, address: int) -> None:
        """Leave a mapping to the test, which has unmapped or moved it."""
        self._mappings = [mapping for mapping in self._mappings if mapping[0] != address]

    def adopt(self, address: int, length: int) -> None:
        self._mappings.append((address, length))

    def read(self, address: int, length: int = 8) -> Touch:
        """Start a thread that reads memory."""
        buffer = bytearray(length)
        touch = Touch(memory.address_of(buffer), address, length, buffer)
        self._threads.append(touch)
        return touch

    def write(self, address: int, data: bytes) -> Touch:
        """Start a thread that writes memory."""
        buffer = bytearray(data)
        touch = Touch(address, memory.address_of(buffer), len(data), buffer)
        self._threads.append(touch)
        return touch

    def call(self, function: object, *arguments: object, **named: object) -> Call:
        """Start a thread that calls something."""
        call = Call(function, *arguments, **named)
        self._threads.append(call)
        return call

    def events(self, uffd: Userfaultfd, count: int = 1) -> list[Event]:
        """Wait for so many messages."""
        found: list[Event] = []
        poll = select.poll()
        poll.register(uffd, select.POLLIN)
        while len(found) < count:
            assert poll.poll(_TIMEOUT_S * 1000), f"{count} messages expected, got {found}"
            found += uffd.read()
        return found

    def wait_pending(self, uffd: Userfaultfd) -> None:
        """Wait for a message, and leave it queued."""
        poll = select.poll()
        poll.register(uffd, select.POLLIN)
        assert poll.poll(_TIMEOUT_S * 1000), "no message came"

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for what the kernel offers no wait for."""
        end = time.monotonic() + _TIMEOUT_S
        while not condition():
            assert time.monotonic() < end, "it did not come true"
            time.sleep(0.001)

    def peek(self, address: int, length: int = 1) -> bytes:
        """Look at memory that is there."""
        with memory.view(address, length, readonly=True) as view:
            return bytes(view)

    def close(self) -> None:
        """Let waiting threads go first, by closing; then give back what they touched."""
        for uffd in self._uffds:
            uffd.close()
        for thread in self._threads:
            thread.result()
        for address, length in self._mappings:
            memory.unmap(address, length)
        for fd in self._fds:
            os.close(fd)


@pytest.fixture
def arena() -> Iterator[Arena]:
    before = process.userfaultfds(), len(os.listdir("/proc/self/fd"))
    arena = Arena()
    try:
        yield arena
    finally:
        arena.close()
    assert before == (process.userfaultfds(), len(os.listdir("/proc/self/fd")))


@pytest.fixture(scope="session")
def toucher(tmp_path_factory: pytest.TempPathFactory) -> Toucher:
    """Touches that may end in a signal, compiled once."""
    return Toucher.compiled(tmp_path_factory.mktemp("touch"))


@pytest.fixture
def stage(toucher: Toucher) -> Iterator[Stage]:
    """Descriptors of the 2014 protocol, marked memory and threads, cleared away when the test is over."""
    stage = Stage(toucher)
    try:
        yield stage
    finally:
        stage.close()
