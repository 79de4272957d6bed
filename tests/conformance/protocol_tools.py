"""Tools for tests of the 2014 protocol: touches that may end in a signal, and a stage for descriptors and threads.

`touch.c` does the touching: with the GIL released, so that this interpreter can be the pager, and with SIGBUS and
SIGSEGV caught, so that a touch that is refused is a result.  A test in another folder makes itself a `Stage` too:

    stage = Stage(Toucher.compiled(folder))
    memory = stage.marked(2, descriptor)
    touch = stage.start_read(memory)
    ...
    stage.close()
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from userfault import madvise, userfaultfd
from userfault.errors import KernelError, LocalProtocolError
from userfault.kernel import memfd, memory
from userfault.kernel.memory import PAGE_SIZE
from userfault.protocol import (
    MADV_NOUSERFAULT,
    MADV_USERFAULT,
    UFFD_CLOEXEC,
    UFFD_NONBLOCK,
    Descriptor,
    Wake,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

T = TypeVar("T")

TIMEOUT_S = 20.0
"""How long anything may take on a busy machine before it counts as hanging."""
BUS_ADRERR, BUS_MCEERR_AR = 2, 4
SEGV_MAPERR, SEGV_ACCERR = 1, 2
_mlock2 = ctypes.CDLL(None).mlock2
_mlock2.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint)
SOURCE = Path(__file__).with_name("touch.c")


# -- touching --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Touched:
    """How a touch ended.

    Attributes:
        signal: 0, or SIGBUS or SIGSEGV.
        code: The signal's `si_code`.
        address: The signal's `si_addr`.
        byte: What was read.
    """

    signal: int = 0
    code: int = 0
    address: int = 0
    byte: int = 0


def there(byte: int) -> Touched:
    """Return what comes of reading a page that is there; a write has byte 0."""
    return Touched(byte=byte)


def sigbus(address: int, code: int = BUS_ADRERR) -> Touched:
    """Return what comes of touching a missing page that nobody serves."""
    return Touched(signal.SIGBUS, code, address)


def sigsegv(address: int, code: int = SEGV_MAPERR) -> Touched:
    """Return what comes of touching what is not mapped."""
    return Touched(signal.SIGSEGV, code, address)


@dataclass(frozen=True, slots=True)
class Tally:
    """What many touches came to.

    Attributes:
        touches: All of them.
        right: Found the byte that was expected.
        zeros: Found zero.
        others: Found another byte.
        sigbus: Ended in SIGBUS.
        poisoned: Of these, with the code of a poisoned page: a range was just changing hands.
        sigsegv: Ended in SIGSEGV.
        latest: Where the latest wrong byte stood.
    """

    touches: int
    right: int
    zeros: int
    others: int
    sigbus: int
    poisoned: int
    sigsegv: int
    latest: int


class _Touched(ctypes.Structure):
    _fields_ = (
        ("signal", ctypes.c_int32),
        ("code", ctypes.c_int32),
        ("address", ctypes.c_uint64),
        ("byte", ctypes.c_uint8),
    )


class _Tally(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in Tally.__dataclass_fields__)


class Background(Generic[T]):
    """A call in a thread of its own, which may wait for long."""

    def __init__(self, function: Callable[..., T], *args: Any) -> None:
        self._answer: list[T] = []
        self._error: BaseException | None = None
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(function, args), daemon=True)
        self._thread.start()
        assert self._begun.wait(TIMEOUT_S)

    def _run(self, function: Callable[..., T], args: Sequence[Any]) -> None:
        self.thread_id = threading.get_native_id()
        self._begun.set()
        try:
            self._answer.append(function(*args))
        except BaseException as error:  # noqa: BLE001  # it is raised where the result is asked for
            self._error = error

    @property
    def waiting(self) -> bool:
        """Whether the call has not come back."""
        return self._thread.is_alive()

    @property
    def ident(self) -> int:
        """What `signal.pthread_kill` calls it."""
        assert self._thread.ident is not None
        return self._thread.ident

    def ended(self) -> bool:
        """Wait until the call has come back, whatever it brings."""
        self._thread.join(TIMEOUT_S)
        return not self._thread.is_alive()

    def result(self) -> T:
        """Wait for the call, and return what it returned, or raise what it raised."""
        assert self.ended(), "the call still waits"
        if self._error is not None:
            raise self._error
        return self._answer[0]


class Often(Background[Tally]):
    """A thread that touches pages again and again until it is told to stop."""

    def __init__(self, function: Callable[..., Tally], *args: Any) -> None:
        self._stop = ctypes.c_int32(0)
        self._tally = _Tally()
        super().__init__(function, *args, self._stop, self._tally)

    @property
    def touches(self) -> int:
        """How many touches there have been until now."""
        return int(self._tally.touches)

    def stop(self) -> None:
        """Let it end with the touch it is at."""
        self._stop.value = 1


B = TypeVar("B", bound=Background[Any])


class Toucher:
    """Touches memory, with the GIL released; SIGBUS and SIGSEGV become results. Any thread.

    Args:
        library: `touch.c`, compiled.
    """

    def __init__(self, library: Path) -> None:
        self.library = str(library)
        self._library = ctypes.CDLL(str(library))
        self._library.try_read.argtypes = (ctypes.c_uint64, ctypes.POINTER(_Touched))
        self._library.try_write.argtypes = (ctypes.c_uint64, ctypes.c_uint8, ctypes.POINTER(_Touched))
        often = (*[ctypes.c_uint64] * 5, ctypes.c_int, ctypes.c_uint8)
        self._library.touch_often.argtypes = (*often, ctypes.POINTER(ctypes.c_int32), ctypes.POINTER(_Tally))
        self._library.touch_often.restype = None

    @classmethod
    def compiled(cls, folder: Path) -> Toucher:
        """Compile it into a folder, and load it."""
        library = folder / "touch.so"
        command = ["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]
        subprocess.run([*command, "-o", str(library), str(SOURCE)], check=True)
        return cls(library)

    def read(self, address: int) -> Touched:
        """Read one byte."""
        found = _Touched()
        self._library.try_read(address, found)
        return Touched(found.signal, found.code, found.address, found.byte)

    def write(self, address: int, byte: int = 1) -> Touched:
        """Write one byte."""
        found = _Touched()
        self._library.try_write(address, byte, found)
        return Touched(found.signal, found.code, found.address, found.byte)

    def start_read(self, address: int) -> Background[Touched]:
        """Read one byte in a thread."""
        return Background(self.read, address)

    def start_write(self, address: int, byte: int = 1) -> Background[Touched]:
        """Write one byte in a thread."""
        return Background(self.write, address, byte)

    def start_often(
        self, start: int, pages: int, right: int, *, first: int = 0, step: int = 1, write: bool = False
    ) -> Often:
        """Touch pages in a thread, from page `first` on every `step`th, around and around, and count the outcomes."""
        return Often(self._often, start, pages, PAGE_SIZE, first, step, write, right)

    def _often(self, *args: Any) -> Tally:
        self._library.touch_often(*args)
        return Tally(*(getattr(args[-1], name) for name in Tally.__dataclass_fields__))


@contextlib.contextmanager
def handling(number: int, handler: Callable[..., object]) -> Iterator[None]:
    """Handle a signal for a while; a timer that sends it ends with that."""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(number, before)


# -- the stage -------------------------------------------------------------------------------------------------


def wait_until(condition: Callable[[], object]) -> None:
    """Wait for what the kernel offers no wait for."""
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.0005)


def protocol_errno(call: Callable[..., object], *args: object) -> int:
    """Return the errno with which a call is refused as a breach of the protocol."""
    return _errno(LocalProtocolError, call, args)


def kernel_errno(call: Callable[..., object], *args: object) -> int:
    """Return the errno with which a call fails as one of the kernel's would."""
    return _errno(KernelError, call, args)


