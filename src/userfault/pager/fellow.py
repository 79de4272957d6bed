"""The supervisor, as the worker knows it: told what it must hold, watched, and replaced.

What the supervisor holds for a successor of the worker (regions, exports) must be true: it is told of each that begins
or ends.  One that cannot be told, because it does not read or there is no memory for a packet, is killed; its own
successor gets all of it by will.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import time

from userfault.kernel import process
from userfault.pager import failure, pulse, spawn, wire
from userfault.pager.pulse import Pulse
from userfault.pager.wire import Message

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from userfault.pager.spawn import Will

    Holdings = tuple[list[tuple[int, int]], list[tuple[int, tuple[int, ...]]]]


class Fellow:
    """The supervisor of the moment. Called by the control thread alone.

    Args:
        will: What this worker was started with.
        poll: Where its descriptors are watched.
        holdings: Returns what it has to hold.
    """

    def __init__(self, will: Will, poll: select.poll, holdings: Callable[[], Holdings]) -> None:
        self.pid = 0
        self._will = will
        self._poll = poll
        self._holdings = holdings
        self._pidfd = -1
        self._pulse = Pulse(will["pulse"], pulse.WORKER)
        self._ward = _patient(socket.socket(fileno=will["ward"]))
        self._alone = False
        """Without a supervisor, since none could be started."""
        poll.register(self._ward, select.POLLIN)

    def introduce(self) -> None:
        """Say who its worker is; it passes that on to the application."""
        own = process.pidfd_open(os.getpid())
        self.tell(Message(wire.INTRODUCE, a=os.getpid(), fds=(own,)))
        os.close(own)

    def tell(self, message: Message) -> None:
        """Tell it something that it must not miss."""
        if self._alone:  # its successor gets all of this by will
            return
        try:
            wire.deliver(self._ward, message)
        except (BrokenPipeError, ConnectionResetError):  # it is dead: as above
            return
        except OSError:  # it does not read (see `_patient`), or there is no memory: what it holds is not true now
            self._kill()

    def beat(self) -> None:
        """Show it that this worker goes on."""
        self._pulse.beat()

    def tick(self) -> None:
        """See whether it goes on, and whether there is one. Called twice a second."""
        if self._alone:
            self._replace()
        if self._pidfd >= 0 and self._pulse.is_lost(self.pid, time.monotonic()):
            self._kill()

    def look(self, ready: dict[int, int]) -> bool:
        """Hear what it says, or that it is dead; return whether it has introduced itself."""
        dead = self._pidfd in ready  # asked first: a successor's descriptor may have a number that was ready
        greeted = self._ward.fileno() in ready and self._hear()
        if dead:
            self._replace()
        return greeted

    def _kill(self) -> None:
        failure.report(f"supervisor {self.pid} is stopped or hangs, and is replaced")
        with contextlib.suppress(OSError):
            process.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _hear(self) -> bool:
        message = wire.receive(self._ward)
        if message is None:
            self._poll.unregister(self._ward)
            if self._pidfd < 0:  # it died before it had introduced itself
                self._replace()
        elif message.kind == wire.INTRODUCE:
            if self._pidfd < 0:
                self._watch(message.a, message.fds[0])
            else:
                wire.close_all(message.fds)
            return True
        return False

    def _watch(self, pid: int, pidfd: int) -> None:
        self.pid, self._pidfd = pid, pidfd
        self._poll.register(pidfd, select.POLLIN)

    def _replace(self) -> None:
        self._bury()
        try:
            ward, theirs = wire.pair()
        except OSError:  # no descriptor for it; the next tick tries again
            self._alone = True
            return
        regions, exports = self._holdings()
        will = self._will | {"ward": theirs.fileno(), "regions": regions, "exports": exports, "strikes": 0}
        try:
            pid = spawn.start_successor(spawn.SUPERVISOR, will)
        except OSError:  # no process to be had; as above
            self._alone = True
            ward.close()
            return
        finally:
            theirs.close()
        self._alone = False
        with contextlib.suppress(OSError):  # it may be stopped before it has said a word
            self._watch(pid, process.pidfd_open(pid))
        self._ward = _patient(ward)
        self._poll.register(self._ward, select.POLLIN)
        self.introduce()

    def _bury(self) -> None:
        if self._pidfd >= 0:
            self._poll.unregister(self._pidfd)
            os.close(self._pidfd)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, os.WNOHANG)
        self._pidfd = -1
        with contextlib.suppress(KeyError, ValueError):
            self._poll.unregister(self._ward)
        self._ward.close()


def _patient(ward: socket.socket) -> socket.socket:
    """Let nobody wait for a supervisor that does not read, since it is stopped; and be continued when it dies."""
    pulse.continue_by(ward)
    ward.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", 1, 0))
    return ward
