"""One exported descriptor as the worker sees it: the protocol of 2014 over one end of a socket pair.

The other end is in the hands of a program that knows nothing of us and has read(2), write(2) and poll(2) only.  What it
must find there, and how a socket gives it
------------------------------------------
* **One address a read, one command a write**: SOCK_SEQPACKET keeps packets whole.
* **POLLIN: an unread fault.**  Each unread fault is a packet in its queue.
* **A range write ends the faults that have been read.**  Which have been is told by SIOCOUTQ: what of ours lies unread
  on the other side, in units of one packet's cost; and each read there is an edge (EPOLLOUT) here.
* **POLLOUT: a fault that was read and not ended.**  A socket is writable as long as what *it* has sent, and we have not
  taken, costs less than a quarter of its send buffer (`unix_writable`, net/unix/af_unix.c).  So POLLOUT is switched off
  by *parking* one large packet, sent from a duplicate of its own end, in our queue, and on by taking it out.  A write
  goes through nevertheless, since that takes only room.
* **Reading behind a parked packet** would take it out first.  So a second one is parked behind, and then everything up
  to it is read: POLLOUT never flickers, which an edge-triggered epoll on the other side would notice.
* **A writer that found its send buffer full sleeps until the end is writable**, by the same quarter.  So after it may
  have been full, the parked packet is taken out for a moment: then POLLOUT does flicker.
* **An empty packet** is no byte in SIOCINQ.  But it costs: SIOCOUTQ, asked of the program's end, tells of it.
* **A read is an edge here only if our end is writable by the same rule**, so never more lies unread on the other side
  than costs a quarter of our send buffer.
* **The memory**: the program writes a page into the memfd, and then writes the range.  The application's mapping is
  registered MINOR as well as MISSING, so that a page which is in the file and has not been announced is not seen; the
  answer to a range write is UFFDIO_CONTINUE for what is in the file, and only then the wake-up.

The death of a worker
---------------------
The sockets live on in the supervisor and the application.  The state of the handshake stands in the record, written
before what it tells of is done: a packet of the program's is looked at, done, and only then taken out.  Whether the
answer of the handshake was sent, and read, is told by the socket itself: SO_PEEK_OFF of the program's end, which is set
just before, falls by what is read there (Linux 3.4).  The next worker takes back what lies unread on the other side and
wakes the whole range: every thread that still waits sends its message again, and is told again.  So a pager may be told
twice of a fault; a range write after it has been answered is a refusal (ENOENT), and harmless.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import time
from fcntl import ioctl
from threading import RLock

from userfault.errors import LocalProtocolError
from userfault.kernel import abi, memfd
from userfault.kernel.memory import PAGE_SIZE
from userfault.kernel.userfaultfd import Userfaultfd
from userfault.pager import record as book
from userfault.pager import wire
from userfault.pager.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from userfault.protocol.messages import Fault, Range

SEND_BUFFER = 32 << 10
"""SO_SNDBUF of the program's end (the kernel doubles it): room for some forty writes that we have not taken yet."""
_FIONREAD, _TIOCOUTQ = 0x541B, 0x5411  # <asm-generic/ioctls.h>; the module termios is not in every Python
_SO_PEEK_OFF = 42  # <asm-generic/socket.h>; Python has no name for it
_UNSET = -1
_INT = struct.Struct("=i")
_MESSAGES = 64
_BATCH = _MESSAGES * abi.UFFD_MSG_SIZE
_REST_S = 0.001
PATIENCE = 200
"""How often a refusal that may pass is tried again."""
_DONTWAKE = abi.UFFDIO_CONTINUE_MODE_DONTWAKE
_EDGE = select.EPOLLIN | select.EPOLLOUT | select.EPOLLET
# Plain numbers: each | of the library's flags is a call.
_LOOK = int(socket.MSG_PEEK | socket.MSG_TRUNC | socket.MSG_DONTWAIT)
_TAKE = int(socket.MSG_DONTWAIT)
_SEND = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
_PARKED = b"\0parked\0"
"""How a parked packet begins: no version and no range does. Behind it stands whose it is."""
_WORDS = 16
"""Bytes that count of what the program writes."""
_HEAD_COST = 2048
"""More than an empty packet costs."""


def _count(sock: socket.socket, request: int) -> int:
    found: int = _INT.unpack(ioctl(sock, request, bytes(_INT.size)))[0]
    return found


