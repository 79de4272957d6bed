"""The heartbeat: how supervisor and worker know of each other that they go on, and not only that they exist.

A dead process is reported by its pidfd.  A stopped one (SIGSTOP, a debugger's mistake) or one that hangs with its GIL
in hand is not, and the threads of the application wait.  So each of the two counts up a word in a page that both map,
twice a second, when it is awake for other reasons too; and looks whether the other one's has moved.  No system call is
made for it, nobody is woken by it, and the fault loop has no part in it.

What if one is stopped and the other dies before it could notice?  Then the kernel continues the one that is stopped:
the socket between them (the ward) is set up to send SIGCONT when its other end speaks or closes (`O_ASYNC`, `F_SETSIG`;
fcntl(2)).

A process that is stopped and has not moved between two looks is killed, and replaced as any that died.  One that merely
does not move (a store holds the GIL, the machine is overloaded) is given `HUNG_S`.  One that a debugger has stopped is
left alone.  A look that comes late proves nothing: the one who looks was stopped itself, or the whole machine.
"""

from __future__ import annotations

import contextlib
import os
import signal
from fcntl import F_GETFL, F_SETFL, F_SETOWN, fcntl
from mmap import mmap

from userfault.blocks.geometry import PAGE_SIZE
from userfault.errors import KernelError
from userfault.kernel import memfd, process

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

F_SETSIG = 10  # <fcntl.h> with _GNU_SOURCE; Linux 2.2
SUPERVISOR, WORKER = range(2)
"""Which word is whose."""
LOOK_S = 0.5
LATE_S = 3 * LOOK_S
HUNG_S = 60.0
"""A store that keeps the GIL for so long keeps everybody waiting; nobody can know that it would have let go."""


def continue_by(ward: socket.socket) -> None:
    """Have this process continued, if it is stopped, when the other end of `ward` speaks or closes."""
    with contextlib.suppress(OSError):  # no memory for it: then a pulse must do
        fcntl(ward.fileno(), F_SETOWN, os.getpid())
        fcntl(ward.fileno(), F_SETSIG, signal.SIGCONT)
        fcntl(ward.fileno(), F_SETFL, fcntl(ward.fileno(), F_GETFL) | os.O_ASYNC)


def create() -> int:
    """Return the descriptor of a new page."""
    fd: int = memfd.create("userfault-pulse", PAGE_SIZE)
    return fd


class Pulse:
    """One process's view of the page.

    Args:
        fd: From `create`.
        mine: The word of this process.
    """

    def __init__(self, fd: int, mine: int) -> None:
        self._page = mmap(fd, PAGE_SIZE)
        self._words = memoryview(self._page).cast("Q")
        self._mine, self._other = mine, 1 - mine
        self._last = self._words[self._other]
        self._looked = 0.0
        self._missed = 0
        self._stopped = False

    def close(self) -> None:
        """Let go of the page."""
        self._words.release()
        self._page.close()

    def beat(self) -> None:
        """Show that this process goes on."""
        self._words[self._mine] += 1

    def is_lost(self, pid: int, now: float) -> bool:
        """Look at the other process; return whether it is to be killed. Called at any time; looks twice a second.

        Args:
            pid: The other process.
            now: The time in seconds, of a monotonic clock.
        """
        passed = now - self._looked
        if passed < LOOK_S:
            return False
        self._looked = now
        last, self._last = self._last, self._words[self._other]
        state = _state(pid)
        if passed > LATE_S or self._last != last or state in ("", "t"):
            self._missed, self._stopped = 0, state == "T"
            return False
        self._missed += 1
        was_stopped, self._stopped = self._stopped, state == "T"
        return (was_stopped and self._stopped) or self._missed > HUNG_S / LOOK_S


def _state(pid: int) -> str:
    try:
        return process.state(pid)
    except KernelError:  # gone, or no descriptor for /proc
        return ""
