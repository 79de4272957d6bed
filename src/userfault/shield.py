"""Doing something to its end, whatever a signal handler raises meanwhile.

Python runs signal handlers in the main thread, between any two steps of it, and what a handler raises (Ctrl-C does)
ends whatever was being done there.  A range that changes hands must not be left half-way: between two userfaultfds a
missing page is zeros.  Nor must a pager that starts: its processes would have nobody.  So in the main thread such work
is done by a thread of its own, where no handler runs.

A thread may never begin: its first step takes memory, and CPython tells nobody if there is none, not even
`Thread.start`, which then waits for ever.  So whoever is first to claim the work does it, the thread or, after a while,
the one who waits for it; and threads that nobody waits for begin within some seconds, or an error says that they did
not.
"""

from __future__ import annotations

import sys
import threading
from _thread import allocate_lock, get_ident, start_new_thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    T = TypeVar("T")

_BEGIN_S = 2.0
"""How long a thread may take to begin."""


def begin(work: Callable[[], object]) -> None:
    """Do some work in a thread of its own, which ends with the process at the latest. Returns when it has begun.

    Raises:
        RuntimeError: no thread is to be had; the work is not done.
    """
    begun, claim = allocate_lock(), allocate_lock()
    begun.acquire()

    def run() -> None:
        begun.release()
        if claim.acquire(blocking=False):
            work()

    start_new_thread(run, ())
    if not begun.acquire(timeout=_BEGIN_S) and claim.acquire(blocking=False):
        raise RuntimeError(f"a thread did not begin within {_BEGIN_S:g} s: there is no memory for its first step")


class _Work:
    """Something to do once, in whichever thread is the first to run it."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.work = work
        self.claim, self.ended = allocate_lock(), allocate_lock()
        self.done = False
        self.result: object = None
        self.error: BaseException | None = None
        self.ended.acquire()

    def run(self) -> None:
        """Do it, unless somebody else does already."""
        if not self.claim.acquire(blocking=False):
            return
        try:
            self.result = self.work()
        except BaseException as error:  # noqa: BLE001  # it is raised where somebody waits for it
            self.error = error
        finally:
            self.done = True
            self.ended.release()


def to_the_end(work: Callable[[], T]) -> T:
    """Do some work; what a signal handler raises meanwhile is raised when it is done.

    Raises:
        Whatever the work raises.
    """
    if get_ident() != threading.main_thread().ident or sys.is_finalizing():  # then no thread begins any more
        return work()
    job = _Work(work)
    raised: BaseException | None = None
    try:
        start_new_thread(job.run, ())
    except RuntimeError:  # no more threads to be had
        job.run()
    except BaseException as before:  # noqa: BLE001  # a handler's, before it was started or after
        raised = before
    while not job.done:  # a handler may raise when it has been acquired
        try:
            if not job.ended.acquire(timeout=_BEGIN_S):
                job.run()
        except BaseException as meanwhile:  # noqa: BLE001  # a handler's
            raised = meanwhile
    failure, job.error = job.error or raised, None
    if failure is None:
        return job.result  # type: ignore[return-value]  # of this work
    try:
        raise failure
    finally:
        del failure, raised  # or its traceback would hold it, and all that the work has held
