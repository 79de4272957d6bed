"""The supervisor: keeps a worker alive, and what the next worker needs.

It holds a copy of every descriptor that matters (the userfaultfd, the request socket, each region's memfd), listens,
and does nothing else: no store, no fault, no thread.  When the worker dies it spawns another from a will; one that is
stopped or hangs it kills first (`pulse`).  The worker does the same for the supervisor; only if both die at once does
the application's lifeline break.

A worker that dies before it has filled one block has achieved nothing.  After `MAX_STRIKES` such workers in a row the
supervisor gives up: it poisons every region, so that a touch is a SIGBUS instead of a wait without end, tells the
application, and stays as the one who holds the lifeline until the application is gone.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import socket
import time

from userfault.blocks import ledger
from userfault.blocks.geometry import PAGE_SIZE
from userfault.blocks.states import BlockState
from userfault.kernel import process
from userfault.kernel.userfaultfd import Userfaultfd
from userfault.pager import failure, poison, pulse, record, spawn, wire
from userfault.pager.pulse import Pulse
from userfault.pager.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from userfault.pager.spawn import Will

MAX_STRIKES = 5
"""Workers in a row that may die without having filled a block (systemd's default burst is 5 as well)."""
PAUSE_S = 0.02
"""Before the second such start, doubled each time: what kills them at once may pass, such as a lack of memory."""
STEADY_S = 5.0
"""A worker that lived this long and died while nothing was being filled has not failed; there was nothing to do."""
GRACE_S = 1.0
"""How long a worker may go on after its application has ended."""


class Supervisor:
    """One thread, one loop. `ward` is the socket to the worker of the moment."""

    def __init__(self, will: Will) -> None:
        self.will = will
        self.ward = socket.socket(fileno=will["ward"])
        self.control = socket.socket(fileno=will["control"])
        self.regions: dict[int, int] = dict(will["regions"])
        self.exports: dict[int, tuple[int, ...]] = {number: tuple(fds) for number, fds in will["exports"]}
        self.strikes: int = will["strikes"]
        self.worker = -1
        """pidfd of the worker; -1 while it is not known."""
        self.worker_pid = 0
        self.pulse = Pulse(will["pulse"], pulse.SUPERVISOR)
        self.born = time.monotonic()
        self.deadline = math.inf
        """Until when the worker may live: it ends when its application has ended, and its changes are written back."""
        self.finished = False

    def run(self) -> None:
        """Watch until the application is gone or has said goodbye."""
        pulse.continue_by(self.ward)
        self.introduce()
        while not self.finished:
            self.watch_worker()
            self.see_to_a_worker()
        self.hang_up()
        self.control.close()

    def hang_up(self) -> None:
        """Let the programs behind exported descriptors read the end of the file."""
        for _record, _uffd, ours, _theirs, _memory in self.exports.values():
            end = socket.socket(fileno=ours)
            wire.hang_up(end)
            end.detach()

    def introduce(self) -> None:
        """Tell the worker who its supervisor is; it watches us as we watch it."""
        own = process.pidfd_open(os.getpid())
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it is dead already: the loop will see that
            wire.deliver(self.ward, wire.Message(wire.INTRODUCE, a=os.getpid(), fds=(own,)))
        os.close(own)

    def watch_worker(self) -> None:
        """Listen until the worker is dead and everything it said has been read."""
        poll = select.poll()
        poll.register(self.ward, select.POLLIN)
        poll.register(self.will["application"], select.POLLIN)
        if self.worker >= 0:
            poll.register(self.worker, select.POLLIN)
        self.deadline = math.inf
        while True:
            ready = [fd for fd, _ in poll.poll(1000 * max(0, min(pulse.LOOK_S, self.deadline - time.monotonic())))]
            self.feel_pulse()
            if self.will["application"] in ready:
                poll.unregister(self.will["application"])
                self.deadline = time.monotonic() + GRACE_S
            if self.ward.fileno() in ready and self.listen():
                if self.worker >= 0:
                    poll.register(self.worker, select.POLLIN)
            elif self.ward.fileno() in ready and self.worker >= 0 and self.worker not in ready:
                poll.unregister(self.ward)  # end-of-file; wait for the process itself
            elif self.ward.fileno() in ready or self.worker in ready:
                break
        self.bury()

    def feel_pulse(self) -> None:
        """End a worker that is stopped or hangs, or that outlives its application."""
        now = time.monotonic()
        self.pulse.beat()
        lost = self.worker >= 0 and self.pulse.is_lost(self.worker_pid, now)
        if lost:
            failure.report(f"worker {self.worker_pid} is stopped or hangs, and is replaced")
        if lost or (now > self.deadline and self.worker >= 0):
            with contextlib.suppress(OSError):
                process.pidfd_send_signal(self.worker, signal.SIGKILL)

    def listen(self) -> bool:
        """Take one message of the worker; False at end-of-file."""
        message = wire.receive(self.ward)
        if message is None:
            return False
        if message.kind == wire.INTRODUCE:
            if self.worker < 0:
                self.worker_pid, self.worker = message.a, message.fds[0]
            else:
                wire.close_all(message.fds)
        elif message.kind == wire.KEEP:
            self.drop(message.region)
            if len(message.fds) == wire.EXPORT_FDS:
                self.exports[message.region] = message.fds
            else:
                self.regions[message.region] = message.fds[0]
        elif message.kind == wire.DROP:
            self.drop(message.region)
        elif message.kind == wire.PROGRESS:
            self.strikes = 0
        elif message.kind == wire.WRITING:
            self.deadline = time.monotonic() + message.a / 1e9 + GRACE_S
        elif message.kind == wire.GOODBYE:
            self.finished = True
        return True

    def drop(self, region: int) -> None:
        """Forget a region, or an export, that was closed."""
        fd = self.regions.pop(region, -1)
        wire.close_all((fd,) if fd >= 0 else self.exports.pop(region, ()))

    def bury(self) -> None:
        """Forget the dead worker, and see whether anyone still needs another."""
        if self.worker >= 0:
            os.close(self.worker)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.worker_pid, os.WNOHANG)
        self.worker = -1
        self.ward.close()
        with contextlib.suppress(OSError):  # who cannot be asked is alive
            over = not process.pidfd_alive(self.will["application"])
            self.finished = self.finished or (over and not any(map(_has_changes, self.regions.values())))

    def see_to_a_worker(self) -> None:
        """Have one again, unless nobody needs it, or give up."""
        while not self.finished:
            if self.replace_worker():
                return

    def replace_worker(self) -> bool:
        """Start another worker, or give up; False if nothing could be started, which counts as one that died."""
        if time.monotonic() - self.born > STEADY_S and not any(map(_was_filling, self.regions.values())):
            self.strikes = 0
        if self.strikes >= MAX_STRIKES:
            self.give_up()
            return True
        if self.strikes:
            time.sleep(PAUSE_S * 2**self.strikes)  # back-off, not synchronisation
        self.strikes += 1
        self.born = time.monotonic()
        try:
            self.ward, theirs = wire.pair()
        except OSError:
            return False
        pulse.continue_by(self.ward)
        will = self.will | {
            "ward": theirs.fileno(),
            "regions": list(self.regions.items()),
            "exports": list(self.exports.items()),
            "strikes": self.strikes,
        }
        with contextlib.suppress(OSError):  # could not be started: counts as one that died
            self.worker_pid = spawn.start_successor(spawn.WORKER, will)
            self.worker = process.pidfd_open(self.worker_pid)  # it may be stopped before it has said a word
        theirs.close()
        self.introduce()
        return True

    def give_up(self) -> None:
        """Fail every region loudly, say so, and hold the lifeline until the application ends."""
        uffd = Userfaultfd(self.will["uffd"])
        for fd in self.regions.values():
            words = _words(fd)
            poison.poison(uffd, words[ledger.W_ADDRESS], -(-words[ledger.W_SIZE] // PAGE_SIZE) * PAGE_SIZE)
        for fd, uffd_of_export, *_ in self.exports.values():
            book = Record(fd)  # its words are good as long as it lives
            exported = Userfaultfd(uffd_of_export)
            poison.poison(exported, book.words[record.W_ADDRESS], book.words[record.W_SIZE])
            exported.detach()
        self.hang_up()
        reason = f"{self.strikes} workers in a row died before they had filled a block"
        failure.report(f"{reason}: the pager gives up, and touching its regions is a SIGBUS")
        self.tell(wire.Message(wire.LOST, text=reason.encode()))
        self.finished = True

    def tell(self, message: wire.Message) -> None:
        """Tell the application, as soon as it reads, and wait until it is gone or has closed its pager."""
        poll = select.poll()
        poll.register(self.will["application"], select.POLLIN)
        poll.register(self.control, select.POLLOUT)
        while not any(fd != self.control.fileno() or events & ~select.POLLOUT for fd, events in poll.poll()):
            try:
                wire.send(self.control, message, socket.MSG_DONTWAIT)
                poll.modify(self.control, 0)
            except OSError:  # no room after all, or no memory for a packet: back-off
                time.sleep(0.01)


def _words(fd: int) -> memoryview:
    for _ in range(wire.TRIES):
        try:
            return ledger.read_words(fd)
        except OSError:  # it is memory: what is in the way passes
            time.sleep(0.001)
    return ledger.read_words(fd)


def _was_filling(fd: int) -> bool:
    return _has_block(fd, BlockState.FILLING)


def _has_changes(fd: int) -> bool:
    """Whether something has still to be written back."""
    return _has_block(fd, BlockState.DIRTY, BlockState.FLUSHING)


def _has_block(fd: int, *states: BlockState) -> bool:
    try:
        return ledger.has_block(fd, *states)
    except OSError:
        return True


def run(will: Will) -> None:
    """The supervisor's life."""
    Supervisor(will).run()
