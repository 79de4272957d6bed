"""Victims that have exported memory, the programs that are its pagers, and a worker that dies at any line.

A program here is a process of its own that knows two descriptors and two numbers, and nothing of userfault.
"""

from __future__ import annotations

import mmap
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from tests.crash.programs.common import BLOCK, PAGE, begin, listen, say

import userfault
from userfault import madvise, userfaultfd
from userfault.kernel import Userfaultfd, memfd, memory
from userfault.kernel.abi import RegisterMode
from userfault.pager import outlet, wire
from userfault.pager.record import W_STATE, Record
from userfault.protocol import MADV_NOUSERFAULT, MADV_USERFAULT, UFFD_CLOEXEC, State, connection
from userfault.protocol.constants import FEATURES
from userfault.testing import PatternStore, touch

if TYPE_CHECKING:
    from collections.abc import Callable

PAGES = 64
VERSION, REFUSAL = (0xAA).to_bytes(8, "little"), b"\xff" * 8
PATIENCE_S = 10.0
_HELLO = b"h"

PROGRAM = """\
import errno, os, select, struct, sys
fd, memory, address, pages, style = *map(int, sys.argv[1:5]), sys.argv[5]
page_size, version = os.sysconf("SC_PAGE_SIZE"), (0xAA).to_bytes(8, sys.byteorder)

def next_words():
    if style == "polls":
        poll.poll()
    elif style == "edges":
        while True:
            try:
                return os.read(fd, 8)
            except BlockingIOError:
                epoll.poll()
    return os.read(fd, 8)

poll = select.poll()
poll.register(fd, select.POLLIN)
epoll = select.epoll()
epoll.register(fd, select.EPOLLIN | select.EPOLLET)
os.set_blocking(fd, style != "edges")
end = "eof"
try:
    for asked in (b"unknown.", version):
        os.write(fd, asked)
        answer = next_words()
        if answer != (version if asked == version else b"\\xff" * 8):
            sys.exit(f"the answer to {asked} is {answer}")
    while words := next_words():
        page = (int.from_bytes(words, sys.byteorder) - address) // page_size
        if not 0 <= page < pages:
            sys.exit(f"told of {words}")
        os.pwrite(memory, bytes([page % 255 + 1]) * page_size, page * page_size)
        start = address + page * page_size
        os.write(fd, struct.pack("=QQ", start, start + page_size))
except OSError as error:
    end = errno.errorcode[error.errno]
print("program", end, flush=True)
"""


class Exporting:
    """Memory that is exported, byte by page."""

    def __init__(self) -> None:
        fd = memfd.create("victim", PAGES * PAGE)
        self.memory = mmap.mmap(fd, PAGES * PAGE)
        os.close(fd)
        self.descriptor = userfaultfd(UFFD_CLOEXEC)
        madvise(self.memory, MADV_USERFAULT)
        self.descriptor.register(self.memory)
        self.exported = self.descriptor.export()
        self.pager = self.exported.pager

    def start_program(self, style: str = "blocks") -> subprocess.Popen[bytes]:
        """Start a program that is the pager."""
        fds = self.exported.fileno(), self.exported.memory_fd
        numbers = (*fds, self.exported.address, PAGES)
        command = [sys.executable, "-S", "-E", "-c", PROGRAM, *map(str, numbers), style]
        return subprocess.Popen(command, pass_fds=fds)

    def introduce(self) -> None:
        """Say `ready`, the pids of supervisor and worker, and the number of the kernel's descriptor."""
        say("ready", self.pager.pid, self.pager.worker_pid, self.descriptor.kernel.fd)

    def drop(self) -> None:
        """Drop all pages: each of them is missing again."""
        memfd.punch_hole(self.exported.memory_fd, 0, PAGES * PAGE)

    def wrong(self, page: int) -> bool:
        """Touch a page, with the GIL in hand as ordinary code does."""
        return self.memory[page * PAGE + page] != page % 255 + 1

    def end(self, program: subprocess.Popen[bytes]) -> None:
        """Close it in good order; the program ends by itself."""
        self.exported.close()
        if program.wait(PATIENCE_S):
            say("program failed", program.returncode)
        madvise(self.memory, MADV_NOUSERFAULT)
        self.memory.close()


def scan(style: str, with_region: bool, seed: int) -> None:
    """Fault without end, in the exported memory and in a region, until told to stop; check each byte."""
    rng = random.Random(seed)
    one = Exporting()
    program = one.start_program(style)
    store = PatternStore(16 * BLOCK)
    region = userfault.Region(store, "r", BLOCK, pager=one.pager)
    expected = store.expected(0, store.size)
    one.introduce()
    wrong = faults = 0
    while not select.select([0], [], [], 0)[0]:
        for page in rng.sample(range(PAGES), PAGES):
            wrong += one.wrong(page)
            faults += 1
        one.drop()
        if with_region:
            wrong += bytes(region.memory) != expected
            region.evict()
    say("wrong", wrong)
    say("faults", faults)
    say("restarts", one.pager.restarts)
    region.close()
    one.end(program)
    one.pager.close()
    say("over")


