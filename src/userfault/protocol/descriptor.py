"""The userfault descriptor of 2014, over a kernel userfaultfd of this process.

**A pager in the interpreter that it serves is a trap.**  A thread that touches memory from Python usually holds the GIL
while it is stopped, and then no other thread of the interpreter runs: not the one that would answer.  Three ways round
it: touch with the GIL released (`userfault.testing.touch`, `ndarray.copy`, `hashlib` on large buffers, any C code that
releases it); be the pager in a forked child, which has a copy of this object and of the descriptor; or `export` the
range, and be the pager in any program.

Some facts about userfaultfd, and what follows
----------------------------------------------
* A message is queued in the kernel until it is read, and poll(2) says POLLIN for as long.  So `read` takes one message
  at a time and keeps none: what is unread here is unread there, and POLLIN on `fileno()` is right.
* /proc/self/fdinfo counts who waits: `pending`, not read; `total`, read or not.  So `poll` and `fdinfo` ask there; what
  was read is remembered only to know which pages a range write wakes; if the kernel counts fewer threads, those are
  forgotten that wait no longer.
* UFFDIO_WAKE wakes everybody in a range of pages, read or not.  So a range write wakes only the pages of faults that
  have been read.  What remains is an unread fault *on the same page* as a read one: it is woken too.  If the page is
  there, the thread goes on and its fault is never read; if not, it faults anew.
* For a blocking descriptor poll(2) says POLLERR, always.  An edge-triggered epoll reports even so that something has
  happened, and a read can be told not to wait (RWF_NOWAIT, Linux 6.10).  So the descriptor's own O_NONBLOCK is the
  user's, and `wait` works in both modes; `asyncio` and `selectors` need UFFD_NONBLOCK.
* When a descriptor is closed, the kernel of today fills missing pages with zeros.  So `close` gives the ranges to the
  guard first (`marks`), and only then closes.
"""

from __future__ import annotations

import ctypes
import os
import select
import sys
import time
import warnings
import weakref
from errno import EAGAIN, EBADF, EBUSY, EINVAL, ENOENT, EPERM
from threading import RLock
from typing import TYPE_CHECKING

from userfault.errors import KernelError
from userfault.kernel import abi, memory
from userfault.kernel.memory import PAGE_SIZE
from userfault.kernel.process import waits_in_user_fault
from userfault.kernel.syscalls import naming
from userfault.protocol.connection import Connection, fdinfo_text
from userfault.protocol.constants import FEATURES, UFFD_CLOEXEC, UFFD_NONBLOCK, USERFAULTFD_PROTOCOL
from userfault.protocol.marks import MARKS, extent, open_with_move
from userfault.protocol.messages import RANGE, Register, Unregister, Version, Wake
from userfault.protocol.states import State, poll_bits
from userfault.protocol.waiting import Bells, take_message
from userfault.shield import to_the_end

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType
    from typing import Self

    from typing_extensions import Buffer

    from userfault.kernel.userfaultfd import Userfaultfd
    from userfault.protocol.marks import Memory

ANY = select.POLLIN | select.POLLOUT
PATIENCE_S = 1.0
"""How long a refusal that passes (EAGAIN) is tried again."""
_message = abi.UFFD_MSG_PAGEFAULT_STRUCT.unpack


