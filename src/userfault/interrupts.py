"""A second Ctrl-C that ends the program although a thread of it is stopped at a page.

Some facts
----------
* CPython's handler of SIGINT, in C, sets a flag and no more.  What raises KeyboardInterrupt runs in the main thread,
  between two steps of Python: not while that thread is stopped at a page, nor while another one is with the GIL.
* A handler that was installed with SA_RESETHAND (sigaction(2)) is good for one signal; the next one has its default
  action, and SIGINT's is to end the process, whatever that is doing.  `sysv_signal(3)` installs one.
* A thread that is stopped inside a system call takes no signal but a deadly one, and to the kernel SIGQUIT is none, as
  it dumps core.  The first SIGINT stays pending, and a second one like it is dropped (signal(7): they do not queue).
* But another thread may take what is pending for the process (sigtimedwait(2)) and pass it to the main thread alone
  (pthread_kill(3)): for that thread nothing changes, and a second SIGINT has a place beside it, where it is seen.  In a
  system call Python does not hold the GIL, so a thread of ours can do this.

What follows
------------
`interruptible` does both.  It changes what the whole process does on SIGINT, so it is never done unasked.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading

from userfault.errors import UnsupportedError
from userfault.kernel import process

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType
    from typing import Any

LOOK_S = 0.1
"""Between two looks at what is pending."""
_BIT = 1 << (signal.SIGINT - 1)

_libc = ctypes.CDLL(None, use_errno=True)


def _install(name: str, handler: int | None) -> int | None:
    """Install a handler of SIGINT, in C, as `signal` or `sysv_signal` does; return the one before."""
    function = getattr(_libc, name, None)
    if function is None:  # musl
        raise UnsupportedError(f"{name}(3)", "Ctrl-\\ ends a program that waits, with any C library")
    function.restype = ctypes.c_void_p
    function.argtypes = [ctypes.c_int, ctypes.c_void_p]
    before: int | None = function(signal.SIGINT, handler)
    return before


class _Once:
    """Stands before the handler of SIGINT, and makes CPython's handler beneath it one that is good for one signal."""

    def __init__(self, handler: Callable[[int, FrameType | None], Any]) -> None:
        self.handler = handler
        signal.signal(signal.SIGINT, self)
        self._beneath = _install("sysv_signal", signal.SIG_IGN)
        self.arm()

    def arm(self) -> None:
        """The next signal is handled, and the one after it ends the process."""
        _install("sysv_signal", self._beneath)

    def __call__(self, number: int, frame: FrameType | None) -> Any:
        """Python has come round to the first: the count begins anew."""
        self.arm()
        return self.handler(number, frame)


def look() -> None:
    """See to a SIGINT that the main thread cannot take; end the process if there are two. Called by another thread."""
    status = process.status(f"self/task/{os.getpid()}")
    pending, own, blocked, caught = (int(status[name], 16) & _BIT for name in ("ShdPnd", "SigPnd", "SigBlk", "SigCgt"))
    if blocked:  # on purpose, and somebody else may be waiting for it
        return
    if own and (pending or not caught):  # the second is pending, or some other thread has taken it
        _end()
    elif pending and signal.sigtimedwait({signal.SIGINT}, 0) is not None:  # it may be gone this very moment
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def _end() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    _install("signal", signal.SIG_DFL)
    signal.pthread_kill(threading.get_ident(), signal.SIGINT)


def _watch(over: threading.Event) -> None:
    while not over.wait(LOOK_S):
        with contextlib.suppress(OSError):  # no descriptor to be had for /proc, say: the next look may do
            look()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside the `with` block, or the decorated function, a second Ctrl-C ends the program at once.

    The first one is handled as ever: KeyboardInterrupt is raised as soon as the page is there that the program waits
    for.  If it does not come, a second one ends the program by SIGINT, as one without Python would end: no `finally`,
    no `atexit`.  So does a second one during any other call that keeps Python from handling the first.

    It changes the handler of SIGINT for the whole process, and starts a thread.  Where SIGINT is ignored, or has no
    handler of Python, it does nothing.  For the main thread.  A forked child keeps it but for the thread.

    Raises:
        ValueError: if this is not the main thread.
        UnsupportedError: if the C library lacks `sysv_signal`.

    Example:
        >>> import userfault
        >>> with userfault.interruptible():
        ...     pass  # the program
    """
    if threading.current_thread() is not threading.main_thread():
        raise ValueError("interruptible() is for the main thread: Python handles signals in no other")
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or isinstance(handler, _Once):
        yield
        return
    once, over = _Once(handler), threading.Event()
    watcher = threading.Thread(target=_watch, args=(over,), name="userfault-interrupts", daemon=True)
    try:
        watcher.start()
        yield
    finally:
        over.set()
        if signal.getsignal(signal.SIGINT) is once:
            signal.signal(signal.SIGINT, handler)
        watcher.join()
