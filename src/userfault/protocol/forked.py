"""Keeping a forked child, which is the pager, from placing a page just while its range changes hands.

A page that is placed between the poison and the cure would be cured away (`holes`).  In one process a lock excludes
that.  A forked child has no lock of ours; but a POSIX record lock (fcntl(2)) has processes as its owners, is there
for whoever inherits the file, and ends with its owner's life.  The file is made just before the first fork at which
there is marked memory.  Nobody waits for it for ever: its owner may be stopped.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE_S = 1.0


class ForkLock:
    """One process's lock with its forked children. The caller has a lock among its threads."""

    def __init__(self) -> None:
        self._fd = -1
        self.inherited = -1
        """The parent's."""

    def prepare(self) -> None:
        """Make it, before a fork."""
        if self._fd < 0:
            with contextlib.suppress(OSError):  # out of descriptors: then the fork is worth more
                self._fd = os.memfd_create("userfault-forked", os.MFD_CLOEXEC)

    def begin_in_child(self) -> None:
        """In a forked child: it is the parent's."""
        if self._fd >= 0:
            self._fd, self.inherited = -1, self._fd

    def close(self) -> None:
        """Let go of one's own."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def exclude_children(self) -> contextlib.AbstractContextManager[None]:
        """While a range changes hands."""
        return _held(self._fd, fcntl.LOCK_EX)

    def share_with_parent(self) -> contextlib.AbstractContextManager[None]:
        """While a child places pages in the memory of its parent."""
        return _held(self.inherited, fcntl.LOCK_SH)


@contextlib.contextmanager
def _held(fd: int, kind: int) -> Iterator[None]:
    if fd < 0 or not _acquire(fd, kind):
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # it is held for too long then, and nobody waits for it for ever
            fcntl.lockf(fd, fcntl.LOCK_UN)


def _acquire(fd: int, kind: int) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            fcntl.lockf(fd, kind | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.0005)  # a lock of another process, which cannot be waited for with a limit
        else:
            return True
