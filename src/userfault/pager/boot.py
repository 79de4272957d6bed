"""The first things a process of the pager does, whichever role it has.

When memory ends in one of its threads the process ends too, and its successor begins with fresh memory.  A thread that
merely ended would leave its work undone; and one that cannot even begin, for want of memory, is waited for without end
by whoever starts it (`threading.Thread.start`).
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import os
import resource
import signal
import stat
import sys
import threading

from userfault.pager import spawn

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from userfault.pager.spawn import Will


def main(role: str, will_fd: int) -> None:
    """Become the supervisor, the worker or the trial that the will belongs to; never returns."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # its life is the application's, not the terminal's
    faulthandler.enable()
    sys.excepthook = _dying(sys.excepthook)
    sys.unraisablehook = _ending_without_memory(sys.unraisablehook)
    threading.excepthook = _ending_without_memory(threading.excepthook)
    code = 1
    try:
        will = spawn.read_will(will_fd)
        _keep_only(spawn.descriptors(will))
        _settle(role)
        _run(role, will)
        code = 0
    except BaseException:  # noqa: BLE001  # whatever it was, the other process must see this one end
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)  # threads may hang in a store for ever; nothing else is left to do


def _run(role: str, will: Will) -> None:
    if role == spawn.WORKER:
        from userfault.pager.worker import run
    elif role == spawn.TRIAL:
        from userfault.pager.trial import run
    else:
        from userfault.pager.supervisor import run
    run(will)


# -- last words ----------------------------------------------------------------------------------------------


def _open_words() -> int:
    """Return a descriptor for what a dying process has to say: standard error, but it waits for no reader.

    One who never reads his pipe, or has stopped his terminal, would keep it from dying, and its successor from coming.
    What stores print meanwhile may wait, and is not lost: this is another open file.
    """
    try:
        kind = os.fstat(2).st_mode
        if not (stat.S_ISFIFO(kind) or stat.S_ISCHR(kind)):  # a file has no reader, a socket cannot be opened again
            return 2
        return os.open("/proc/self/fd/2", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:  # closed, or another user's
        return 2


_words = 2


def _dying(hook: Callable[..., object]) -> Callable[..., None]:
    """Return a hook for the exception of which this process dies."""

    def say(*news: Any) -> None:
        with contextlib.suppress(Exception), open(_words, "w", errors="backslashreplace", closefd=False) as sys.stderr:
            hook(*news)

    return say


def _ending_without_memory(hook: Callable[[Any], object]) -> Callable[[Any], None]:
    """Return a hook for exceptions that nobody caught, which ends the process if memory has ended."""

    def hear(news: Any) -> None:
        if issubclass(news.exc_type, MemoryError) or getattr(news.exc_value, "errno", 0) == errno.ENOMEM:
            _dying(hook)(news)
            os._exit(1)
        hook(news)

    return hear


# -- what it keeps -------------------------------------------------------------------------------------------


def _keep_only(fds: set[int]) -> None:
    """Close what came along by accident; make the rest private again."""
    for fd in sorted(map(int, os.listdir("/proc/self/fd"))):
        if fd in fds:
            os.set_inheritable(fd, False)
        elif fd > 2:
            with contextlib.suppress(OSError):
                os.close(fd)


def _settle(role: str) -> None:
    global _words  # noqa: PLW0603  # a process dies once
    _words = _open_words()
    faulthandler.enable(_words)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    if null:
        os.close(null)
    with open("/proc/self/comm", "w") as comm:
        comm.write(f"userfault-{role}"[:15])
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.chdir("/")  # no file system stays busy because of a pager