def swap_programs(times: int, seed: int) -> None:
    """Kill the program at any moment, and let another take over, while threads fault; then go on until told to stop."""
    rng = random.Random(seed)
    one = Exporting()
    tallies = [[0, 0] for _ in range(3)]
    over = threading.Event()

    def fault(tally: list[int], pages: list[int]) -> None:
        while not over.is_set():
            for page in pages:
                tally[0] += 1
                tally[1] += touch(one.exported.address + page * PAGE)[0] != page % 255 + 1
                memfd.punch_hole(one.exported.memory_fd, page * PAGE, PAGE)

    own = [list(range(first, PAGES, 3)) for first in range(3)]
    threads = [threading.Thread(target=fault, args=work) for work in zip(tallies, own, strict=True)]
    for thread in threads:
        thread.start()
    one.introduce()
    for _ in range(times):
        program = one.start_program(rng.choice(("blocks", "polls", "edges")))
        before = sum(tally[0] for tally in tallies)
        if rng.random() < 0.7:  # else it may not even have begun
            while sum(tally[0] for tally in tallies) < before + 10:
                time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        program.kill()
        program.wait()
        one.exported.renew()
    program = one.start_program()
    say("done")
    listen()
    over.set()
    for thread in threads:
        thread.join(PATIENCE_S)
        if thread.is_alive():
            say("stuck", one.exported.fdinfo().replace("\n", " "))
    say("wrong", sum(tally[1] for tally in tallies))
    say("faults", sum(tally[0] for tally in tallies))
    one.end(program)
    one.pager.close()
    say("over")


def touch_later(where: str) -> None:
    """Wait for the word, then touch what is not there."""
    one = Exporting()
    one.start_program()
    assert not one.wrong(0)
    one.introduce()
    listen()

    def run() -> None:
        if where == "write":
            _, writer = os.pipe()
            os.write(writer, memoryview(one.memory)[PAGE : 2 * PAGE])
        say("VALUE", one.memory[PAGE])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


def rest(with_program: bool) -> None:
    """Have memory exported, and do something else."""
    one = Exporting()
    if with_program:
        one.start_program()
        assert not one.wrong(0)
    one.introduce()
    listen()
    listen()
    say("VALUE", one.memory[PAGE])


def leave(how: str) -> None:
    """End with memory exported, and its program running."""
    one = Exporting()
    one.start_program()
    assert not one.wrong(0)
    one.introduce()
    listen()
    if how == "exit":
        sys.exit(0)
    elif how == "exception":
        raise ArithmeticError("on purpose")
    elif how == "exec":
        os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(0.5)"])
    os.kill(os.getpid(), getattr(signal, how))


# -- a worker that dies at a line -------------------------------------------------------------------------------------


