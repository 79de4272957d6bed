"""The lifeline: when the whole pager is dead, the application must not wait for ever.

Some facts
----------
* A thread that sleeps in a user fault while nobody is left to answer sleeps for ever, with the GIL in its hand.  No
  Python code of the application runs then, so nothing that Python could do would end it.
* A socket with `O_ASYNC` makes the kernel send a signal when its other end closes, `F_SETSIG` says which, and
  `F_SETOWN_EX` with `F_OWNER_TID` to which thread (fcntl(2), Linux 2.6.32).  A signal to the process as a whole may be
  given to the thread that cannot take it: one that faults inside a system call.
* The kernel sends no such signal while a thread waits in `recv` on that very socket (`SOCKWQ_ASYNC_WAITDATA`,
  net/socket.c): it takes that thread to be told.  But it may need the GIL to go on.  `poll` is not meant by that.
* `abort(3)` is async-signal-safe.  It unblocks SIGABRT and raises it; if that returns, because it is ignored or a
  handler came back, it puts the default action in place and raises it again.

What follows
------------
The other end of the lifeline is held by the supervisor and the worker and nobody else.  When both are dead the kernel
signals a thread of ours that touches no region and is parked in a system call.  The signal is a real-time one that
nobody uses, and its handler is libc's own `abort`, no C of ours.  So the process ends by SIGABRT within milliseconds,
whether SIGABRT is at that time ignored, blocked, handled in Python or handled by `faulthandler`, which prints where
every thread is: also the touching line.

The signal is the highest real-time signal without a handler, `SIGRTMAX - 1` as a rule.  Whoever takes it away while a
region is open takes this protection away.

A pager that is closed in good order disarms its lifeline first.  An exit of the application needs no disarming, since
the pager outlives it; an exec closes our end; a forked child does not own the signal.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import signal
import socket
import struct
import threading
import time

from userfault.errors import KernelError, UnsupportedError
from userfault.kernel import process
from userfault.kernel.syscalls import naming

F_SETOWN_EX = 15  # <fcntl.h> with _GNU_SOURCE; Linux 2.6.32
F_OWNER_TID = 0
F_SETSIG = 10
PAUSE_S = 0.1
_OWNER = struct.Struct("=ii")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.signal.restype = ctypes.c_void_p
_libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
_SIG_ERR = ctypes.c_void_p(-1).value
_chosen = 0


def signal_number() -> int:
    """Return the real-time signal whose handler is `abort`; the first call chooses it, each installs the handler.

    Raises:
        UnsupportedError: if every real-time signal has a handler already.
    """
    global _chosen  # noqa: PLW0603  # a signal handler is the process's, and so is this
    _chosen = _chosen or _free_signal()
    if _libc.signal(_chosen, ctypes.cast(_libc.abort, ctypes.c_void_p)) == _SIG_ERR:
        raise UnsupportedError("a real-time signal", "run outside the sandbox that forbids rt_sigaction(2)")
    return _chosen


def _free_signal() -> int:
    status = process.status()
    used = int(status["SigCgt"], 16) | int(status["SigIgn"], 16)
    for number in range(signal.SIGRTMAX - 1, signal.SIGRTMIN, -1):
        if not used >> (number - 1) & 1:
            return int(number)
    raise UnsupportedError("a free real-time signal", "leave one without a handler: the pager's lifeline needs it")


class Lifeline:
    """One end of a socket whose other end only the pager holds.

    The thread that is to take the signal calls `receive_here` once, and must never touch a region; everything else may
    be called by any thread. After a fork the child calls `close`.
    """

    def __init__(self) -> None:
        signal_number()
        with naming("socketpair"):
            self._ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.armed = False
        """Whether the death of the pager ends this process."""

    def receive_here(self) -> None:
        """Make the calling thread the one that takes the signal.

        Raises:
            KernelError: in a sandbox.
        """
        with naming("rt_sigprocmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {_chosen, signal.SIGABRT})
        fd = self._ours.fileno()
        with naming("fcntl(F_SETOWN_EX)"):
            fcntl.fcntl(fd, F_SETOWN_EX, _OWNER.pack(F_OWNER_TID, threading.get_native_id()))
        with naming("fcntl(F_SETSIG)"):
            fcntl.fcntl(fd, F_SETSIG, _chosen)

    def intact(self) -> bool:
        """Whether somebody of the pager lives.

        Raises:
            KernelError: ENOMEM.
        """
        poll = select.poll()
        poll.register(self._ours.fileno(), select.POLLIN)
        with naming("poll", "whether the pager lives"):
            return not poll.poll(0)

    def arm(self) -> bool:
        """From now on the death of the pager ends this process; False if it is dead already, and then nothing is.

        Raises:
            KernelError: ENOMEM; then it is not armed.
        """
        alive = False
        self._set_async(os.O_ASYNC)
        try:
            alive = self.armed = self.intact()  # not before it is known: the thread in wait() may be looking at it
        finally:
            if not alive:
                self.disarm()
        return alive

    def _set_async(self, flag: int) -> None:
        fd = self._ours.fileno()
        with naming("fcntl(F_SETFL)", "the lifeline of the pager"):
            flags = fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_ASYNC
            fcntl.fcntl(fd, fcntl.F_SETFL, flags | flag)

    def wait(self) -> None:
        """Stay until nobody of the pager lives; then, if armed, end the process (the signal should have).

        The listening thread must not end before: the signal is aimed at it, and would reach nobody.
        """
        fd = self._ours.fileno()
        poll = select.poll()  # and not recv: who waits in there is not sent the signal
        if fd >= 0:
            poll.register(fd, select.POLLIN)
        over = fd < 0
        while not over:
            try:
                over = bool(poll.poll())
            except OSError:
                time.sleep(PAUSE_S)  # without memory one cannot even wait
        if self.armed:
            os.abort()

    def release_theirs(self) -> None:
        """Close the pager's end here, once the pager has its own."""
        self.theirs.close()

    def disarm(self) -> None:
        """Let the pager go without a signal."""
        self.armed = False
        if self._ours.fileno() >= 0:
            try:
                self._set_async(0)
            except KernelError:  # what was allowed once is allowed again: the pager must be able to go
                self._set_async(0)

    def close(self) -> None:
        """Close this process's end, without a signal."""
        self._ours.close()
        self.theirs.close()
