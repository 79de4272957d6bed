"""The application's connection to its pager: starting it, asking it, ending it.

A `Link` has the sockets, the requests that wait for an answer (`calls`), and the one thread that listens.  That thread
is also the one that the lifeline aims at: it is parked in `recvmsg` without the GIL and touches no region.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import sys
import threading
import time
import weakref
from _thread import start_new_thread
from io import FileIO
from threading import RLock, Thread

from userfault.errors import KernelError, PagerLostError
from userfault.kernel import abi
from userfault.kernel.userfaultfd import Userfaultfd
from userfault.latch import Latch
from userfault.pager import failure, logs, pulse, spawn, wire
from userfault.pager.calls import Call, Calls
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
PASSING = (errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN, errno.EINTR)

forking = RLock()
"""Held while descriptors exist that a forked child must not inherit unknowingly; a fork waits for it."""
_LEVELS = {
    wire.BLOCK_FAILED: logs.ERROR,
    wire.READ_FAILED: logs.WARNING,
    wire.WRITE_FAILED: logs.ERROR,
    wire.BUDGET_FULL: logs.WARNING,
}
links: weakref.WeakSet[Link] = weakref.WeakSet()
"""Every link of this process, for the sake of forked children."""


class Link:
    """A connection to a pager, once it was started. Any thread may call it; a forked child has lost it."""

    def __init__(self, budget: int | None = None, *, automatic: bool = True) -> None:
        self.budget = budget
        """The most bytes that its regions may have in memory together; None: no limit."""
        self.automatic = automatic
        """Whether nobody has asked for just this budget; then it is for regions of whose own the same is true."""
        self.memories: weakref.WeakValueDictionary[int, Mapping] = weakref.WeakValueDictionary()
        """By number, the memory of its regions."""
        self.pid = os.getpid()
        self.supervisor_pid = self.worker_pid = -1
        self.workers = 0
        self.lost = ""
        self._open_regions = 0
        self._lock = RLock()  # a finalizer may run while this thread holds it
        self._hello, self._ended = Latch(), Latch()
        self._over = self._listening = False
        self._farewell = ""
        """Why the pager goes, if that was asked for."""
        self._thread = Thread(target=self._listen, name="userfault", daemon=True)

    def shared_by(self, *, automatic: bool) -> int | None:
        """Return the budget that a region shares with others; None if it does not."""
        return self.budget if automatic or not self.automatic else None

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
            if isinstance(error, OSError) and not isinstance(error, KernelError):
                raise KernelError(error.errno or 0, "starting the pager", str(error)) from error
            if isinstance(error, RuntimeError):
                detail = "the pager needs one thread in this process; see `ulimit -u`, -v and -d"
                raise KernelError(errno.EAGAIN, "clone", detail) from error
            raise

    def _begin(self) -> None:
        with forking, spawn.standard_descriptors():
            self.uffd = Userfaultfd.open(FEATURES)
            self.lifeline = Lifeline()
            self._control, theirs = wire.pair()
            self.calls = Calls(self._control)
            try:
                self._start(theirs)
            finally:
                theirs.close()
                self.lifeline.release_theirs()
            links.add(self)
        start_new_thread(self._start_listening, ())

    def _start_listening(self) -> None:
        """Start the listening thread. In a thread: CPython's `start` waits for ever if there is no memory to begin."""
        try:
            self._thread.start()
        except RuntimeError as error:  # no more threads to be had
            self._end(str(error))

    def _give_up_start(self) -> None:
        """Leave nothing of a start that failed or was interrupted: what was not made yet is not there."""
        self._farewell = "its start was given up"
        self.lost = self.lost or self._farewell
        if hasattr(self, "calls"):
            self._stop()
        elif hasattr(self, "lifeline"):
            self.lifeline.close()
        if hasattr(self, "uffd"):
            self.uffd.close()

    def _start(self, control: socket.socket) -> None:
        with contextlib.ExitStack() as stack:
            supervisor, worker = map(stack.enter_context, wire.pair())
            application = os.pidfd_open(self.pid)
            stack.callback(os.close, application)
            beats = pulse.create()
            stack.callback(os.close, beats)
            common = {
                "pid": self.pid,
                "application": application,
                "uffd": self.uffd.fd,
                "features": FEATURES,
                "control": control.fileno(),
                "lifeline": self.lifeline.theirs.fileno(),
                "pulse": beats,
                "regions": [],
                "exports": [],
                "strikes": 0,
            }
            spawn.start_pair(common | {"ward": supervisor.fileno()}, common | {"ward": worker.fileno()})

    # -- requests --------------------------------------------------------------------------------------------

    def request(self, message: Message) -> Message:
        """Send a request and wait for its answer, however many workers it takes.

        Raises:
            StoreError: as the pager answers.
            PagerLostError: if there is no pager any more.
        """
        if sys.is_finalizing():
            raise PagerLostError("the interpreter is shutting down, and nobody listens any more")
        self.check()
        call = self.calls.begin(message)
        try:
            self._wait(call)
        except BaseException:  # Ctrl-C
            self.calls.forget(call)
            raise
        if call.answer is None:
            raise PagerLostError(self.lost)
        if call.answer.kind == wire.FAILED:
            raise failure.decode(call.answer.text)
        return call.answer

    def _wait(self, call: Call, timeout: float | None = None) -> None:
        if not self._is_listener():
            call.answered.wait(timeout)
            return
        while not call.answered.is_set:  # a finalizer, which the garbage collector runs in the listening thread
            self._hear_one()

    def await_retired(self) -> None:
        """Wait until the regions that nobody holds any more have ended."""
        for call in self.calls.retiring():
            self._wait(call)

    def _is_listener(self) -> bool:
        return threading.get_ident() == self._thread.ident

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

    # -- the listening thread --------------------------------------------------------------------------------

    def _listen(self) -> None:
        with self._lock:
            if self._farewell:  # the start was given up while this thread began
                return
            self._listening = True
        try:
            self._receive_lifeline()
            while not self._over:
                self._hear_one()
            self.lifeline.wait()
        finally:
            self._ended.set()

    def _receive_lifeline(self) -> None:
        try:
            self.lifeline.receive_here()
        except OSError as error:
            self._end(f"the lifeline could not be aimed: {error}")

    def _hear_one(self) -> None:
        """Receive one message and act on it."""
        try:
            message = wire.receive(self._control)
            if message is not None:
                self._hear(message)
                return
            reason = "the pager is gone"
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in PASSING:  # no memory for a message: it stays where it is
                time.sleep(0.01)
                return
            reason = f"the pager's socket failed: {error}"
        except Exception:  # noqa: BLE001  # this thread must stay: the lifeline is aimed at it
            sys.excepthook(*sys.exc_info())
            return
        self._over = True
        self._end(reason)

    def _hear(self, message: Message) -> None:
        if message.kind == wire.HELLO:
            self._greet(message)
        elif message.kind in _LEVELS:
            logs.put(_LEVELS[message.kind], "region", failure.decode(message.text))
        elif message.kind == wire.UNMAP:
            self._unmap(message.region)
        elif message.kind == wire.LOST:
            self._end(message.text.decode())
        else:
            self.calls.hear(message)

    def _unmap(self, region: int) -> None:
        memory = self.memories.get(region)
        if memory is not None and memory.unmap_pages():
            self.calls.tell(Message(wire.UNMAPPED, region=region))

    def _greet(self, message: Message) -> None:
        """A worker says hello."""
        self.workers += message.a != self.worker_pid
        _log_change("worker", self.worker_pid, message.a)
        _log_change("supervisor", self.supervisor_pid, message.b)
        self.worker_pid, self.supervisor_pid = message.a, message.b
        if self._hello.is_set:
            self.calls.repeat()
        self._hello.set()

    def _end(self, reason: str) -> None:
        if not (self.lost or self._farewell or self.lifeline.armed):  # this process ends at this moment if it is armed
            logs.put(logs.ERROR, "pager", reason)
        self.lost = self.lost or self._farewell or reason
        self._hello.set()
        self.calls.end()

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
        watched: list[FileIO] = to_the_end(lambda: _watch(self.worker_pid, self.supervisor_pid))
        if not self.lost:
            with contextlib.suppress(PagerLostError):
                self._wait(self.calls.begin(Message(wire.BYE)), STOP_S)
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
            self.calls.tell(Message(wire.BYE))
            self.lost = self.lost or "the pager was dropped"
            with contextlib.suppress(OSError):
                self._control.shutdown(socket.SHUT_RDWR)  # what was sent is read all the same

    def close_descriptors(self) -> None:
        """Close what this process holds."""
        self._control.close()
        self.lifeline.close()
        self.uffd.close()


def _log_change(role: str, before: int, now: int) -> None:
    if before not in (-1, now):
        logs.put(logs.WARNING, "pager", f"{role} {before} has ended, and {now} has taken its place")


def _watch(*pids: int) -> list[FileIO]:
    """Return pidfds of those that are alive, as objects: whatever a signal handler raises, they are closed."""
    watched = []
    for pid in pids:
        with contextlib.suppress(OSError):
            watched.append(FileIO(os.pidfd_open(pid)))
    return watched


def _wait_all(watched: list[FileIO]) -> None:
    deadline = time.monotonic() + STOP_S
    for pidfd in watched:
        with pidfd:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            while not _poll(poll) and time.monotonic() < deadline:
                pass


def _poll(poll: select.poll) -> bool:
    try:
        return bool(poll.poll(STOP_S * 1000))
    except OSError as error:  # no memory, for the moment
        if error.errno not in PASSING:
            raise
        time.sleep(0.01)
        return False
