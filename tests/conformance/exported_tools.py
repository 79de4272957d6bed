"""Tools for tests of exported descriptors: memory that is exported, and the program that is its pager.

The program is played by the test itself, with read(2), write(2) and poll(2) on the descriptor and nothing else; that is
possible since the touching threads have released the GIL (`protocol_tools`).  What the worker knows is seen in
`fdinfo`, a moment after it happened: so a test waits for what is to come, and for what must not come it first makes
sure that the worker has looked (`Served.prove`).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import select
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from tests.conformance.protocol_tools import TIMEOUT_S, Background, Stage, Touched, Toucher, number, page_of, wait_until

from userfault import madvise, userfaultfd
from userfault.kernel import memfd, memory
from userfault.kernel.memory import PAGE_SIZE
from userfault.pager.client import Pager
from userfault.protocol import MADV_USERFAULT, UFFD_CLOEXEC, UFFD_NONBLOCK, State

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from userfault.exported import Exported, UserfaultFD

IN, OUT = select.POLLIN, select.POLLOUT
VERSION, REFUSAL = struct.pack("=Q", 0xAA), b"\xff" * 8


@dataclass(frozen=True, slots=True)
class Info:
    """What `Exported.fdinfo` says."""

    pending: int
    total: int
    state: str
    answered: int
    refused: int
    refusal: str

    @property
    def waiting(self) -> tuple[int, int]:
        """Faults unread, and threads that wait."""
        return self.pending, self.total


def info(exported: Exported) -> Info:
    """Ask, and read the answer."""
    said = dict(re.findall(r"^(\w+):\t(.*)$", exported.fdinfo(), re.MULTILINE))
    assert said.pop("protocols") == "aa"
    numbers = {name: int(said[name]) for name in ("pending", "total", "answered", "refused")}
    return Info(**numbers, state=said["state"], refusal=said.get("refusal", ""))


def shared_mapping(pages: int) -> mmap.mmap:
    """Map a memory file, which is closed again: the mapping has a descriptor of its own."""
    fd = memfd.create("mapped", pages * PAGE_SIZE)
    try:
        return mmap.mmap(fd, pages * PAGE_SIZE)
    finally:
        os.close(fd)


class Program:
    """The pager. It knows the descriptor, the memory file, and where the memory begins.

    Args:
        fd: The exported descriptor.
        memory_fd: The memory file.
        address: Where the memory begins.
        offset: Where it begins in the file.
    """

    def __init__(self, fd: int, memory_fd: int, address: int, offset: int) -> None:
        self.fd, self.memory_fd, self.address, self.offset = fd, memory_fd, address, offset

    def write(self, data: bytes) -> None:
        """Write, as a socket has it: all of it goes."""
        assert os.write(self.fd, data) == len(data)

    def read(self, length: int = 8) -> bytes:
        """Read what is there, or comes."""
        assert self.poll(TIMEOUT_S) & IN, "there is nothing to read"
        return os.read(self.fd, length)

    def poll(self, timeout: float = 0.0, events: int = IN) -> int:
        """Wait for events, and return what poll(2) says of both."""
        for wait, wanted in ((timeout * 1000, events), (0, IN | OUT)):
            poll = select.poll()
            poll.register(self.fd, wanted)
            found = poll.poll(wait)
        return found[0][1] if found else 0

    def becomes(self, events: int) -> None:
        """Wait until poll(2) says just this."""
        wait_until(lambda: self.poll() == events)

    def handshake(self) -> None:
        """Ask for the version that there is."""
        self.write(VERSION)
        assert self.read() == VERSION

    def fault(self) -> int:
        """Read the address of a fault."""
        return number(self.read())

    def put(self, page: int, byte: int) -> None:
        """Write a page into the file."""
        assert os.pwrite(self.memory_fd, page_of(byte), self.offset + page * PAGE_SIZE) == PAGE_SIZE

    def drop(self, page: int, count: int = 1) -> None:
        """Take pages out of the file."""
        memfd.punch_hole(self.memory_fd, self.offset + page * PAGE_SIZE, count * PAGE_SIZE)

    def announce(self, page: int, count: int = 1) -> None:
        """Write the range of pages."""
        start = self.address + page * PAGE_SIZE
        self.write(struct.pack("=QQ", start, start + count * PAGE_SIZE))

    def answer(self, address: int, byte: int) -> None:
        """Fill the page of a fault, and announce it."""
        page = (address - self.address) // PAGE_SIZE
        self.put(page, byte)
        self.announce(page)


class Served:
    """Memory that is exported, and its program."""

    def __init__(self, scene: Scene, exported: Exported) -> None:
        self.scene, self.exported = scene, exported
        self.address = exported.address
        self.program = Program(exported.fileno(), exported.memory_fd, exported.address, exported.offset)

    @property
    def info(self) -> Info:
        """What fdinfo says."""
        return info(self.exported)

    def at(self, page: int, byte: int = 0) -> int:
        """Return the address of a byte of a page."""
        return self.address + page * PAGE_SIZE + byte

    def touch(self, *pages: int) -> list[Background[Touched]]:
        """Read a byte of each page, in threads of their own; wait until the worker knows that each waits."""
        return [self.touch_at(self.at(page)) for page in pages]

    def touch_at(self, address: int) -> Background[Touched]:
        """Read a byte in a thread, and wait until the worker knows that it waits."""
        before = self.info.total
        thread = self.scene.stage.start_read(address)
        wait_until(lambda: self.info.total > before)
        return thread

    def waiting(self, pending: int, total: int) -> None:
        """Wait until the worker knows of so many."""
        wait_until(lambda: self.info.waiting == (pending, total))

    def refused(self, errno: int, data: bytes) -> str:
        """Write something, and wait until it is refused; return why, in words, when it names this errno."""
        before = self.info
        self.program.write(data)
        wait_until(lambda: self.info.refused > before.refused)
        after = self.info
        assert after.refused == before.refused + 1
        assert after.refusal.startswith(f"write(userfaultfd): [Errno {errno}] "), after.refusal
        return after.refusal

    def prove(self, data: Sequence[bytes] = ()) -> None:
        """Have something refused, after more that is: the worker has seen all that was done before."""
        before = self.info
        assert before.state != "ASK_PROTOCOL", "any version may be asked for"
        for refused in (*data, b""):
            self.program.write(refused)
        wait_until(lambda: self.info.refused >= before.refused + len(data) + 1)
        assert self.info.refused == before.refused + len(data) + 1


class Scene:
    """Exports on a stage."""

    def __init__(self, toucher: Toucher, pager: Pager) -> None:
        self.stage = Stage(toucher)
        self.pager = pager
        self._files = contextlib.ExitStack()
        self._exports: list[Exported] = []
        """Not to be forgotten before the end."""

    def file(self, pages: int) -> int:
        """Make a memory file."""
        fd = memfd.create("exported", pages * PAGE_SIZE)
        self._files.callback(os.close, fd)
        return fd

    def mapped(self, fd: int, pages: int, *, before: int = 0, **named: int) -> int:
        """Map a part of a file."""
        address = memory.map_memory(pages * PAGE_SIZE, fd=fd, offset=before * PAGE_SIZE, **named)
        self.stage.adopt(address, pages)
        return address

    def registered(self, address: int, pages: int, flags: int = UFFD_NONBLOCK | UFFD_CLOEXEC) -> UserfaultFD:
        """Mark memory and register it."""
        descriptor = userfaultfd(flags)
        self.stage.keep(descriptor)
        madvise((address, pages * PAGE_SIZE), MADV_USERFAULT)
        descriptor.register((address, pages * PAGE_SIZE))
        return descriptor

    def fresh(self, pages: int = 4, *, before: int = 0) -> Served:
        """Export memory; nobody has shaken hands."""
        address = self.mapped(self.file(before + pages), pages, before=before)
        return self.served(self.registered(address, pages).export(pager=self.pager))

    def served(self, exported: Exported) -> Served:
        """Play the program of an export."""
        self._exports.append(exported)
        return Served(self, exported)

    def running(self, pages: int = 4, *, before: int = 0) -> Served:
        """Export memory, and shake hands."""
        served = self.fresh(pages, before=before)
        served.program.handshake()
        wait_until(lambda: served.exported.state is State.RUNNING)
        return served

    def close(self) -> None:
        """Clear everything away."""
        self.stage.close()
        self._files.close()
        self._exports.clear()


class Ground:
    """What the scenes of a file share."""

    def __init__(self, toucher: Toucher, pager: Pager) -> None:
        self.toucher, self.pager = toucher, pager

    def cpu_seconds(self) -> float:
        """Return what the worker has used."""
        with open(f"/proc/{self.pager.worker_pid}/stat", encoding="ascii") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rests(self, seconds: float = 0.5) -> bool:
        """Whether the worker does as good as nothing for a while."""
        before, worker = self.cpu_seconds(), self.pager.worker_pid
        time.sleep(seconds)  # the time in which it would spin
        assert self.pager.worker_pid == worker, "the worker has died"
        return self.cpu_seconds() - before < seconds / 4


@pytest.fixture(name="ground", scope="module")
def make_ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    """A pager of its own for the tests of a file, which do not start it again and again."""
    toucher = Toucher.compiled(tmp_path_factory.mktemp("touch"))
    with Pager() as pager:
        yield Ground(toucher, pager)


@pytest.fixture(name="scene")
def make_scene(ground: Ground) -> Iterator[Scene]:
    """Exports, cleared away at the end."""
    scene = Scene(ground.toucher, ground.pager)
    restarts = ground.pager.restarts
    try:
        yield scene
    finally:
        scene.close()
    assert ground.pager.restarts == restarts, "the worker has died"
