"""A world of descriptors, pages and threads on the real kernel, and a model that says what each act must bring.

The model is the specification in a few lines: a page has a content or is missing, is marked or not, and has an owner or
not; a thread that touches a missing page waits at the page's owner, unread or read.  Every act is done to both, and
`check` compares: poll, fdinfo, and that just those threads still wait which should.

One rule is the kernel's of today and not that of 2014: a range write wakes all who wait on a page at which it ends a
fault.
"""

from __future__ import annotations

import errno
import select
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from tests.conformance.protocol_tools import Background, Stage, Touched, Toucher, number, page_of, wait_until, waiters

from userfault import madvise
from userfault.kernel import abi, memory
from userfault.kernel.memory import PAGE_SIZE
from userfault.protocol import MADV_NOUSERFAULT, MADV_USERFAULT, Descriptor, Register, State, Unregister, Wake

PAGES, DESCRIPTORS = 8, 3
VERSION, OTHER = (0xAA).to_bytes(8, "little"), (7).to_bytes(8, "little")


@dataclass
class Page:
    """What the model knows of a page."""

    content: int | None = None
    marked: bool = False
    owner: int | None = None

    @property
    def reported(self) -> bool:
        """Whether a missing page is a fault for somebody."""
        return self.marked and self.owner is not None


@dataclass
class Waiter:
    """A thread that waits, or should."""

    thread: Background[Touched]
    page: int
    address: int
    owner: int
    read: bool = False


@dataclass
class Seen:
    """What the model knows of a descriptor."""

    state: State = State.ASK_PROTOCOL
    version: bytes = b""
    waiters: list[Waiter] = field(default_factory=list)


def errno_of(call: Callable[[], object]) -> int:
    """Return the errno that a call raises, 0 if it does not."""
    try:
        call()
    except OSError as error:
        return error.errno or -1
    return 0