class Descriptor:
    """Speaks the protocol of October 2014: read addresses, write ranges.

    Any thread may call any method.  `close` ends the calls of other threads with EBADF.  A forked child has a copy that
    acts on the memory of its parent: it may be the pager, if the parent leaves reading and writing to it.

    Args:
        flags: `UFFD_CLOEXEC`, `UFFD_NONBLOCK`.
        versions: The protocol versions to know.
        user_mode_only: True: never serve faults inside system calls (they fail with EFAULT); False: insist on serving
            them; None: if there is privilege.

    Raises:
        KernelError: EINVAL: another flag. EMFILE, ENOMEM.
        UnsupportedError: No userfaultfd for this process, or too old a kernel; with the remedy.
    """

    def __init__(
        self,
        flags: int = 0,
        *,
        versions: Iterable[int] = (USERFAULTFD_PROTOCOL,),
        user_mode_only: bool | None = None,
    ) -> None:
        self._closed = True  # until it is open
        if flags & ~(UFFD_CLOEXEC | UFFD_NONBLOCK):
            detail = f"flags {flags:#x}: UFFD_CLOEXEC and UFFD_NONBLOCK are all there is"
            raise KernelError(EINVAL, "userfaultfd", detail)
        self._connection = Connection(versions)
        nonblock = bool(flags & UFFD_NONBLOCK)
        self._uffd = open_with_move(FEATURES, nonblock=nonblock, user_mode_only=user_mode_only)
        with naming("fcntl(F_SETFD)"):
            os.set_inheritable(self._uffd.fd, not flags & UFFD_CLOEXEC)
        self._lock = RLock()  # a finalizer may run while this thread holds it
        self._placing = RLock()
        """Held while a page is placed, and while a range leaves: a page placed in between would be cured away."""
        self._bells = Bells()
        self._inbox = bytearray(abi.UFFD_MSG_SIZE)
        """A message of the kernel's that has not been made a fault yet; its first byte is 0 if there is none."""
        self._given = ""
        """Why reading and writing are somebody else's now."""
        self._pid = os.getpid()
        self._closed = False
        _alive.add(self)

    # -- what it is ----------------------------------------------------------------------------------------------

    def fileno(self) -> int:
        """Return the kernel's descriptor. Its POLLIN is that of `poll` once running; POLLOUT it does not know.

        Raises:
            KernelError: EBADF: closed.
        """
        self._check_open("fileno")
        return self._uffd.fd

    @property
    def state(self) -> State:
        """Where the conversation stands."""
        return self._connection.state

    @property
    def closed(self) -> bool:
        """Whether `close` has been called."""
        return self._closed

    @property
    def user_mode_only(self) -> bool:
        """Whether faults inside system calls fail with EFAULT, for want of privilege."""
        return self._uffd.user_mode_only

    @property
    def kernel(self) -> Userfaultfd:
        """The kernel's descriptor."""
        return self._uffd

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The ranges registered with it: pairs of start and end."""
        return [(start, end) for start, end, _ in MARKS.of(self._uffd)]

    # -- the protocol --------------------------------------------------------------------------------------------

    def read(self, length: int = 8) -> bytes:
        """Read one answer of the handshake, or the address of one fault: 8 bytes, however many are asked for.

        Raises:
            LocalProtocolError: EINVAL: less than 8 asked for, or no version has been written.
            BlockingIOError: EAGAIN: no fault is unread, and the descriptor does not block.
            KernelError: EBADF: closed. EBUSY: exported.
        """
        while True:
            with self._lock:
                self._check_open("read")
                try:
                    return self._read(length)
                except BlockingIOError:
                    if not os.get_blocking(self._uffd.fd):
                        raise
            self.wait(events=select.POLLIN)

    def _read(self, length: int) -> bytes:
        self._digest()
        try:
            data = self._connection.read(length)
        except BlockingIOError:
            take_message(self._uffd, self._inbox)
            self._digest()
            data = self._connection.read(length)
        self._bells.ring()
        return data

    def _digest(self) -> None:
        """Make a fault of the message that was taken. A signal handler may raise between any two of these steps."""
        if self._inbox[0]:
            _code, _flags, address, thread = _message(self._inbox)
            self._connection.fault(address, thread)
            self._inbox[0] = 0

    def write(self, data: Buffer) -> int:
        """Take a version (8 bytes), or, once running, a range (16 bytes: start and end).

        A range write lets the threads go on whose faults have been read, and whose addresses lie in it. With bit 0 of
        the start it registers the range, with bit 1 it unregisters it.

        Returns:
            8 or 16: what counted; more is ignored.

        Raises:
            LocalProtocolError: EINVAL, ERANGE, ENOENT: see `protocol.Connection.write`.
            KernelError: EFAULT: the buffer cannot be read. EBUSY, EINVAL, ENOMEM: as `register`. EBADF: closed.
        """
        with self._lock:
            self._check_open("write")
            least = self._connection.expects()
        taken = _bytes_of(data, least)
        with self._lock:
            self._check_open("write")
            self._reconcile()
            command = self._connection.parse(taken)
            if isinstance(command, Wake):  # woken before they are forgotten: a signal handler may raise in between
                for page in sorted({fault.page for fault in self._connection.ended_by(command)}):
                    self._uffd.wake(page, PAGE_SIZE)
            elif isinstance(command, Register | Unregister):
                self._check_own("write")
            if isinstance(command, Register):
                MARKS.attach(command.start, command.end, self._uffd, None)
            elif isinstance(command, Unregister):
                with self._placing:
                    MARKS.detach(command.start, command.end, self._uffd)
            written = self._connection.obey(command)
            self._bells.ring()
        return written.length

    def poll(self) -> int:
        """Return the events of the moment: bits of `select.POLLIN` and `select.POLLOUT`.

        Raises:
            KernelError: EBADF: closed. EBUSY: exported.
        """
        with self._lock:
            self._check_open("poll")
            if self._connection.state is not State.RUNNING:
                return self._connection.poll()
            return poll_bits(*self._waiting())

    def wait(self, timeout: float | None = None, events: int = ANY) -> int:
        """Wait until `poll` says one of `events`; return what it says, 0 when the time is up.

        Args:
            timeout: Seconds; None: without end.
            events: Bits of `select.POLLIN` and `select.POLLOUT`.

        Raises:
            ValueError: Neither is asked for.
            KernelError: EBADF: closed, perhaps meanwhile. EBUSY: exported.
        """
        if not events & ANY:
            raise ValueError(f"events {events:#x}: ask for select.POLLIN, select.POLLOUT or both")
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._bells.something_new(self._watched) as new:
            while not (found := self.poll()) & events:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return 0
                new.poll(left)
        return found

    def _watched(self) -> int:
        with self._lock:
            self._check_open("wait")
            return self._uffd.fd

    def fdinfo(self) -> str:
        """Return the lines that /proc would show: faults not read, threads waiting, protocols known."""
        with self._lock:
            if self._closed:
                raise KernelError(EBADF, "fdinfo(userfaultfd)", "it is closed")
            unread, read = self._waiting()
            return fdinfo_text(unread, unread + read, self._connection.versions)

    def _waiting(self) -> tuple[int, int]:
        """Count the threads that wait: those whose fault is unread, and the others."""
        found = self._uffd.fdinfo()
        held = self._connection.unread + bool(self._inbox[0])  # after a read that a signal handler has ended
        return found.pending + held, max(found.total - found.pending - held, 0)

    # -- more than the proposal had ------------------------------------------------------------------------------

    def handshake(self, version: int = USERFAULTFD_PROTOCOL) -> bool:
        """Write a version and read the answer: True if it is known, and the conversation runs.

        Raises:
            LocalProtocolError: EINVAL: it runs already.
        """
        data = Version(version).encode()
        with self._lock:
            self.write(data)
            return self.read(8) == data and self.state is State.RUNNING

    def register(self, memory_or_range: Memory) -> None:
        """Report the faults of a range to this descriptor: the same as a range write with bit 0, in any state.

        If the range is marked (`madvise`) its missing pages are faults from now on; if not, once it is.

        Args:
            memory_or_range: A buffer, which is then held until it is unregistered, or a pair of address and length.

        Raises:
            KernelError: EBUSY: another descriptor has part of it, and nothing was changed. EINVAL: no such memory.
                ENOMEM: beyond all memory.
        """
        start, end, kept = extent(memory_or_range)
        with self._lock:
            self._check_open("register")
            self._check_own("register")
            MARKS.attach(start, end, self._uffd, kept)

    def unregister(self, memory_or_range: Memory) -> None:
        """Report them no longer. In marked memory a missing page is then a SIGBUS, also for those who wait there.

        Raises:
            KernelError: EBUSY: another descriptor has part of it.
        """
        start, end, _ = extent(memory_or_range)
        with self._lock:
            self._check_open("unregister")
            self._check_own("unregister")
            with self._placing:
                MARKS.detach(start, end, self._uffd)

    def place(self, address: int, data: Buffer) -> int:
        """Put pages where some are missing, by copying; wake nobody, the range write does.

        Args:
            address: Of a page in a range of this descriptor.
            data: Whole pages.

        Returns:
            Bytes placed: less than the data if a page stood in the way; ask again from there to learn why.

        Raises:
            KernelError: EEXIST: a page is there. EINVAL: not whole pages. ENOENT: not a range of this descriptor.
        """
        source, length = memory.address_of(data), memoryview(data).nbytes
        if length and self._uffd in MARKS.keepers(source, source + length):  # may have to wait: not with the lock held
            copied = ctypes.create_string_buffer(length)
            memory.memmove(ctypes.addressof(copied), source, length)
            source = ctypes.addressof(copied)
        with self._placing, MARKS.forked.share_with_parent():
            return self._place(address, source, length)

    def _place(self, address: int, source: int, length: int) -> int:
        self._check_open("place")
        if os.getpid() == self._pid and set(MARKS.keepers(address, address + max(length, 1))) != {self._uffd}:
            raise KernelError(ENOENT, "place(userfaultfd)", f"{_span(address, length)} is not this descriptor's")
        deadline = time.monotonic() + PATIENCE_S
        while True:
            done, error = self._uffd.copy(address, source, length, abi.UFFDIO_COPY_MODE_DONTWAKE)
            if done:
                return done
            if error != EAGAIN or time.monotonic() > deadline:
                raise KernelError(error, "ioctl(UFFDIO_COPY)", _span(address, length))
            time.sleep(0.001)

    # -- the end -------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close it. Threads that wait in its ranges get SIGBUS, and so does every later touch of a missing page.

        That lasts until the memory is registered anew, or no longer marked. Closing twice is fine. In a forked child
        only the child's copy is closed.
        """
        with self._lock:
            if not self._closed:
                closable = True
                if self._pid == os.getpid():
                    with self._placing:
                        closable = MARKS.release(self._uffd)
                to_the_end(lambda: self._end(closable))
            self._bells.ring()  # again, if a signal handler has ended the call that closed it
            _alive.discard(self)

    def _end(self, closable: bool) -> None:
        """Be closed: a signal handler's exception half-way would leave the kernel's descriptor open for ever."""
        self._closed = True
        if closable:
            self._uffd.close()

    def hand_on(self, why: str) -> None:
        """Leave reading and writing to somebody else, for good.

        Args:
            why: Said to whoever reads or writes here from now on (EBUSY).
        """
        with self._lock:
            self._check_open("export")
            self._given = why
            self._bells.ring()

    def _check_open(self, call: str) -> None:
        if self._closed:
            raise KernelError(EBADF, f"{call}(userfaultfd)", "it is closed")
        if self._given:
            raise KernelError(EBUSY, f"{call}(userfaultfd)", self._given)

    def _check_own(self, call: str) -> None:
        if self._pid != os.getpid():
            detail = f"only process {self._pid}, whose memory it is, registers ranges; this one was forked from it"
            raise KernelError(EPERM, f"{call}(userfaultfd)", detail)

    def _reconcile(self) -> None:
        """Forget faults whose threads wait no longer: a signal interrupted them, or somebody else has woken them."""
        if self._connection.read_faults:
            try:
                found = self._uffd.fdinfo()
            except KernelError:  # out of descriptors: what is out of date does no harm
                return
            waiting = found.total - found.pending
            if waiting < self._connection.read_faults:  # whoever waits anew, unread, waits in a fault too
                self._connection.retain(lambda fault: bool(waiting) and _waits(fault.thread))

    def begin_in_child(self) -> None:
        """After a fork: other threads are gone, and whatever they held."""
        self._lock, self._placing = RLock(), RLock()
        self._bells.end()
        self._bells = Bells()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if self._closed or sys.is_finalizing():
            return
        try:
            if self._pid == os.getpid():
                warnings.warn(f"{self!r} was never closed", ResourceWarning, source=self, stacklevel=2)
        finally:  # where warnings are errors too
            self.close()

    def __repr__(self) -> str:
        name, where = type(self).__name__, "closed" if self._closed else f"fd={self._uffd.fd}"
        return f"<{name} {where} {self.state.name}>"


def _bytes_of(data: Buffer, least: int) -> bytes:
    """Return what counts of a buffer that was written; what is too short anyway is not looked at.

    Raises:
        KernelError: EFAULT: the memory cannot be read. (A bytes object is its own proof.)
    """
    if isinstance(data, bytes | bytearray):
        return bytes(data[: RANGE.size])
    view = memoryview(data)
    if view.nbytes < least:
        return bytes(view.nbytes)
    return memory.fetch(memory.address_of(view), min(view.nbytes, RANGE.size))


def _waits(thread: int) -> bool:
    """Whether a thread waits in a fault, whosever it is: another process may have read this one's memory."""
    return waits_in_user_fault(thread, thread)


def _span(address: int, length: int) -> str:
    return f"[{address:#x}, {address + length:#x})"


_alive: weakref.WeakSet[Descriptor] = weakref.WeakSet()


def _begin_in_child() -> None:
    for descriptor in list(_alive):
        descriptor.begin_in_child()


os.register_at_fork(after_in_child=_begin_in_child)
