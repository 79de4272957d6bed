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
* **The memory**: the program writes a page into the memfd, and then writes the range.  The application's mapping is
  registered MINOR as well as MISSING, so that a page which is in the file and has not been announced is not seen; the
  answer to a range write is UFFDIO_CONTINUE for what is in the file, and only then the wake-up.

The death of a worker
---------------------
The sockets live on in the supervisor and the application.  The state of the handshake stands in the record, written
before what it tells of is done.  The next worker takes back what lies unread on the other side and wakes the whole
range: every thread that still waits sends its message again, and is told again.  So a pager may be told twice of a
fault; a range write after it has been answered is a refusal (ENOENT), and harmless.
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
from userfault.pager.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from userfault.protocol.messages import Fault, Range

SEND_BUFFER = 32 << 10
"""SO_SNDBUF of the program's end (the kernel doubles it): room for some forty writes that we have not taken yet."""
_FIONREAD, _TIOCOUTQ = 0x541B, 0x5411  # <asm-generic/ioctls.h>; the module termios is not in every Python
_INT = struct.Struct("=i")
_MESSAGES = 64
_BATCH = _MESSAGES * abi.UFFD_MSG_SIZE
_REST_S = 0.001
_DONTWAKE = abi.UFFDIO_CONTINUE_MODE_DONTWAKE
_EDGE = select.EPOLLIN | select.EPOLLOUT | select.EPOLLET


def _count(sock: socket.socket, request: int) -> int:
    answer = bytearray(4)
    ioctl(sock, request, answer)
    found: int = _INT.unpack(answer)[0]
    return found


