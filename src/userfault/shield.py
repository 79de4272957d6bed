"""Doing something to its end, whatever a signal handler raises meanwhile.

Python runs signal handlers in the main thread, between any two steps of it, and what a handler raises (Ctrl-C does)
ends whatever was being done there.  A range that changes hands must not be left half-way: between two userfaultfds a
missing page is zeros.  Nor must a pager that starts: its processes would have nobody.  So in the main thread such work
is done by a thread of its own, where no handler runs.
"""

from __future__ import annotations

import threading
from _thread import allocate_lock, get_ident, start_new_thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    T = TypeVar("T")

_BEGIN_S = 10.0
"""How long a thread may take to begin, before it counts as never started."""


class _Work:
    """Something to do in a thread."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.work = work
        self.begun, self.ended = allocate_lock(), allocate_lock()
        self.done = False
        self.result: object = None
        self.error: BaseException | None = None
        self.begun.acquire()
        self.ended.acquire()

    def run(self) -> None:
        """Do it."""
        self.begun.release()
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
    if get_ident() != threading.main_thread().ident:
        return work()
    job = _Work(work)
    raised: BaseException | None = None
    try:
        start_new_thread(job.run, ())
    except RuntimeError:  # no more threads to be had
        return work()
    except BaseException as before:  # a handler's, before it was started or after
        raised = before
        if not job.begun.acquire(timeout=_BEGIN_S):
            raise
    while not job.done:  # a handler may raise when it has been acquired
        try:
            job.ended.acquire()
        except BaseException as meanwhile:  # noqa: BLE001  # a handler's
            raised = meanwhile
    failure, job.error = job.error or raised, None
    if failure is None:
        return job.result  # type: ignore[return-value]  # of this work
    try:
        raise failure
    finally:
        del failure, raised  # or its traceback would hold it, and all that the work has held