def _cost(sock: socket.socket, length: int) -> int:
    """Return what a packet of so many bytes counts for in SIOCOUTQ: its memory, by the kernel's reckoning."""
    before = _count(sock, _TIOCOUTQ)
    sock.send(bytes(length))
    return _count(sock, _TIOCOUTQ) - before


def _nothing(thread: int) -> None:
    pass


class Outlet:
    """One exported descriptor. Methods may be called by any thread of the worker.

    Args:
        fds: Of the record, the userfaultfd, our end, the program's end, and the memory. They are its own, once it is
            made.
        on_answer: Called after each answer.
        again: Whether a former worker has served it.
    """

    def __init__(self, fds: tuple[int, ...], on_answer: Callable[[], None], *, again: bool = False) -> None:
        from userfault.protocol import connection, messages, states  # here, and not for workers that export nothing

        self.fds = fds
        self.record = Record(fds[0])
        self.words = self.record.words
        self.id: int = self.words[book.W_ID]
        self.base: int = self.words[book.W_ADDRESS]
        self.end = self.base + self.words[book.W_SIZE]
        state, version = states.State(self.words[book.W_STATE]), self.words[book.W_VERSION]
        self.connection = connection.Connection(state=state, version=version)
        self._wake_command, self._running = messages.Wake, states.State.RUNNING
        self.on_answer = on_answer
        self.closed = False
        self._lock = RLock()
        self._token = _PARKED + os.urandom(_WORDS - len(_PARKED))
        self._sent = self._parked = 0
        """Packets of ours that lie on the other side, unread; packets of ours that lie on this side."""
        self._marked = True
        self._head = bytearray(_WORDS)
        self._starved = again
        self._in_front = False
        """Whether what is parked lies before whatever the program has written."""
        with contextlib.ExitStack() as undo:
            self._open(undo)
            self._measure()
            if again:
                self._take_over()
            self._wake_all()
            undo.pop_all()

    def _open(self, undo: contextlib.ExitStack) -> None:
        """Take the descriptors, until it is undone."""
        _, uffd, ours, theirs, memory = self.fds
        self.uffd = Userfaultfd(uffd)
        undo.callback(self.uffd.detach)
        self.ours = socket.socket(fileno=ours)
        undo.callback(self.ours.detach)
        self.theirs = socket.socket(fileno=theirs)
        undo.callback(self.theirs.detach)
        self.memory = os.open(f"/proc/self/fd/{memory}", os.O_RDWR | os.O_CLOEXEC)  # a file position of its own
        undo.callback(os.close, self.memory)
        os.set_blocking(uffd, False)

    def _measure(self) -> None:
        """Find out what packets cost."""
        self._room = self.theirs.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        length = self._room // 4 - 384  # with the kernel's own part just over a quarter
        self._parking = self._token.ljust(length, b"\0")
        scale, other = wire.pair()
        with scale, other:
            self._cost, self._parking_cost = _cost(scale, 8), _cost(scale, length)
        self._most = self.ours.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 4 // self._cost - 1

    def watch(self, epoll: select.epoll) -> None:
        """Have an epoll wake for whatever may happen to it: `pump` then."""
        epoll.register(self.uffd.fd, select.EPOLLIN | select.EPOLLET)
        epoll.register(self.ours, _EDGE)

    # -- what can be done to it ----------------------------------------------------------------------------------

    def pump(self, fd: int = -1, saw: Callable[[int], None] = _nothing) -> None:
        """Do whatever there is to do.

        Args:
            fd: Which of its descriptors has news: the other is not looked at. -1: either may have.
            saw: Called with the thread of each fault.
        """
        with self._lock:
            if self.closed:
                return
            if fd != self.ours.fileno():
                self._hear_memory(saw)
            if fd != self.uffd.fd:
                self._hear_pager()
            self._settle()
            self._tell()
            self._publish()

    def recover(self) -> None:
        """Begin again where `pump` failed: whoever still waits asks anew."""
        with self._lock:
            if not self.closed:
                self._wake_all()
                self.pump()

    def renew(self, number: int) -> None:
        """Begin the conversation anew, with another program: it is told of every fault that is not resolved.

        Args:
            number: The request's. One that comes again, to another worker, must not end a conversation that has begun.
        """
        with self._lock:
            if number <= self.words[book.W_RENEWED]:
                return
            if self._is_shut():
                raise OSError(errno.EPIPE, "a program has shut the descriptor down: close it, and export anew")
            wire.drain(self.theirs)
            wire.drain(self.ours)
            self._sent = self._parked = 0
            self.connection = type(self.connection)()
            self._wake_all()
            self.pump()
            self.words[book.W_RENEWED] = number

    def _is_shut(self) -> bool:
        """Whether the program has used shutdown(2), which nothing undoes."""
        poll = select.poll()
        for end in (self.ours, self.theirs):
            poll.register(end, select.POLLRDHUP)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Let go of it: the other side finds the end of the file."""
        with self._lock:
            self.closed = True
            wire.drain(self.theirs)
            wire.hang_up(self.ours)
            os.close(self.memory)
            self.uffd.close()
            self.ours.close()
            self.theirs.close()
            os.close(self.fds[0])
            os.close(self.fds[4])

    def _wake_all(self) -> None:
        """Have every thread that still has to wait ask again.

        Whom a page was given meanwhile does not: a new program that was told of it would fill the page over what the
        application has written there since.
        """
        self.uffd.wake(self.base, self.end - self.base)

    # -- the memory ----------------------------------------------------------------------------------------------

    def _hear_memory(self, saw: Callable[[int], None]) -> None:
        full = True
        while full:
            data, told = self.uffd.read_raw(_MESSAGES), False
            full = len(data) == _BATCH  # if not, the queue was empty just now, and what comes is another edge
            for event, _flags, address, thread in abi.UFFD_MSG_PAGEFAULT_STRUCT.iter_unpack(data):
                if event == abi.UFFD_EVENT_PAGEFAULT:
                    saw(thread)
                    told |= self.connection.fault(address, thread)
            if data and not told:  # a thread that cannot sleep, since a signal waits for it, asks again and again
                time.sleep(_REST_S)

    def _allow(self, start: int, end: int) -> None:
        """Make visible what the program has put into the file; what is not there stays missing."""
        start, end, impatience = max(start, self.base), min(end, self.end), 0
        for first, stop in self._filled(start, end):
            at = first
            while at < stop:
                done, error = self.uffd.continue_(at, stop - at, _DONTWAKE)
                at += done
                if done:
                    continue
                if error in (errno.EEXIST, errno.EFAULT):  # visible already; dropped just now
                    at += PAGE_SIZE
                elif error in (errno.EAGAIN, errno.ENOMEM) and impatience < PATIENCE:
                    impatience += 1
                    time.sleep(_REST_S)  # only the kernel can say when that passes
                else:  # the range or the process is gone; or it does not pass, and who waits will ask again
                    return

    def _filled(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        if end - start == PAGE_SIZE:  # the usual case: CONTINUE itself will say
            yield start, end
            return
        shift = self.words[book.W_OFFSET] - self.base
        for first, stop in memfd.data_extents(self.memory, start + shift, end + shift):
            yield first - shift, stop - shift

    # -- the program at the other end ----------------------------------------------------------------------------

    def _count_reads(self) -> None:
        """Find out how many of our packets have been read, and have them count as read."""
        if not self._sent:
            return
        left = min(_count(self.ours, _TIOCOUTQ) // self._cost, self._sent)
        for _ in range(self._sent - left):
            self.connection.read(8)
        self._sent = left
        self._note_state()

    def _note_state(self) -> None:
        self.words[book.W_VERSION] = self.connection.version
        self.words[book.W_STATE] = self.connection.state  # last: a successor must not find it with another's version
        if self._marked and not self._answering():
            self._mark(_UNSET)

    def _answering(self) -> bool:
        """Whether the answer of the handshake waits to be read."""
        return self.connection.state is not self._running and self.connection.outgoing(0) is not None

    def _writable(self) -> bool:
        """Whether POLLOUT should be on."""
        return bool(self.connection.poll() & select.POLLOUT)

    def _hear_pager(self) -> None:
        """Take what the program has written, around what is parked, and have its POLLOUT be what it should be."""
        self._count_reads()
        if self._parked and self._in_front and self._writable():
            self._unpark()
        self._settle()
        behind = False
        lies = not self._parked or self._lies()
        while lies and (length := self._look()) >= 0:
            freed = 2 * length + _HEAD_COST
            if not self._is_parked(length):
                self._take(bytes(self._head[: min(length, _WORDS)]))
                behind = False
            elif self._head == self._token:
                if not self._writable():
                    if behind:  # what costs already is only on its way: an edge will tell
                        break
                    behind = self._park()
                self._parked -= 1
                freed = self._parking_cost
            self._settle()
            self._drop()
            lies = self._lies(freed)
        self._in_front = not lies
        if self._parked and (self._starved or self._writable()):
            self._unpark()

    def _lies(self, freed: int = 0) -> bool:
        """Whether something of the program's lies here, or is on its way.

        Args:
            freed: At most so much cost what was taken out since the last time.
        """
        cost = _count(self.theirs, _TIOCOUTQ)
        if cost + freed >= self._room:  # it may have been full in between, and a writer asleep
            self._starved = True
        return cost > self._parked * self._parking_cost

    def _look(self) -> int:
        """Look at the first packet that lies here, and return its length; -1 if there is none."""
        try:
            length = self.ours.recv_into(self._head, 0, _LOOK)
        except (BlockingIOError, ConnectionError):
            return -1
        # Nothing may be an empty packet, or the end: it has shut down.
        return length if length or _count(self.theirs, _TIOCOUTQ) else -1

    def _drop(self) -> None:
        """Take out what was looked at."""
        self.ours.recv_into(self._head, 0, _TAKE)

    def _is_parked(self, length: int) -> bool:
        """Whether what was looked at is no packet of the program's: ours, or a former worker's."""
        return length == len(self._parking) and self._head.startswith(_PARKED)

    def _settle(self) -> None:
        """See that POLLOUT is off if it should be."""
        if not self._parked and not self._writable():
            self._park()

    def _unpark(self) -> None:
        while self._parked:
            self._drop()
            self._parked -= 1
        self._starved = self._starved and _count(self.theirs, _TIOCOUTQ) * 4 > self._room  # else it was woken
        self._settle()

    def _park(self) -> bool:
        try:
            self.theirs.send(self._parking, _SEND)
        except (BlockingIOError, ConnectionError):  # full of what it has written: not writable. Or it has shut down
            return False
        self._parked += 1
        self._in_front = False
        return True

    def _take(self, data: bytes) -> None:
        """Do what the program has written; say in words what a write(2) would have said by an errno."""
        self._count_reads()  # whatever it read before it wrote this
        try:
            command = self.connection.parse(data)
            if isinstance(command, self._wake_command):
                self._allow(command.start, command.end)
            woken = self.connection.obey(command).woken
        except LocalProtocolError as error:
            self.record.refuse(str(error))
            return
        self._note_state()
        if woken:
            self._let_go(woken)
        elif self.connection.state is self._running:
            self._refuse_registration(command)  # type: ignore[arg-type]  # nothing else wakes nobody

    def _let_go(self, woken: tuple[Fault, ...]) -> None:
        self.words[book.W_ANSWERED] += len(woken)
        self._publish()  # before: whom we wake may look, or kill us
        self.on_answer()
        for page in sorted({fault.page for fault in woken}):
            self.uffd.wake(page, PAGE_SIZE)

    def _refuse_registration(self, command: Range) -> None:
        name = type(command).__name__.lower()
        where = f"[{command.start:#x}, {command.end:#x})"
        inside = self.base <= command.start and command.end <= self.end
        if name == "register" and inside:
            return  # it is registered
        self.record.refuse(f"{name} {where}: what is registered with an exported descriptor is fixed")

    def _tell(self) -> None:
        """Send what may be read: the answer of the handshake, or the faults."""
        self._note_state()
        with contextlib.suppress(ConnectionError):  # it has shut down
            while self._sent < self._most and (packet := self.connection.outgoing(self._sent)) is not None:
                if self._answering():
                    self._mark(len(packet))
                self.ours.send(packet, _SEND)
                self._sent += 1

    def _publish(self) -> None:
        self.words[book.W_PENDING] = self.connection.unread
        self.words[book.W_TOTAL] = self.connection.unread + self.connection.read_faults

    # -- from one worker to the next ------------------------------------------------------------------------------

    def _mark(self, count: int) -> None:
        """Have the program's end count down what is read there."""
        self.theirs.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, count)
        self._marked = count != _UNSET

    def _take_over(self) -> None:
        """Find out where the conversation stands that a dead worker led."""
        if not self._answering():
            wire.drain(self.theirs)  # what lies unread there
        elif _count(self.theirs, _FIONREAD):
            self._sent = 1
        elif not self.theirs.getsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF):
            self.connection.read(8)  # it has read the answer
        self._note_state()