def _errno(kind: type[LocalProtocolError | KernelError], call: Callable[..., object], args: Sequence[object]) -> int:
    # Not `pytest.raises`: what it keeps of the call would keep buffers from being closed.
    try:
        returned = call(*args)
    except kind as error:
        return error.errno or 0
    raise AssertionError(f"{call} returned {returned}")


def page_of(byte: int) -> bytes:
    """Return a page of bytes."""
    return bytes([byte]) * PAGE_SIZE


def number(data: bytes) -> int:
    """Return the word that was read."""
    assert len(data) == 8
    return int.from_bytes(data, "little" if memoryview(b"\1\0").cast("H")[0] == 1 else "big")


def waiters(descriptor: Descriptor) -> tuple[int, int]:
    """Return how many faults are unread, and how many threads wait."""
    found = re.match(r"pending:\t(\d+)\ntotal:\t(\d+)\n", descriptor.fdinfo())
    assert found
    return int(found[1]), int(found[2])


class Stage:
    """Descriptors, memory and threads; all of it is cleared away at the end, whatever the test did to it.

    Args:
        toucher: Does the touching.
    """

    def __init__(self, toucher: Toucher) -> None:
        self.toucher = toucher
        self.page = PAGE_SIZE
        self.read, self.write = toucher.read, toucher.write
        self._closed_at_end = contextlib.ExitStack()
        self._descriptors: list[Descriptor] = []
        self._threads: list[Background[Any]] = []
        self._mappings: list[tuple[int, int]] = []

    # -- descriptors -------------------------------------------------------------------------------------------

    def fresh(self, flags: int = UFFD_NONBLOCK | UFFD_CLOEXEC, **named: Any) -> Descriptor:
        """Open a descriptor that nobody has shaken hands with."""
        return self.keep(Descriptor(flags, **named) if named else userfaultfd(flags))

    def descriptor(self, flags: int = UFFD_NONBLOCK | UFFD_CLOEXEC, **named: Any) -> Descriptor:
        """Open a descriptor that runs."""
        descriptor = self.fresh(flags, **named)
        assert descriptor.handshake()
        return descriptor

    def keep(self, descriptor: Descriptor) -> Descriptor:
        """Close it at the end."""
        self._descriptors.append(descriptor)
        return descriptor

    def faults(self, descriptor: Descriptor, count: int = 1) -> list[int]:
        """Wait for so many faults, and read them."""
        return [self.fault(descriptor) for _ in range(count)]

    def fault(self, descriptor: Descriptor) -> int:
        """Wait for a fault, and read it."""
        assert descriptor.wait(TIMEOUT_S, 1), "no fault came"
        return number(descriptor.read())

    def wake(self, descriptor: Descriptor, address: int, pages: int = 1) -> int:
        """Write the range of pages."""
        start = address & -PAGE_SIZE
        return descriptor.write(Wake(start, start + pages * PAGE_SIZE).encode())

    def answer(self, descriptor: Descriptor, address: int, byte: int) -> None:
        """Place a page of bytes where a thread waits whose fault has been read, and let it go on."""
        assert descriptor.place(address & -PAGE_SIZE, page_of(byte)) == PAGE_SIZE
        assert self.wake(descriptor, address) == 16

    # -- memory ------------------------------------------------------------------------------------------------

    def anonymous(self, pages: int, **named: int) -> int:
        """Map private memory."""
        address = memory.map_memory(pages * PAGE_SIZE, **named)
        self.adopt(address, pages)
        return address

    def shared(self, pages: int) -> int:
        """Map a memory file."""
        return self.shared_twice(pages)[0]

    def shared_twice(self, pages: int) -> tuple[int, int]:
        """Map a memory file at two places."""
        fd = memfd.create("stage", pages * PAGE_SIZE)
        self._closed_at_end.callback(os.close, fd)
        one, other = (memory.map_memory(pages * PAGE_SIZE, fd=fd) for _ in range(2))
        self.adopt(one, pages)
        self.adopt(other, pages)
        return one, other

    def marked(self, pages: int, descriptor: Descriptor | None = None, *, shared: bool = False) -> int:
        """Map memory that is marked, and registered if there is a descriptor."""
        address = self.shared(pages) if shared else self.anonymous(pages)
        if descriptor is not None:
            descriptor.register((address, pages * PAGE_SIZE))
        self.mark(address, pages)
        return address

    def mark(self, address: int, pages: int = 1) -> None:
        """Mark pages."""
        madvise((address, pages * PAGE_SIZE), MADV_USERFAULT)

    def unmark(self, address: int, pages: int = 1) -> None:
        """Take the mark away."""
        madvise((address, pages * PAGE_SIZE), MADV_NOUSERFAULT)

    def filled(self, *bytes_of_pages: int) -> int:
        """Map private memory, and fill its pages."""
        address = self.anonymous(len(bytes_of_pages))
        data = b"".join(page_of(byte) for byte in bytes_of_pages)
        memory.memmove(address, memory.address_of(data), len(data))
        return address

    def adopt(self, address: int, pages: int) -> None:
        """Unmap it at the end."""
        self._mappings.append((address, pages * PAGE_SIZE))

    def forget(self, address: int) -> None:
        """Leave a mapping to the test, which has unmapped it."""
        self._mappings = [mapping for mapping in self._mappings if mapping[0] != address]

    def lock(self, address: int, pages: int = 1) -> None:
        """Lock pages in memory, those that will be there too (MLOCK_ONFAULT)."""
        assert _mlock2(address, pages * PAGE_SIZE, 1) == 0

    def there(self, address: int, pages: int = 1) -> list[bool]:
        """Tell which pages are there."""
        return [bool(byte & 1) for byte in memory.mincore(address, pages * PAGE_SIZE)]

    def bytes_at(self, address: int, length: int = 1) -> bytes:
        """Look at memory that is there."""
        with memory.view(address, length, readonly=True) as view:
            return bytes(view)

    # -- others ------------------------------------------------------------------------------------------------

    def pipe(self) -> tuple[int, int]:
        """Make a pipe: where to read, and where to write. (A write that waits in a fault has it locked.)"""
        ends = os.pipe()
        for end in ends:
            self._closed_at_end.callback(os.close, end)
        return ends

    # -- threads -----------------------------------------------------------------------------------------------

    def start_read(self, address: int) -> Background[Touched]:
        """Read one byte in a thread."""
        return self.background(self.toucher.start_read(address))

    def start_write(self, address: int, byte: int = 1) -> Background[Touched]:
        """Write one byte in a thread."""
        return self.background(self.toucher.start_write(address, byte))

    def start_reads(self, descriptor: Descriptor, addresses: Sequence[int]) -> list[Background[Touched]]:
        """Read in as many threads, one after the other: each waits in its fault before the next begins."""
        touches = []
        for address in addresses:
            before = waiters(descriptor)[1]
            touches.append(self.start_read(address))
            wait_until(lambda before=before: waiters(descriptor)[1] > before)  # type: ignore[misc]
        return touches

    def call(self, function: Callable[..., T], *args: Any) -> Background[T]:
        """Call something in a thread."""
        return self.background(Background(function, *args))

    def background(self, thread: B) -> B:
        """Wait for it at the end."""
        if len(self._threads) > 1000:
            self._threads = [other for other in self._threads if other.waiting]
        self._threads.append(thread)
        return thread

    # -- the end -----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the descriptors, which lets every thread go, and give the memory back."""
        for descriptor in self._descriptors:
            descriptor.close()
        for thread in self._threads:
            if isinstance(thread, Often):
                thread.stop()
        hanging = [thread for thread in self._threads if not thread.ended()]
        assert not hanging, f"{hanging} still wait"
        for address, length in self._mappings:
            with contextlib.suppress(KernelError):  # parts of it may be gone
                madvise((address, length), MADV_NOUSERFAULT)
            memory.unmap(address, length)
        self._closed_at_end.close()
