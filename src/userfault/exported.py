"""The descriptor of 2014 as users have it: `userfaultfd()`, and `export` for pagers in another process or language.

`Descriptor` (in `protocol`) speaks the protocol; what is added here needs the pager: the worker that stands behind an
exported descriptor (`pager.outlet` says how a socket can be one).
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import warnings
import weakref
from errno import EINVAL, EIO, EMFILE, ENFILE, EPIPE
from itertools import pairwise
from threading import RLock
from typing import TYPE_CHECKING

from userfault.errors import Error, KernelError, StoreError
from userfault.kernel.maps import read_maps
from userfault.pager import wire
from userfault.pager.client import Pager, default_pager
from userfault.pager.outlet import SEND_BUFFER
from userfault.pager.record import W_ANSWERED, W_PENDING, W_REFUSED, W_STATE, W_TOTAL, Record
from userfault.pager.wire import Message
from userfault.protocol.connection import fdinfo_text
from userfault.protocol.constants import USERFAULTFD_PROTOCOL
from userfault.protocol.descriptor import Descriptor
from userfault.protocol.marks import MARKS
from userfault.protocol.states import State

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from userfault.kernel.maps import MapEntry

_CALL = "export(userfaultfd)"
_MARKED = "mark it first: userfault.madvise(memory, userfault.protocol.MADV_USERFAULT)"
_MEMFD = "it takes one shared mapping of a memory file (memfd, tmpfs), mapped readable and writable"
_TOO_MANY = "it takes some 6 descriptors here, and as many in the pager; close some, or raise the limit (ulimit -n)"
_REMEDY = "pass the descriptor that was mapped: export(memory_fd=...)"


class UserfaultFD(Descriptor):
    """The userfault descriptor of 2014. Made by `userfaultfd`.

    **A pager in the interpreter that it serves is a trap**: a thread that touches memory from Python usually holds the
    GIL while it is stopped, so that no other thread of the interpreter can answer. Touch with the GIL released, or be
    the pager in a forked child, or `export` the range and be the pager in any program. See `protocol.descriptor`.
    """

    _export: weakref.ref[Exported] | None = None

    def export(self, memory_fd: int | None = None, *, pager: Pager | None = None) -> Exported:
        """Turn it into a plain file descriptor on which any program is the pager, with read, write and poll alone.

        From then on this object only knows `fdinfo` and `close`.

        Args:
            memory_fd: The descriptor of the memory, which was mapped. None: it is looked for among this process's.
            pager: Whose worker stands behind it; None: the default one.

        Raises:
            KernelError: EINVAL: not just one range is registered, it is not marked, or is not a shared mapping of a
                memfd. EBADF: closed. EBUSY: exported before. EMFILE: this process or the pager has no descriptors left.
            UnsupportedError, PagerLostError: As `Pager`.
        """
        with self._lock:  # for one thread only; the others are told EBUSY afterwards
            try:
                exported = self._exported(memory_fd, pager)
            except OSError as error:
                if isinstance(error, KernelError):
                    raise
                detail = _TOO_MANY if error.errno in (EMFILE, ENFILE) else ""
                raise KernelError(error.errno or 0, _CALL, detail) from error
            self._export = weakref.ref(exported)
        return exported

    def _exported(self, memory_fd: int | None, pager: Pager | None) -> Exported:
        start, end, entry = self._exportable()
        memory = _open_memory(memory_fd, entry)
        try:
            offset = entry.offset + start - entry.start
            return Exported(self, pager or default_pager(), (start, end), memory, offset)
        except BaseException:
            os.close(memory)
            raise

    def _exportable(self) -> tuple[int, int, MapEntry]:
        """Return the one range that can be exported, and its mapping."""
        self._check_open("export")
        pieces = sorted(MARKS.of(self.kernel), key=lambda piece: piece[0])
        if not pieces or any(one[1] != other[0] for one, other in pairwise(pieces)):
            raise KernelError(EINVAL, _CALL, f"{len(pieces)} separate ranges are registered with it, and it takes one")
        start, end = pieces[0][0], pieces[-1][1]
        where = f"[{start:#x}, {end:#x})"
        if not all(holding.marked for _, _, holding in pieces):
            raise KernelError(EINVAL, _CALL, f"{where} is not marked; {_MARKED}")
        for entry in read_maps():
            if entry.start <= start and end <= entry.end and entry.inode and entry.permissions.endswith("s"):
                return start, end, entry
        raise KernelError(EINVAL, _CALL, f"{where}: {_MEMFD}")

    def close(self) -> None:
        """Close it, and the exported descriptor. See `Descriptor.close`."""
        with self._lock:  # an export may be under way
            exported = self._export() if self._export else None
        if exported is not None and not exported.closed:
            exported.close()
        else:
            super().close()


def userfaultfd(flags: int = 0) -> UserfaultFD:
    """Make a userfault descriptor, as the system call that was proposed in 2014 would have.

    Any number of them in a process; each has the ranges that are registered with it.

    Args:
        flags: `protocol.UFFD_CLOEXEC`, `protocol.UFFD_NONBLOCK`.

    Raises:
        KernelError: EINVAL: another flag. EMFILE, ENOMEM.
        UnsupportedError: No userfaultfd for this process, or too old a kernel; with the remedy.
    """
    return UserfaultFD(flags)


class Exported:
    """A plain file descriptor on which any program, in any language, is the pager. Made by `UserfaultFD.export`.

    Hand on `fileno()` and `memory_fd` (`subprocess` with `pass_fds`, `socket.send_fds`, a fork), and tell the program
    `address` and `size`. It writes the protocol version and reads it back; then it reads the address of a fault, writes
    the page into the memory file, at the address less `address` plus `offset`, and writes the range. One program at a
    time; when it has died, `renew` and hand the same descriptor to another.

    While it is open the pager's death is this process's (SIGABRT), as for regions; the program's death is not.
    Any thread. A forked child may be the program; `close` there closes only the child's copies.

    Attributes:
        memory_fd: The memory, open for reading and writing. Close-on-exec, as `fileno()`.
        address: Where the memory begins, as the faults' addresses count.
        size: Bytes.
        offset: Where the memory begins in the file.
    """

    def __init__(self, owner: UserfaultFD, pager: Pager, span: tuple[int, int], memory_fd: int, offset: int) -> None:
        self.closed = True  # until it is open
        self._owner = owner
        self._pager = pager
        self._link = pager.link
        self._lock = RLock()  # a finalizer may run while this thread holds it
        self._pid = os.getpid()
        self.memory_fd = memory_fd
        self.address, self.size, self.offset = span[0], span[1] - span[0], offset
        self._link.check()
        self._id = self._link.calls.next_id()
        self._link.opened()
        try:
            self._begin()
        except BaseException:
            self._link.closed()
            raise
        self.closed = False

    def _begin(self) -> None:
        record, self._record = Record.create(self._id, self.address, self.size, self.offset)
        try:
            theirs, self._socket = wire.pair()
            with theirs:
                try:
                    self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
                    fds = (record, self._owner.kernel.fd, theirs.fileno(), self._socket.fileno(), self.memory_fd)
                    self._have_it_served(fds)
                except BaseException:
                    self._socket.close()
                    raise
        finally:
            os.close(record)

    def _have_it_served(self, fds: tuple[int, ...]) -> None:
        """Pass it to the worker, and take it from its owner; if either fails, nothing is changed."""
        kernel = self._owner.kernel
        blocking = os.get_blocking(kernel.fd)
        try:
            self._link.request(Message(wire.EXPORT, region=self._id, fds=fds))
            MARKS.make_minor(self.address, self.address + self.size, kernel)
            self._owner.hand_on("it was exported: read and write its exported descriptor")
        except BaseException as error:
            with contextlib.suppress(Error):
                self._link.request(Message(wire.CLOSE, region=self._id))
            os.set_blocking(kernel.fd, blocking)
            kernel.wake(self.address, self.size)  # whoever the worker has heard of asks again
            if isinstance(error, StoreError):
                few = f"[Errno {EMFILE}]" in error.cause
                detail = _TOO_MANY if few else "the pager could not take it"
                raise KernelError(EMFILE if few else EIO, _CALL, f"{detail} ({error.cause})") from error
            raise

    @property
    def pager(self) -> Pager:
        """The pager whose worker stands behind it."""
        return self._pager

    @property
    def state(self) -> State:
        """Where the conversation stands."""
        return State(self._record.words[W_STATE])

    def fileno(self) -> int:
        """Return the descriptor: read(2), write(2), poll(2), select(2) and epoll(7) work on it.

        Raises:
            ValueError: It is closed.
        """
        if self.closed:
            raise ValueError("the exported descriptor is closed")
        return self._socket.fileno()

    def fdinfo(self) -> str:
        """Return the lines of `UserfaultFD.fdinfo`, and what a socket cannot say to the program by an errno.

        After `pending`, `total` and `protocols` come the `state`, how many faults were `answered`, how many writes were
        `refused`, and, if any were, what was wrong with the last one.
        """
        words = self._record.words
        text = fdinfo_text(words[W_PENDING], words[W_TOTAL], (USERFAULTFD_PROTOCOL,))
        text += f"state:\t{self.state.name}\nanswered:\t{words[W_ANSWERED]}\nrefused:\t{words[W_REFUSED]}\n"
        return text + (f"refusal:\t{self._record.refusal()}\n" if words[W_REFUSED] else "")

    def renew(self) -> None:
        """Begin the conversation anew, for another program on the same descriptor.

        What lies unread on the descriptor is taken back; the program begins with the handshake, and is told of every
        fault that has not been resolved, also of those that its predecessor had read.

        Raises:
            ValueError: It is closed.
            KernelError: EPIPE: a program has shut the descriptor down (shutdown(2)), and nothing undoes that.
            PagerLostError: There is no pager any more.
        """
        self.fileno()
        try:
            self._link.request(Message(wire.RENEW, region=self._id))
        except StoreError as error:
            raise KernelError(EPIPE, "renew(userfaultfd)", error.cause) from error

    def close(self) -> None:
        """End it, and the `UserfaultFD` it was made of: the program reads the end of the file.

        A page that is missing, and one that the program has not announced, is a SIGBUS from then on, also for threads
        that wait. Closing twice is fine.
        """
        if self._pid != os.getpid():  # whoever held the lock at the fork is not here
            if not self.closed:
                self.closed = True
                self._end()
            return
        with self._lock:
            if self.closed:
                return
            try:
                with contextlib.suppress(Error):  # lost or closed: then nobody serves it any more
                    self._link.request(Message(wire.CLOSE, region=self._id))
            finally:  # whatever a signal handler raised
                self.closed = True
                self._link.closed()
                self._end()

    def _end(self) -> None:
        try:
            self._owner.close()
        finally:
            self._socket.close()
            os.close(self.memory_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if self.closed or sys.is_finalizing():
            return
        text = repr(self)
        self.closed = True
        ours = self._pid == os.getpid()
        if ours:
            self._link.calls.tell(Message(wire.CLOSE, region=self._id))  # does not wait: any thread may run this
            self._link.closed()
        self._end()
        if ours:  # last: a warning may be an exception
            warnings.warn(f"{text} was never closed", ResourceWarning, source=self, stacklevel=2)

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"fd={self._socket.fileno()} {self.state.name}"
        return f"<userfault.Exported {state} [{self.address:#x}, {self.address + self.size:#x})>"


def _open_memory(memory_fd: int | None, entry: MapEntry) -> int:
    """Open the file behind a mapping anew, for reading and writing.

    Raises:
        KernelError: EINVAL: that descriptor is another file; or no descriptor of this process is that file.
    """
    wanted = (entry.device, entry.inode)
    candidates = map(int, os.listdir("/proc/self/fd")) if memory_fd is None else (memory_fd,)
    for fd in candidates:
        try:
            found = os.fstat(fd)
            if (found.st_dev, found.st_ino) == wanted:
                return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (EMFILE, ENFILE):
                raise
    if memory_fd is not None:
        raise KernelError(EINVAL, _CALL, f"descriptor {memory_fd} is not the file that is mapped; {_REMEDY}")
    with contextlib.suppress(OSError):  # takes CAP_CHECKPOINT_RESTORE
        return os.open(f"/proc/self/map_files/{entry.start:x}-{entry.end:x}", os.O_RDWR | os.O_CLOEXEC)
    raise KernelError(EINVAL, _CALL, f"no descriptor of this process is the file that is mapped; {_REMEDY}")
