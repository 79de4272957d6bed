"""What the pager has to say, in the application's log: loggers named `userfault.pager` and `userfault.region`.

A handler of `logging` may wait: for its lock, for a slow terminal, for a thread that is stopped in a fault while it
formats an array.  The thread that listens to the pager must not, since others wait for what it hears.  So each burst of
news is logged by a short-lived thread of its own.  `logging` itself is imported by the first of them.

Nothing is printed unless the program sets up logging: the pager's processes write the essential to standard error
themselves, as the application may be about to die of a SIGBUS.
"""

from __future__ import annotations

import contextlib
from _thread import allocate_lock, start_new_thread
from collections import deque
from threading import Thread

WARNING, ERROR = 30, 40
"""As in `logging`."""
MOST = 1000
"""News that wait to be logged; older ones give way."""

_news: deque[tuple[int, str, object]] = deque(maxlen=MOST)
_busy = allocate_lock()
"""Held while a thread logs. Nobody waits for it: the garbage collector may have anybody say something at any step."""


def forget() -> None:
    """In a forked child: no thread is at work here, and the lock may be held for ever."""
    global _busy  # noqa: PLW0603  # one log per process
    _busy = allocate_lock()
    _news.clear()


def put(level: int, room: str, text: object) -> None:
    """Log `str(text)` with the logger `userfault.<room>`, soon. Never waits for a handler."""
    _news.append((level, room, text))
    if not _busy.acquire(blocking=False):
        return  # whoever has it looks again after letting go
    thread = Thread(target=_log, name="userfault-log", daemon=True)
    try:
        start_new_thread(thread.start, ())  # `start` itself may wait for ever, if there is no memory to begin
    except RuntimeError:  # no thread to be had, or the interpreter is ending: the next one tries again
        _busy.release()


def _log() -> None:
    while True:
        try:
            _log_news()
        finally:
            _busy.release()
        if not _news or not _busy.acquire(blocking=False):
            return


def _log_news() -> None:
    from userfault.pager.link import forking

    with forking:  # it registers what is to be done at a fork, which must not be half-way through
        import logging
    root = logging.getLogger("userfault")
    if not root.handlers:
        root.addHandler(logging.NullHandler())
    while _news:
        level, room, text = _news.popleft()
        with contextlib.suppress(Exception):  # somebody's handler
            logging.getLogger(f"userfault.{room}").log(level, "%s", text)
