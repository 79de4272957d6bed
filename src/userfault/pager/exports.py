"""The exported descriptors of a worker, and the one thread that serves them all.

It waits in an edge-triggered epoll for their memories and their programs, and pumps whichever has news.  A region's
faults never wait for it: the fault loop is another thread, and this one starts with the first export.  It follows the
faulting thread to its core as that one does (`placement`): of the four wake-ups that a fault takes two are then cheap.
"""

from __future__ import annotations

import contextlib
import functools
import select
import time

from userfault.pager import failure, wire
from userfault.pager.outlet import Outlet
from userfault.pager.placement import Placement
from userfault.pager.wire import Message
from userfault.shield import begin

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

FDS_OF_OUTLET = wire.EXPORT_FDS + 1
"""Those that came, and the memory opened anew."""
PAUSE_S = 0.02
"""Until what failed is tried again."""


class Exports:
    """All of them. Its methods are called by the control thread.

    Args:
        pid: The application.
        tell_supervisor: Sends a message to the supervisor.
        on_answer: Called after each answer, by any thread.
    """

    def __init__(self, pid: int, tell_supervisor: Callable[[Message], None], on_answer: Callable[[], None]) -> None:
        self._pid = pid
        self._tell_supervisor = tell_supervisor
        self._on_answer = on_answer
        self._outlets: dict[int, Outlet] = {}
        self._by_fd: dict[int, Outlet] = {}
        self._epoll: select.epoll | None = None
        self._stuck: set[Outlet] = set()
        """Those whose last attempt failed; for the one thread alone."""

    def __len__(self) -> int:
        return len(self._outlets)

    def __contains__(self, identity: int) -> bool:
        return identity in self._outlets

    def open(self, message: Message) -> None:
        """Serve a descriptor from now on; a request that a new worker is sent again is done already."""
        if message.region in self._outlets:
            wire.close_all(message.fds)
            return
        if len(message.fds) != wire.EXPORT_FDS:
            wire.close_all(message.fds)
            raise OSError(24, "the pager has no descriptors left for an export; see `ulimit -n`")
        self.adopt(message.fds)
        self._tell_supervisor(Message(wire.KEEP, region=message.region, fds=message.fds))

    def adopt(self, fds: tuple[int, ...], *, again: bool = False) -> None:
        """Serve one whose descriptors are here.

        If that fails they are closed; but if a former worker has served it, this one is to die, and another to try.
        """
        try:
            outlet = Outlet(fds, self._on_answer, again=again)
        except BaseException:
            wire.close_all(fds)
            raise
        try:
            outlet.watch(self._started())
            self._outlets[outlet.id] = outlet
            for fd in (outlet.uffd.fd, outlet.ours.fileno()):
                self._by_fd[fd] = outlet
            outlet.pump()
        except BaseException:
            if not again:
                self._forget(outlet)
                outlet.close()
            raise

    def _forget(self, outlet: Outlet) -> None:
        self._outlets.pop(outlet.id, None)
        for fd in (outlet.uffd.fd, outlet.ours.fileno()):
            self._by_fd.pop(fd, None)
            with contextlib.suppress(OSError):  # it was not watched yet
                # Others hold copies of these files: closing ours would not end the watch.
                self._started().unregister(fd)

    def renew(self, identity: int, number: int) -> None:
        """Let another program begin.

        Args:
            identity: The export's.
            number: The request's.

        Raises:
            KeyError: There is no such export.
        """
        self._outlets[identity].renew(number)

    def close(self, identity: int) -> None:
        """Serve one no longer."""
        outlet = self._outlets[identity]
        self._tell_supervisor(Message(wire.DROP, region=identity))  # a successor must never serve it again
        self._forget(outlet)
        outlet.close()

    def descriptors(self) -> list[tuple[int, tuple[int, ...]]]:
        """Return what a successor needs of each: its number and its descriptors."""
        return [(identity, outlet.fds) for identity, outlet in self._outlets.items()]

    def _started(self) -> select.epoll:
        if self._epoll is None:
            epoll = select.epoll()
            begin(lambda: self._run(epoll))
            self._epoll = epoll  # not before there is somebody who waits there
        return self._epoll

    def _run(self, epoll: select.epoll) -> None:
        placement = Placement(self._pid, may_yield=False)

        def saw(thread: int) -> None:
            placement.saw(thread, time.perf_counter_ns())

        while True:
            for fd, _ in epoll.poll(PAUSE_S if self._stuck else None):
                outlet = self._by_fd.get(fd)
                if outlet is not None and outlet not in self._stuck:
                    self._try(outlet, functools.partial(outlet.pump, fd, saw))
            for outlet in tuple(self._stuck):
                self._try(outlet, outlet.recover)

    def _try(self, outlet: Outlet, action: Callable[[], None]) -> None:
        """Do something; if it fails, for want of memory perhaps, it is tried again, since no edge comes twice."""
        try:
            action()
        except Exception as error:  # noqa: BLE001  # the others must go on
            with contextlib.suppress(Exception):
                if outlet not in self._stuck:
                    failure.report(f"export {outlet.id}: {failure.plain(error)}")
            self._stuck.add(outlet)
        else:
            self._stuck.discard(outlet)
