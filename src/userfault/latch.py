"""Waiting for another thread, in a way that a signal handler's exception cannot break.

`threading.Event` is written in Python: Ctrl-C between two steps of its `wait` can leave its inner lock held, and then
the thread that calls `set` waits for ever (CPython's bpo-29988).  The thread that listens to the pager must never wait
for anybody, so it sets one of these, which is a bare lock: both operations on it are single steps.
"""

from __future__ import annotations

from _thread import allocate_lock


class Latch:
    """Something that happens once. Any thread may set it, more than once too; one thread waits for it."""

    __slots__ = ("_lock", "is_set")

    def __init__(self) -> None:
        self.is_set = False
        self._lock = allocate_lock()
        self._lock.acquire()

    def set(self) -> None:
        """Let the waiting thread go on. Never waits."""
        self.is_set = True
        try:
            self._lock.release()
        except RuntimeError:  # it was set before
            return

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set, at most `timeout` seconds; return whether it is."""
        if not self.is_set:
            self._lock.acquire(timeout=-1 if timeout is None else timeout)
        return self.is_set