def _packet_cost() -> int:
    """Return what one packet of 8 bytes counts for in SIOCOUTQ: its memory, by the kernel's reckoning."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        one.send(bytes(8))
        return _count(one, _TIOCOUTQ)


def _nothing(thread: int) -> None:
    pass


class Outlet:
    """One exported descriptor. Methods may be called by any thread of the worker.

    Args:
        fds: Of the record, the userfaultfd, our end, the program's end, and the memory.
        on_answer: Called after each answer.
        again: Whether a former worker has served it.
    """

    def __init__(self, fds: tuple[int, ...], on_answer: Callable[[], None], *, again: bool = False) -> None:
        from userfault.protocol import connection, messages, states  # here, and not for workers that export nothing

        record, uffd, ours, theirs, memory = fds
        self.fds = fds
        self.record = Record(record)
        self.words = self.record.words
        self.id: int = self.words[book.W_ID]
        self.base: int = self.words[book.W_ADDRESS]
        self.end = self.base + self.words[book.W_SIZE]
        self.uffd = Userfaultfd(uffd)
        self.memory = os.open(f"/proc/self/fd/{memory}", os.O_RDWR | os.O_CLOEXEC)  # a file position of its own
        self.ours, self.theirs = socket.socket(fileno=ours), socket.socket(fileno=theirs)
        state, version = states.State(self.words[book.W_STATE]), self.words[book.W_VERSION]
        self.connection = connection.Connection(state=state, version=version)
        self._wake_command, self._running = messages.Wake, states.State.RUNNING
        self.on_answer = on_answer
        self.closed = False
        self._lock = RLock()
        self._sent = 0
        """Packets that lie on the other side, unread."""
        self._parked = 0
        self._cost = _packet_cost()
        room = self.theirs.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        self._parking = bytes(room // 4 - 384)  # with the kernel's own part just over a quarter
        self._buffer = bytearray(len(self._parking))
        os.set_blocking(uffd, False)
        if again:
            self._take_over()
        self.uffd.wake(self.base, self.end - self.base)

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
            self._tell()
            self._show_writable()
            self._publish()

    def renew(self) -> None:
        """Begin the conversation anew, with another program: it is told of every fault that is not resolved."""
        with self._lock:
            self._take_back()
            self._drain()
            self._sent = self._parked = 0
            self.connection.restart()
            self.pump()

    def close(self) -> None:
        """Let go of it: the other side finds the end of the file."""
        with self._lock:
            self.closed = True
            os.close(self.memory)
            self.uffd.close()
            self.ours.close()
            self.theirs.close()
            os.close(self.fds[0])
            os.close(self.fds[4])

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
        start, end = max(start, self.base), min(end, self.end)
        for first, stop in self._filled(start, end):
            at = first
            while at < stop:
                done, error = self.uffd.continue_(at, stop - at, _DONTWAKE)
                at += done
                if done:
                    continue
                if error in (errno.EEXIST, errno.EFAULT):  # visible already; dropped just now
                    at += PAGE_SIZE
                elif error in (errno.EAGAIN, errno.ENOMEM):
                    time.sleep(_REST_S)
                else:  # the range or the process is gone
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
        left = _count(self.ours, _TIOCOUTQ) // self._cost
        for _ in range(self._sent - left):
            self.connection.read(8)
        self._sent = left
        self._note_state()

    def _note_state(self) -> None:
        self.words[book.W_STATE] = self.connection.state
        self.words[book.W_VERSION] = self.connection.version
        self.words[book.W_SENT] = self._sent

    def _hear_pager(self) -> None:
        """Take what the program has written, around what is parked."""
        theirs = _count(self.ours, _FIONREAD) - self._parked * len(self._parking)
        if theirs > 0:
            stay = 1 if self._parked and self._park() else 0
            self._receive(theirs, stay)
        else:
            self._count_reads()

    def _receive(self, theirs: int, stay: int) -> None:
        """Take packets until so many bytes of the program's are read and so many packets stay parked."""
        flags = socket.MSG_DONTWAIT | socket.MSG_TRUNC
        while theirs > 0 or self._parked > stay:
            try:
                length = self.ours.recv_into(self._buffer, 0, flags)
            except OSError:  # empty: an empty packet, or the end
                break
            if length == len(self._parking) and self._buffer == self._parking:
                self._parked = max(self._parked - 1, 0)
            else:
                theirs -= length
                self._take(bytes(self._buffer[: min(length, 16)]))

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
        self._publish()  # before: whom we wake may look
        for page in sorted({fault.page for fault in woken}):
            self.uffd.wake(page, PAGE_SIZE)
        self.on_answer()

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
        with contextlib.suppress(OSError):  # full: an edge will say when there is room. Or it has shut down
            while (packet := self.connection.outgoing(self._sent)) is not None:
                self.ours.send(packet, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                self._sent += 1
                self.words[book.W_SENT] = self._sent

    def _show_writable(self) -> None:
        """Switch POLLOUT on the other side."""
        while self._parked and self.connection.poll() & select.POLLOUT:
            self._receive(0, 0)
        if not self._parked and not self.connection.poll() & select.POLLOUT:
            self._park()

    def _park(self) -> bool:
        try:
            self.theirs.send(self._parking, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:  # full of what it has written itself: not writable either. Or it has shut down
            return False
        self._parked += 1
        return True

    def _publish(self) -> None:
        self.words[book.W_PENDING] = self.connection.unread
        self.words[book.W_TOTAL] = self.connection.unread + self.connection.read_faults

    # -- from one worker, or one program, to the next -------------------------------------------------------------

    def _take_over(self) -> None:
        """Find out where the conversation stands that a dead worker led."""
        if self.connection.state is self._running:
            self._take_back()
        elif self.connection.outgoing(0) is not None:
            unread = bool(_count(self.theirs, _FIONREAD))
            if self.words[book.W_SENT] and not unread:
                self.connection.read(8)  # it has read the answer
            self._sent = int(unread)

    def _take_back(self) -> None:
        """Take out what lies unread on the other side."""
        with contextlib.suppress(OSError):
            while self.theirs.recv(8, socket.MSG_DONTWAIT):
                pass

    def _drain(self) -> None:
        """Take out what lies unread on this side, and forget it."""
        with contextlib.suppress(OSError):
            while self.ours.recv_into(self._buffer, 0, socket.MSG_DONTWAIT):
                pass