class Mortal:
    """Two processes that are workers of one exported descriptor: the first dies at a line, then the second takes over.

    They run just what a worker runs for an export. The first dies when so many lines of `outlet`, `connection` and
    `wire` have been executed.
    """

    FILES = frozenset((outlet.__file__, connection.__file__, wire.__file__))

    def __init__(self, line: int) -> None:
        self.base = memory.map_memory(4 * PAGE, fd=(fd := memfd.create("mortal", 4 * PAGE)))
        self.memory_fd = fd
        self.uffd = Userfaultfd.open(FEATURES, nonblock=True)
        self.uffd.register(self.base, 4 * PAGE, RegisterMode.MISSING | RegisterMode.MINOR)
        record, self.record = Record.create(1, self.base, 4 * PAGE, 0)
        worker_end, program_end = wire.pair()
        program_end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, outlet.SEND_BUFFER)
        self.control, control = wire.pair()
        fds = (record, self.uffd.fd, worker_end.detach(), program_end.detach(), self.memory_fd)
        first = os.fork()
        if not first:
            self._begin(-1, fds, control, line)
        first_fd = os.pidfd_open(first)
        second = os.fork()
        if not second:
            self._begin(first_fd, fds, control, 0)
        os.close(first_fd)
        self.pids = first, second
        os.close(record)
        os.close(fds[2])
        control.close()
        self.fd = fds[3]

    def _work(self, fds: tuple[int, ...], control: socket.socket, line: int) -> None:
        """Serve, as the thread of `Exports` does; a word at the control socket is a renewal."""
        if line:
            sys.settrace(self._die_at(line))
        one = outlet.Outlet(fds, lambda: None, again=not line)
        epoll = select.epoll()
        one.watch(epoll)
        one.pump()
        sys.settrace(None)
        epoll.register(control, select.EPOLLIN)
        control.send(_HELLO)
        if line:
            sys.settrace(self._die_at(self.left))
        while True:
            for fd, _ in epoll.poll():
                if fd != control.fileno():
                    one.pump(fd)
                elif number := control.recv(1):
                    one.renew(number[0])
                    control.send(number)
                else:
                    os._exit(0)

    def _die_at(self, line: int) -> Callable[..., Any]:
        self.left = line

        def trace(frame: Any, event: str, _: object) -> Any:
            if frame.f_code.co_filename not in self.FILES:
                return None
            if event == "line":
                self.left -= 1
                if not self.left:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        return trace

    def _begin(self, former: int, fds: tuple[int, ...], control: socket.socket, line: int) -> None:
        """In a forked child: wait until another process has died, then be a worker."""
        self.control.close()
        if former >= 0:
            select.select([former], [], [])
        try:
            self._work(fds, control, line)
        except ConnectionError:  # the end came before somebody had read our hello
            os._exit(0)
        except BaseException:  # noqa: BLE001  # a forked child must not go on as its parent
            sys.excepthook(*sys.exc_info())
        os._exit(1)

    # -- the program, which knows nothing of that ---------------------------------------------------------------------

    def read(self, what: str) -> bytes:
        """Read what must be there soon."""
        if not select.select([self.fd], [], [], PATIENCE_S)[0]:
            raise AssertionError(f"{what}: it waits for ever in state {State(self.record.words[W_STATE]).name}")
        return os.read(self.fd, 8)

    def handshake(self) -> None:
        """Ask for a version that nobody knows, then for the one."""
        for version, answer in ((b"unknown.", REFUSAL), (VERSION, VERSION)):
            os.write(self.fd, version)
            found = self.read("handshake")
            if found != answer:
                raise AssertionError(f"the answer to {version!r} is {found!r}")

    def serve(self, threads: list[threading.Thread], byte: int) -> None:
        """Answer faults until threads are through."""
        deadline = time.monotonic() + PATIENCE_S
        while any(thread.is_alive() for thread in threads):
            if not select.select([self.fd], [], [], 0.0005)[0]:
                if time.monotonic() > deadline:
                    raise AssertionError("a thread waits for ever")
                continue
            address = int.from_bytes(os.read(self.fd, 8), "little")
            page = (address - self.base) // PAGE
            if not 0 <= page < 4:
                raise AssertionError(f"told of {address:#x}")
            os.pwrite(self.memory_fd, bytes([byte]) * PAGE, page * PAGE)
            self.announce(page)

    def announce(self, page: int) -> None:
        """Write the range of a page."""
        os.write(self.fd, struct.pack("=QQ", self.base + page * PAGE, self.base + (page + 1) * PAGE))

    def renew(self) -> None:
        """Have the conversation renewed, however many workers it takes."""
        number = b"\1"
        self.control.send(number)
        while (answer := self.control.recv(1)) != number:
            if answer == _HELLO:  # of another worker: the request may have been lost with the first
                self.control.send(number)

    def converse(self) -> None:
        """Everything that a program does, once."""
        found: list[bytes] = []
        threads = [self._start(page, found) for page in (0, 1)]
        self.handshake()
        self.serve(threads, 7)
        for junk in (b"", b"junk", bytes(16000), bytes(16)):
            os.write(self.fd, junk)
        os.pwrite(self.memory_fd, b"\7" * PAGE, 2 * PAGE)
        self.announce(2)
        threads = [self._start(page, found) for page in (2, 3)]
        self.read("a fault")  # and dies; another program takes over
        self.renew()
        self.handshake()
        self.serve(threads, 7)
        assert found == [b"\7"] * 4, found

    def _start(self, page: int, found: list[bytes]) -> threading.Thread:
        thread = threading.Thread(target=lambda: found.append(touch(self.base + page * PAGE)), daemon=True)
        thread.start()
        return thread

    def close(self) -> bool:
        """Clear away; return whether the first worker died at its line."""
        self.control.close()
        statuses = [os.waitpid(pid, 0)[1] for pid in self.pids]
        self.uffd.close()
        memory.unmap(self.base, 4 * PAGE)
        os.close(self.memory_fd)
        os.close(self.fd)
        return statuses[0] == signal.SIGKILL


def die_at_lines(first: int, step: int) -> None:
    """Have workers die at every `step`th line, until one does not reach its own."""
    line, died = first, True
    while died:
        mortal = Mortal(line)
        try:
            mortal.converse()
        except BaseException as error:
            raise AssertionError(f"the worker died at its line number {line}") from error
        died = mortal.close()
        line += step
    say("lines", line)


if __name__ == "__main__":
    begin(globals())
