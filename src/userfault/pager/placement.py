"""Which core the fault loop runs on, and how it behaves there.

Some facts about the scheduler
------------------------------
* Where the pager runs decides more than what it is written in: on virtual machines a fault costs 4 to 5 µs when the
  pager runs on the faulting thread's core, because nobody sleeps long enough to be woken by an interrupt, and some
  50 µs when it has to be woken on another (`benchmarks/fault_latency.py`).
* The thread's id is in the message, its core in `/proc/PID/task/TID/stat`; looking it up costs about 5 µs.
* A thread that is woken prefers the core it last ran on, but only if that core is idle, and it is not: its waker, the
  fault loop, is running there.  So if another core is idle, the kernel moves the thread there at the very wake, the
  loop follows, and so on, a hundred times a second.  A core that runs nothing but `SCHED_IDLE` threads counts as idle
  for this purpose (Linux 5.4, `sched_idle_cpu`), and the thread stays.
* `SCHED_IDLE` has a price: against a busy competitor on the same core such a thread gets next to nothing (weight 3
  against 1024).  And leaving it again takes `CAP_SYS_NICE` or `RLIMIT_NICE` of 20.

What follows
------------
The loop follows the thread that faults, each thread being looked up at most every `PERIOD_NS`.  Following is for one
thread, or several on one core; when threads on several cores fault, the loop lets go and the scheduler decides.

While it follows, and only if it can go back, the loop *yields*: it runs under `SCHED_IDLE`.  The control thread watches
it every `WATCH_NS` as long as that lasts.  A loop that had work and did not run since the last look is starved: it
stops yielding at once, and for a while that doubles each time.  A loop that has nothing to do stops yielding too, so
that the first fault after a pause never meets a competitor unprotected.  (What remains: a loop that is pushed off its
core in the microseconds in which it holds the GIL keeps the control thread waiting too, until the scheduler gives it a
slice. Measured with a competitor on the core: 0.3 s at worst, once, against 0.17 s without yielding.)

A thread that spins in the kernel (see `faults`) would starve a loop on its own core: then `flee` lets go for a while.
"""

from __future__ import annotations

import contextlib
import os
import resource
import threading

from userfault.kernel import process

PERIOD_NS = 10_000_000
MEMORY_NS = 50_000_000
FLIGHT_NS = 200_000_000
WATCH_NS = 20_000_000
QUIET_NS = 100_000_000
FIRST_PENANCE_NS, MOST_PENANCE_NS = 1_000_000_000, 60_000_000_000
CAP_SYS_NICE = 23
HOME = os.sched_getaffinity(0)
"""The cores of this process: those of the application's main thread, once `settle` was called."""


def settle(pid: int) -> None:
    """Make the cores of an application's main thread this process's: the thread that started it may have had fewer."""
    global HOME  # noqa: PLW0603  # one process, one set of cores
    with contextlib.suppress(OSError):
        HOME = os.sched_getaffinity(pid)
        os.sched_setaffinity(0, HOME)


def go_home() -> None:
    """Begin a thread that was started by the fault loop, and has inherited its core and its policy."""
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, HOME)
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def _may_go_back() -> bool:
    """Whether this process may leave SCHED_IDLE again."""
    return process.has_capability(CAP_SYS_NICE) or resource.getrlimit(resource.RLIMIT_NICE)[0] >= 20


class Placement:
    """Follows the faulting threads of one process. Made and used by the thread that it moves; `watch` by another.

    `cpu` is the core that the loop is held on, -1 while it is free; `yielding` whether it runs under `SCHED_IDLE`:
    never unless it `may_yield`, and somebody calls `watch`.
    """

    def __init__(self, pid: int, *, may_yield: bool = True) -> None:
        self._pid = pid
        self._thread = threading.get_native_id()
        self._seen: dict[int, tuple[int, int]] = {}
        self._free_until = 0
        self._last = 0
        self._ran = -1
        self._may_yield = may_yield and _may_go_back()
        self._penance = FIRST_PENANCE_NS
        self._yield_from = 0
        self._lock = threading.Lock()
        self.cpu = -1
        self.yielding = False

    def saw(self, thread: int, now: int) -> None:
        """Take note that `thread` faulted at `now` (nanoseconds); move if that says so."""
        self._last = now
        known = self._seen.get(thread)
        if (known and now - known[1] < PERIOD_NS) or now < self._free_until:
            return
        cpu = process.task_cpu(self._pid, thread)
        if cpu is None:
            return
        self._seen[thread] = (cpu, now)
        self._seen = {t: (c, when) for t, (c, when) in self._seen.items() if now - when < MEMORY_NS}
        cpus = {c for c, _ in self._seen.values()}
        self._settle(cpu if len(cpus) == 1 else -1, now)

    def flee(self, now: int) -> None:
        """Stop following for a while."""
        self._free_until = now + FLIGHT_NS
        self._seen.clear()
        self._settle(-1, now)

    def relax(self) -> None:
        """Stop yielding: the fault will be answered by a reader, so that this thread is not the one who wakes."""
        if self.yielding:
            self._set_policy(yielding=False)

    def _settle(self, cpu: int, now: int) -> None:
        if cpu != self.cpu:
            try:
                os.sched_setaffinity(0, {cpu} if cpu >= 0 else HOME)
            except OSError:  # a cpuset does not have that core
                cpu = -1
            self.cpu = cpu
        wanted = cpu >= 0 and self._may_yield and now >= self._yield_from
        if wanted != self.yielding:
            self._set_policy(wanted)

    def _set_policy(self, yielding: bool) -> None:
        with self._lock, contextlib.suppress(OSError):  # a sandbox may forbid it: then nothing has changed
            self._ran = -1
            os.sched_setscheduler(self._thread, os.SCHED_IDLE if yielding else os.SCHED_OTHER, os.sched_param(0))
            self.yielding = yielding

    # -- for the control thread ---------------------------------------------------------------------------------

    def watch(self, now: int) -> None:
        """Stop the loop's yielding if it is starved, or has nothing to do."""
        if not self.yielding:
            return
        state, ran = process.task_state(self._thread)
        before, self._ran = self._ran, ran
        if state == "R" and ran == before:
            self._yield_from = now + self._penance
            self._penance = min(2 * self._penance, MOST_PENANCE_NS)
            self._set_policy(yielding=False)
        elif state != "R" and now - self._last > QUIET_NS:
            self._set_policy(yielding=False)
