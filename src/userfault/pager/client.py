"""What users hold of the pager: `Pager`, and the one that all regions of a process share."""

from __future__ import annotations

import contextlib
import os
import weakref
from threading import Lock, RLock

from userfault.blocks.geometry import MAX_BLOCK_SIZE, check_budget
from userfault.errors import Error, KernelError
from userfault.kernel import process
from userfault.pager import link, logs, mapping, wire
from userfault.pager.link import Link
from userfault.pager.wire import Message
from userfault.shield import to_the_end

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self


class Pager:
    """The two processes that answer the faults of this process's regions.

    Most programs never make one: regions share the default pager, which starts with the first of them and ends with the
    process.  A pager of one's own keeps its regions apart from all others.

    Threads: may be used by any.  Fork: a child does not inherit it, and starts its own when it opens a region.

    Args:
        budget: The most bytes that its regions may have in memory together, whatever their own budgets say. None: half
            of what is available now, for those together whose own budget is automatic. `math.inf`: no limit. A region
            may keep the four blocks that came in last all the same. May be set later.

    Raises:
        TypeError, ValueError: naming the budget.
        UnsupportedError: if the kernel, or this process's rights, do not suffice; with the remedy.
        PagerLostError: if its processes do not start.
    """

    def __init__(self, budget: str | float | None = None) -> None:
        self._link = Link(_choose_budget(budget), automatic=budget is None)
        self._watch()
        self._link.start()  # last: whatever interrupts from here on, the finalizer ends what has begun

    def _watch(self) -> None:
        self._finalizer = weakref.finalize(self, self._link.drop)
        self._finalizer.atexit = False  # at exit the pager goes by itself, once this process is gone

    @property
    def budget(self) -> int | None:
        """The most bytes that its regions may have in memory together; None: no limit.

        Set it to change it, as the argument of the same name.

        Raises:
            TypeError, ValueError: as the argument.
            PagerLostError: if there is nobody to tell.
        """
        return self._link.budget

    @budget.setter
    def budget(self, budget: str | float | None) -> None:
        self._link.check()
        self._link.budget, self._link.automatic = _choose_budget(budget), budget is None
        mapping.share_anew(self._link)
        self._link.request(Message(wire.BUDGET))

    @property
    def link(self) -> Link:
        """The mechanism behind it; for this package only."""
        return self._link

    @property
    def pid(self) -> int:
        """Process id of the supervisor."""
        return self._link.supervisor_pid

    @property
    def worker_pid(self) -> int:
        """Process id of the worker of the moment."""
        return self._link.worker_pid

    @property
    def restarts(self) -> int:
        """How many workers have replaced one that died."""
        return max(self._link.workers - 1, 0)

    @property
    def user_mode_only(self) -> bool:
        """Whether faults inside system calls fail with EFAULT, for want of privilege."""
        return self._link.uffd.user_mode_only

    @property
    def closed(self) -> bool:
        """Whether it was closed or lost, or belongs to the process that this one was forked from."""
        return bool(self._link.lost) or self._link.pid != os.getpid()

    @property
    def regions(self) -> int:
        """How many regions are open on it."""
        return self._link.open_regions

    def close(self) -> None:
        """End its processes, once the changes of regions that were forgotten are written back; twice is fine.

        Raises:
            Error: if regions are open; nothing is changed then.
        """
        mapping.end_lost()
        if not self.closed:
            self._link.await_retired()
        if not self.closed and self._link.open_regions:
            raise Error(f"{self._link.open_regions} regions are open on this pager; close them first")
        if self._finalizer.detach():
            try:
                self._link.stop()
            except BaseException:  # Ctrl-C, say: another close, or the finalizer, ends it
                self._watch()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.regions} regions"
        return f"<userfault.Pager supervisor={self.pid} worker={self.worker_pid} {state}>"


def _choose_budget(budget: str | float | None) -> int | None:
    if budget is not None:
        return check_budget(budget, MAX_BLOCK_SIZE)
    available: int = to_the_end(process.memory_available)  # which opens files of /proc
    return max(available // 2, MAX_BLOCK_SIZE)


_default: Pager | None = None
_default_lock = Lock()


def default_pager() -> Pager:
    """Return the pager that regions share unless told otherwise; start it if there is none.

    Raises:
        UnsupportedError, PagerLostError: as `Pager`.
    """
    global _default  # noqa: PLW0603  # one per process is its purpose
    with _default_lock:
        if _default is None or _default.closed or not _default.link.lifeline.intact():
            _default = Pager()
        return _default


def check_pager(pager: object) -> Pager:
    """Return the pager that a user passed; None stands for the default one.

    Raises:
        TypeError: if it is none.
        UnsupportedError, PagerLostError: as `default_pager`.
    """
    if pager is None:
        return default_pager()
    if not isinstance(pager, Pager):
        raise TypeError(f"pager must be a userfault.Pager, not {type(pager).__name__}")
    return pager


def _hold_fork() -> None:
    link.forking.acquire()


def _let_fork() -> None:
    link.forking.release()


def _forget_in_child() -> None:
    """In a forked child: let go of the parent's pager, and of locks that nobody here will release."""
    global _default, _default_lock
    for inherited in list(link.links):
        with contextlib.suppress(OSError, KernelError):
            inherited.close_descriptors()
    link.links.clear()
    _default, _default_lock = None, Lock()
    logs.forget()
    link.forking = RLock()


os.register_at_fork(
    before=_hold_fork,
    after_in_parent=_let_fork,
    after_in_child=_forget_in_child,
)
