"""Which core the fault loop runs on.

Where the pager runs decides more than what it is written in: on virtual machines a fault costs 4 to 5 µs when the
pager runs on the faulting thread's core, because nobody sleeps long enough to be woken by an interrupt, and some 50 µs
when it has to be woken on another.  So the loop follows the thread that faults.  The thread's id is in the message, its
core in `/proc/PID/task/TID/stat`; that costs about 5 µs, so each thread is looked up at most every `PERIOD_NS`.

Following is for one thread (or several on one core).  When threads on several cores fault, the loop lets go and the
kernel's scheduler decides.  A thread that spins in the kernel (see `faults`) would starve a loop on its own core: then
`flee` lets go for a while.
"""

from __future__ import annotations

import os

from userfault.kernel import process

PERIOD_NS = 10_000_000
MEMORY_NS = 50_000_000
FLIGHT_NS = 200_000_000


class Placement:
    """Follows the faulting threads of one process. Used by the fault loop's thread only; read by anyone.

    `cpu` is the core that the loop is held on, -1 while it is free.
    """

    __slots__ = ("_home", "_pid", "_seen", "_until", "cpu")

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._home = os.sched_getaffinity(0)
        self._seen: dict[int, tuple[int, int]] = {}
        self._until = 0
        self.cpu = -1

    def saw(self, thread: int, now: int) -> None:
        """Take note that `thread` faulted at `now` (nanoseconds); move if that says so."""
        known = self._seen.get(thread)
        if (known and now - known[1] < PERIOD_NS) or now < self._until:
            return
        cpu = process.task_cpu(self._pid, thread)
        if cpu is None:
            return
        self._seen[thread] = (cpu, now)
        recent = {t: (c, when) for t, (c, when) in self._seen.items() if now - when < MEMORY_NS}
        self._seen = recent
        cpus = {c for c, _ in recent.values()}
        self._settle(cpu if len(cpus) == 1 else -1)

    def flee(self, now: int) -> None:
        """Stop following for a while."""
        self._until = now + FLIGHT_NS
        self._seen.clear()
        self._settle(-1)

    def _settle(self, cpu: int) -> None:
        if cpu == self.cpu:
            return
        try:
            os.sched_setaffinity(0, {cpu} if cpu >= 0 else self._home)
        except OSError:  # a cpuset took the core away
            cpu = -1
        self.cpu = cpu