class World:
    """Acts, each with what it must bring. One thread."""

    def __init__(self, toucher: Toucher) -> None:
        self.stage = Stage(toucher)
        self.base = self.stage.anonymous(PAGES)
        self.pages = [Page() for _ in range(PAGES)]
        self.descriptors: list[Descriptor] = [self.stage.fresh() for _ in range(DESCRIPTORS)]
        self.seen = [Seen() for _ in range(DESCRIPTORS)]
        self.touches = 0

    def close(self) -> None:
        """Clear everything away; who still waits meets SIGBUS."""
        self.stage.close()

    def span(self, first: int, stop: int) -> tuple[int, int]:
        """Return start and end of some pages."""
        return self.base + first * PAGE_SIZE, self.base + stop * PAGE_SIZE

    # -- the handshake -----------------------------------------------------------------------------------------

    def ask(self, who: int, version: bytes) -> None:
        """Write a version."""
        seen = self.seen[who]
        found = errno_of(lambda: self.descriptors[who].write(version))
        if seen.state is State.ASK_PROTOCOL:
            assert found == 0
            seen.version = version
            seen.state = State.ACK_PROTOCOL if version == VERSION else State.ACK_UNKNOWN_PROTOCOL
        else:
            assert found == errno.EINVAL

    def read(self, who: int, length: int = 8) -> None:
        """Read an answer or a fault."""
        seen, descriptor = self.seen[who], self.descriptors[who]
        unread = [waiter for waiter in seen.waiters if not waiter.read]
        if length < 8 or seen.state is State.ASK_PROTOCOL:
            assert errno_of(lambda: descriptor.read(length)) == errno.EINVAL
        elif seen.state is State.RUNNING and not unread:
            assert errno_of(lambda: descriptor.read(length)) == errno.EAGAIN
        elif seen.state is State.RUNNING:
            address = number(descriptor.read(length))
            (found,) = [waiter for waiter in unread if waiter.address == address]
            found.read = True
        else:
            accepted = seen.state is State.ACK_PROTOCOL
            assert descriptor.read(length) == (VERSION if accepted else b"\xff" * 8)
            seen.state = State.RUNNING if accepted else State.ASK_PROTOCOL

    # -- memory ------------------------------------------------------------------------------------------------

    def touch(self, at: int) -> None:
        """Read a byte of a page in a thread of its own."""
        page = self.pages[at]
        self.touches += 1
        address = self.base + at * PAGE_SIZE + self.touches % PAGE_SIZE
        if page.content is None and page.reported:
            assert page.owner is not None
            before = waiters(self.descriptors[page.owner])[1]
            thread = self.stage.start_read(address)
            wait_until(lambda: waiters(self.descriptors[page.owner or 0])[1] > before)
            self.seen[page.owner].waiters.append(Waiter(thread, at, address, page.owner))
            return
        found = self.stage.read(address)
        if page.content is None and page.marked:
            assert (found.signal, found.address) == (signal.SIGBUS, address)
            return
        page.content = page.content or 0
        assert (found.signal, found.byte) == (0, page.content)

    def drop(self, at: int) -> None:
        """Drop a page on which nobody waits."""
        if not self._waiting({at}):
            memory.advise(self.base + at * PAGE_SIZE, PAGE_SIZE, abi.MADV_DONTNEED)
            self.pages[at].content = None

    def place(self, who: int, at: int, byte: int) -> None:
        """Place a page, waking nobody."""
        page, address = self.pages[at], self.base + at * PAGE_SIZE
        found = errno_of(lambda: self.descriptors[who].place(address, page_of(byte)))
        if not page.marked or page.owner != who:
            assert found == errno.ENOENT
        elif page.content is not None:
            assert found == errno.EEXIST
        else:
            assert found == 0
            page.content = byte

    # -- ranges ------------------------------------------------------------------------------------------------

    def wake(self, who: int, first: int, stop: int) -> None:
        """Write a range."""
        seen, (start, end) = self.seen[who], self.span(first, stop)
        found = errno_of(lambda: self.descriptors[who].write(Wake(start, end).encode()))
        if seen.state is not State.RUNNING:
            if seen.state is State.ASK_PROTOCOL:  # 16 bytes are a version, and more
                assert found == 0
                seen.state = State.ACK_UNKNOWN_PROTOCOL
            else:
                assert found == errno.EINVAL
            return
        if first >= stop:
            assert found == errno.ERANGE
            return
        ended = {waiter.page for waiter in seen.waiters if waiter.read and first <= waiter.page < stop}
        assert found == (0 if ended else errno.ENOENT)
        self._let_go(who, ended)

    def _let_go(self, who: int, ended: set[int]) -> None:
        """Threads look again: those whose page is there go on, the others wait anew."""
        for waiter in [waiter for waiter in self.seen[who].waiters if waiter.page in ended]:
            page = self.pages[waiter.page]
            if page.content is None:
                waiter.read = False
            else:
                assert waiter.thread.result().byte == page.content
                self.seen[who].waiters.remove(waiter)
        left = len(self.seen[who].waiters)
        wait_until(lambda: waiters(self.descriptors[who])[1] == left)

    def register(self, who: int, first: int, stop: int, *, by_write: bool) -> None:
        """Register pages with a descriptor."""
        start, end = self.span(first, stop)
        descriptor, pages = self.descriptors[who], self.pages[first:stop]
        by_write = by_write and self.seen[who].state is State.RUNNING
        if by_write:
            found = errno_of(lambda: descriptor.write(Register(start, end).encode()))
        else:
            found = errno_of(lambda: descriptor.register((start, end - start)))
        if any(page.owner not in (None, who) for page in pages):
            assert found == errno.EBUSY
            return
        assert found == 0
        for page in pages:
            page.owner = who

    def unregister(self, who: int, first: int, stop: int, *, by_write: bool) -> None:
        """Take pages from a descriptor."""
        start, end = self.span(first, stop)
        descriptor, pages = self.descriptors[who], self.pages[first:stop]
        by_write = by_write and self.seen[who].state is State.RUNNING
        if by_write:
            found = errno_of(lambda: descriptor.write(Unregister(start, end).encode()))
        else:
            found = errno_of(lambda: descriptor.unregister((start, end - start)))
        if any(page.owner not in (None, who) for page in pages):
            assert found == errno.EBUSY
            return
        assert found == 0
        for page in pages:
            page.owner = None
        self._released(set(range(first, stop)))

    def mark(self, first: int, stop: int, *, marked: bool) -> None:
        """Mark pages, or take the mark away."""
        start, end = self.span(first, stop)
        madvise((start, end - start), MADV_USERFAULT if marked else MADV_NOUSERFAULT)
        for page in self.pages[first:stop]:
            page.marked = marked
        if not marked:
            self._released(set(range(first, stop)))

    def renew(self, who: int) -> None:
        """Close a descriptor, and open another."""
        self.descriptors[who].close()
        assert errno_of(self.descriptors[who].read) == errno.EBADF
        mine = {at for at, page in enumerate(self.pages) if page.owner == who}
        for at in mine:
            self.pages[at].owner = None
        self._released(mine)
        self.descriptors[who] = self.stage.fresh()
        self.seen[who] = Seen()

    def _waiting(self, pages: set[int]) -> list[Waiter]:
        return [waiter for seen in self.seen for waiter in seen.waiters if waiter.page in pages]

    def _released(self, pages: set[int]) -> None:
        """Nobody is told of these pages any more: who waits there finds the page, SIGBUS, or ordinary memory."""
        for waiter in self._waiting(pages):
            page, found = self.pages[waiter.page], waiter.thread.result()
            if page.content is None and page.marked:
                assert (found.signal, found.address) == (signal.SIGBUS, waiter.address)
            else:
                page.content = page.content or 0
                assert (found.signal, found.byte) == (0, page.content)
            self.seen[waiter.owner].waiters.remove(waiter)

    # -- comparing ---------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Compare everything that can be seen."""
        for descriptor, seen in zip(self.descriptors, self.seen, strict=True):
            unread = sum(not waiter.read for waiter in seen.waiters)
            assert waiters(descriptor) == (unread, len(seen.waiters))
            assert descriptor.state is seen.state
            expected = {
                State.ASK_PROTOCOL: select.POLLOUT,
                State.ACK_PROTOCOL: select.POLLIN,
                State.ACK_UNKNOWN_PROTOCOL: select.POLLIN,
                State.RUNNING: (unread and select.POLLIN) | (len(seen.waiters) > unread and select.POLLOUT),
            }
            assert descriptor.poll() == expected[seen.state]
            assert all(waiter.thread.waiting for waiter in seen.waiters)

    def act(self, random: Random) -> None:
        """Do something at random."""
        who, at = random.randrange(DESCRIPTORS), random.randrange(PAGES)
        first = random.randrange(PAGES)
        stop = random.randrange(first + 1, PAGES + 1)
        choices: list[tuple[int, Callable[[], None]]] = [
            (2, lambda: self.ask(who, random.choice([VERSION, VERSION, OTHER]))),
            (12, lambda: self.read(who, random.choice([8, 8, 8, 7, 64]))),
            (10, lambda: self.touch(at)),
            (10, lambda: self.place(who, at, random.randrange(1, 256))),
            (8, lambda: self.wake(who, first, stop)),
            (1, lambda: self.wake(who, stop, first)),
            (4, lambda: self.drop(at)),
            (3, lambda: self.register(who, first, stop, by_write=random.random() < 0.5)),
            (2, lambda: self.unregister(who, first, stop, by_write=random.random() < 0.5)),
            (3, lambda: self.mark(first, stop, marked=random.random() < 0.8)),
            (1, lambda: self.renew(who)),
        ]
        weights, acts = zip(*choices, strict=True)
        random.choices(acts, weights)[0]()
