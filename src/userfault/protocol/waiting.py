"""Taking a message without waiting, and waiting for one, whether or not the descriptor blocks.

For a blocking descriptor poll(2) says POLLERR, always.  An edge-triggered epoll reports even so that something has
happened; and a read can be told not to wait (RWF_NOWAIT, which userfaultfd knows since Linux 6.10).
"""

from __future__ import annotations

import contextlib
import os
import select
from errno import EAGAIN, EOPNOTSUPP
from threading import RLock
from typing import TYPE_CHECKING

from userfault.errors import KernelError
from userfault.kernel.syscalls import naming

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from userfault.kernel.userfaultfd import Userfaultfd


def take_message(uffd: Userfaultfd, message: bytearray) -> None:
    """Take one message from the kernel's queue.

    Args:
        uffd: Whose.
        message: Where to put it. It is there, and not lost, if a signal handler raises in the next moment.

    Raises:
        BlockingIOError: There is none.
        KernelError: The kernel has no memory for it.
    """
    try:
        os.preadv(uffd.fd, [message], -1, os.RWF_NOWAIT)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno != EOPNOTSUPP:
            raise KernelError(error.errno or 0, "preadv2(userfaultfd)") from None
        if not uffd.fdinfo().pending:
            raise BlockingIOError(EAGAIN, "read(userfaultfd): no fault is unread") from None
        os.readv(uffd.fd, [message])  # before 6.10: may wait if the thread is interrupted just now


def _new_epoll() -> select.epoll:
    with naming("epoll_create1"):
        return select.epoll()


class Bells:
    """Threads that wait for a descriptor, to be told what happens to it here and not in the kernel. Any thread."""

    __slots__ = ("_bells", "_lock")

    def __init__(self) -> None:
        self._bells: set[int] = set()
        self._lock = RLock()
        """Held while a bell is rung or closed: its number may be somebody else's file in the next moment."""

    def __len__(self) -> int:
        return len(self._bells)

    def ring(self) -> None:
        """Have them look again."""
        with self._lock:
            for bell in self._bells:
                os.eventfd_write(bell, 1)

    def end(self) -> None:
        """In a forked child: close what was inherited of threads that are not there."""
        for bell in self._bells:
            with contextlib.suppress(OSError):
                os.close(bell)

    @contextlib.contextmanager
    def something_new(self, watched: Callable[[], int]) -> Iterator[select.epoll]:
        """Give an epoll that wakes when a fault arrives, or somebody rings.

        Args:
            watched: Tells the descriptor of the faults, or raises; called when a ring is heard already.

        Raises:
            KernelError: EMFILE, ENOMEM, ENOSPC: it takes two descriptors.
        """
        with naming("eventfd"):
            bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        with self._lock:
            self._bells.add(bell)
        try:
            with _new_epoll() as epoll:
                with naming("epoll_ctl"):
                    epoll.register(bell, select.EPOLLIN | select.EPOLLET)
                    epoll.register(watched(), select.EPOLLIN | select.EPOLLET)
                yield epoll
        finally:
            with self._lock:
                self._bells.discard(bell)
                os.close(bell)
