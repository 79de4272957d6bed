"""The application's connection to its pager: starting it, asking it, ending it.

A `Link` has the sockets, the requests that wait for an answer, and the one thread that listens.  The listening
thread is also the one that the lifeline aims at: it is parked in `recvmsg` without the GIL and touches no region.

A request may be sent twice: when a worker says hello, everything unanswered goes to it.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import select
import socket
import sys
import threading
import weakref
from collections import deque
from threading import RLock, Thread

from userfault.errors import KernelError, PagerLostError
from userfault.kernel import abi
from userfault.kernel.userfaultfd import Userfaultfd
from userfault.latch import Latch
from userfault.pager import failure, spawn, wire
from userfault.pager.lifeline import Lifeline, signal_number
from userfault.pager.wire import Message
from userfault.shield import to_the_end

TYPE_CHECKING = False
if TYPE_CHECKING:
    from userfault.pager.mapping import Mapping

FEATURES = (
    abi.UFFD_FEATURE_THREAD_ID
    | abi.UFFD_FEATURE_MISSING_SHMEM
    | abi.UFFD_FEATURE_PAGEFAULT_FLAG_WP
    | abi.UFFD_FEATURE_WP_HUGETLBFS_SHMEM
    | abi.UFFD_FEATURE_POISON
)
"""What a pager needs of the kernel: all of it since Linux 6.6."""
START_S = 60.0
"""How long a pager may take to say hello; an overloaded machine needs seconds."""
STOP_S = 10.0

forking = RLock()
"""Held while descriptors exist that a forked child must not inherit unknowingly; a fork waits for it."""
links: weakref.WeakSet[Link] = weakref.WeakSet()
"""Every link of this process, for the sake of forked children."""


class _Pending:
    """A request that waits for its answer."""

    __slots__ = ("answer", "answered", "message")

    def __init__(self, message: Message) -> None:
        self.message = message
        self.answered = Latch()
        self.answer: Message | None = None


class Link:
    """A connection to a pager, once it was started. Any thread may call it; a forked child has lost it."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.supervisor_pid = self.worker_pid = -1
        self.workers = 0
        self.lost = ""
        self._open_regions = 0
        self._ids = itertools.count(1)
        self._lock = RLock()  # a finalizer may run while this thread holds it
        self._pending: dict[int, _Pending] = {}
        self._unsent: deque[Message] = deque()
        """What `retire` could not send yet."""
        self._hello, self._ended = Latch(), Latch()
        self._over = self._listening = False
        self._farewell = ""
        """Why the pager goes, if that was asked for."""
        self._thread = Thread(target=self._listen, name="userfault", daemon=True)

    def start(self) -> None:
        """Start the pager. What is interrupted here, or fails, leaves nothing.

        Raises:
            PagerLostError: if its processes do not start.
            KernelError: if a system call failed here.
            UnsupportedError: if the kernel, or this process's rights, do not suffice.
        """
        try:
            to_the_end(self._begin)
            if not self._hello.wait(START_S) or self.lost:
                reason = self.lost or "no answer"
                raise PagerLostError(f"the pager did not start: {reason}; its own words are on standard error")
        except BaseException as error:  # Ctrl-C too
            to_the_end(self._give_up_start)
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                detail = "starting a pager takes some 12 descriptors; close some, or raise the limit (ulimit -n)"
                raise KernelError(error.errno, getattr(error, "syscall", "open"), detail) from error
            raise

    def _begin(self) -> None:
        with forking, spawn.standard_descriptors():
            self.uffd = Userfaultfd.open(FEATURES)
            self.lifeline = Lifeline()
            self._control, theirs = wire.pair()
            try:
                self._start(theirs)
            finally:
                theirs.close()
                self.lifeline.release_theirs()
            links.add(self)
        self._thread.start()

    def _give_up_start(self) -> None:
        """Leave nothing of a start that failed or was interrupted: what was not made yet is not there."""
        self._farewell = "its start was given up"
        self.lost = self.lost or self._farewell
        if hasattr(self, "_control"):
            self._stop()
        elif hasattr(self, "lifeline"):
            self.lifeline.close()
        if hasattr(self, "uffd"):
            self.uffd.close()

    def _start(self, control: socket.socket) -> None:
        supervisor, worker = wire.pair()
        application = os.pidfd_open(self.pid)
        common = {
            "pid": self.pid,
            "application": application,
            "uffd": self.uffd.fd,
            "features": FEATURES,
            "control": control.fileno(),
            "lifeline": self.lifeline.theirs.fileno(),
            "regions": [],
            "exports": [],
            "strikes": 0,
        }
        with supervisor, worker:
            try:
                spawn.start_pair(common | {"ward": supervisor.fileno()}, common | {"ward": worker.fileno()})
            finally:
                os.close(application)

    # -- requests --------------------------------------------------------------------------------------------

    def next_id(self) -> int:
        """Return a number never used before on this link."""
        return next(self._ids)

    def request(self, message: Message) -> Message:
        """Send a request and wait for its answer, however many workers it takes.

        Raises:
            StoreError: as the pager answers.
            PagerLostError: if there is no pager any more.
        """
        if sys.is_finalizing():
            raise PagerLostError("the interpreter is shutting down, and nobody listens any more")
        pending = self._send(message)
        try:
            self._wait(pending)
        except BaseException:  # Ctrl-C: nobody wants the answer any more, least of all from another worker
            self._pending.pop(message.id, None)
            raise
        answer = pending.answer
        if answer is None:
            raise PagerLostError(self.lost)
        if answer.kind == wire.FAILED:
            raise failure.decode(answer.text)
        return answer

    def _wait(self, pending: _Pending, timeout: float | None = None) -> None:
        if not self._is_listener():
            pending.answered.wait(timeout)
            return
        while not pending.answered.is_set:  # a finalizer, which the garbage collector runs in the listening thread
            self._hear_one()

    def _is_listener(self) -> bool:
        return threading.get_ident() == self._thread.ident

    def tell(self, message: Message) -> None:
        """Send a request that nobody waits for. Lost with the worker that got it."""
        with contextlib.suppress(OSError):
            wire.send(self._control, message)

    def _send(self, message: Message) -> _Pending:
        self.check()
        message.id = self.next_id()
        pending = _Pending(message)
        self._pending[message.id] = pending
        try:
            wire.send(self._control, message)
        except OSError as error:
            self._pending.pop(message.id, None)
            raise PagerLostError(self.lost or f"the pager's socket failed: {error}") from error
        if self.lost:  # while we sent
            pending.answered.set()
        return pending

    def check(self) -> None:
        """Raise PagerLostError if there is no pager, or none of this process's."""
        if self.pid != os.getpid():
            raise PagerLostError(
                f"this pager belongs to process {self.pid}, from which this one was forked; open your own"
            )
        if self.lost:
            raise PagerLostError(self.lost)

    # -- regions ---------------------------------------------------------------------------------------------

    def opened(self) -> None:
        """A region is about to open: from now on the pager's death is the application's."""
        with self._lock:
            signal_number()  # somebody may have put another handler in its place since
            if not self._open_regions and not self.lifeline.arm():
                self.lost = self.lost or "the pager was killed"
                raise PagerLostError(self.lost)
            self._open_regions += 1

    def closed(self) -> None:
        """A region has ended."""
        with self._lock:
            self._open_regions -= 1
            if not self._open_regions:
                self.lifeline.disarm()

    @property
    def open_regions(self) -> int:
        """How many regions are open."""
        return self._open_regions

    def retire(self, mapping: Mapping) -> None:
        """End a region that nobody holds any more. Called by finalizers, in any thread: does not wait."""
        message = Message(wire.CLOSE, self.next_id(), mapping.identity)
        self._pending[message.id] = _Retired(message, mapping)
        self._unsent.append(message)
        self._send_retired()

    def _send_retired(self) -> None:
        """Send what the socket takes; the rest goes out as answers come in."""
        while not self.lost:
            try:
                message = self._unsent.popleft()
            except IndexError:  # sent, by another thread perhaps
                return
            try:
                wire.send(self._control, message, socket.MSG_DONTWAIT)
            except BlockingIOError:
                self._unsent.appendleft(message)
                return
            except OSError:
                break
        if self.lost:
            self._settle_all()

    # -- the listening thread --------------------------------------------------------------------------------

    def _listen(self) -> None:
        with self._lock:
            if self._farewell:  # the start was given up while this thread began
                return
            self._listening = True
        try:
            self.lifeline.receive_here()
            while not self._over:
                self._hear_one()
            self.lifeline.wait()
        finally:
            self._ended.set()

    def _hear_one(self) -> None:
        """Receive one message and act on it."""
        try:
            message = wire.receive(self._control)
            if message is not None:
                self._hear(message)
                return
            reason = "the pager is gone"
        except (OSError, ValueError) as error:
            reason = f"the pager's socket failed: {error}"
        except Exception:  # noqa: BLE001  # this thread must stay: the lifeline is aimed at it
            sys.excepthook(*sys.exc_info())
            return
        self._over = True
        self._end(reason)

    def _hear(self, message: Message) -> None:
        if message.kind == wire.HELLO:
            self._greet(message)
        elif message.kind == wire.LOST:
            self._end(message.text.decode())
        elif pending := self._pending.pop(message.id, None):
            pending.answer = message
            if isinstance(pending, _Retired):
                pending.finish()
            pending.answered.set()
            self._send_retired()

    def _greet(self, message: Message) -> None:
        """A worker says hello: a new one gets everything that the old one may have taken along."""
        again = list(self._pending.values()) if self._hello.is_set else []
        self.workers += message.a != self.worker_pid
        self.worker_pid, self.supervisor_pid = message.a, message.b
        for pending in again:
            with contextlib.suppress(OSError):
                wire.send(self._control, pending.message)
        self._hello.set()

    def _end(self, reason: str) -> None:
        self.lost = self.lost or self._farewell or reason
        self._hello.set()
        self._settle_all()

    def _settle_all(self) -> None:
        """Nobody answers any more."""
        self._unsent.clear()
        for pending in list(self._pending.values()):
            if isinstance(pending, _Retired):
                pending.finish()
            pending.answered.set()
        self._pending.clear()

    # -- the end ---------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """End the pager in good order, and wait until both its processes are gone."""
        if self.pid != os.getpid():
            return
        self._stop()
        if self._listening and not self._is_listener():
            self._thread.join(STOP_S)

    def _stop(self) -> None:
        with self._lock:
            self._farewell = self._farewell or "the pager was closed"
        self.lifeline.disarm()
        watched = [fd for fd in map(_pidfd, (self.worker_pid, self.supervisor_pid)) if fd >= 0]
        if not self.lost:
            with contextlib.suppress(PagerLostError):
                self._wait(self._send(Message(wire.BYE)), STOP_S)
        self.lost = self.lost or self._farewell
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)
        _wait_all(watched)
        if self._listening and not self._is_listener():
            self._ended.wait(STOP_S)  # it uses descriptors to its end
        self.close_descriptors()

    def drop(self) -> None:
        """End the pager without waiting; for a finalizer, which may run in any thread, the listening one too."""
        if self.pid == os.getpid() and self in links:
            self.lifeline.disarm()
            self.tell(Message(wire.BYE))
            self.lost = self.lost or "the pager was dropped"
            with contextlib.suppress(OSError):
                self._control.shutdown(socket.SHUT_WR)

    def close_descriptors(self) -> None:
        """Close what this process holds."""
        self._control.close()
        self.lifeline.close()
        self.uffd.close()


class _Retired(_Pending):
    """The CLOSE of a region that nobody holds; keeps its memory until the pager has answered."""

    __slots__ = ("mapping",)

    def __init__(self, message: Message, mapping: Mapping) -> None:
        super().__init__(message)
        self.mapping: Mapping | None = mapping

    def finish(self) -> None:
        mapping, self.mapping = self.mapping, None
        if mapping is not None:
            mapping.finish()
            mapping.link.closed()


def _pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid) if pid > 0 else -1
    except OSError:
        return -1


def _wait_all(pidfds: list[int]) -> None:
    for fd in pidfds:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.poll(STOP_S * 1000)
        os.close(fd)
