"""Killing a victim's pager at random moments, and watching from outside that the victim goes on.

Nothing here waits for the victim: who is who is read from `/proc`, and its threads count their steps in a file. So a
victim that hangs is seen to hang.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator

    from tests.crash.conftest import Victim

SUCCESSION_S = 20.0
"""How long a successor may take on a busy machine."""
STARVED_S = 10.0
"""A thread that takes no step for so long is given peace: if it goes on then, the kills came too fast for it."""
HANGS_S = 40.0
"""A thread that takes no step for so long, most of it in peace, hangs."""
STEPS = 3
"""So many steps a thread, on average, show that a worker works."""
STOPPING_S = 0.05
"""After which a process that is not stopped goes on again: each of its threads is told, and somebody may wake it."""
OTHER = {"worker": "supervisor", "supervisor": "worker"}


class HangError(AssertionError):
    """A thread of the victim does not go on, though nobody disturbs its pager."""


class Pulse:
    """The steps of a victim's threads: one word each, in a file that it has mapped."""

    def __init__(self, folder: Path, threads: int) -> None:
        self._path = folder / "pulse"
        self._path.write_bytes(bytes(mmap.PAGESIZE))
        self._seen = [0] * threads
        self._since = [time.monotonic()] * threads

    def steps(self) -> list[int]:
        """Return how many steps each thread has taken."""
        now, words = time.monotonic(), memoryview(self._path.read_bytes()).cast("Q")
        steps = words[: len(self._seen)].tolist()
        for thread, count in enumerate(steps):
            if count != self._seen[thread]:
                self._seen[thread], self._since[thread] = count, now
        return steps

    def rest(self) -> float:
        """Return for how long the most patient thread has taken no step."""
        self.steps()
        return time.monotonic() - min(self._since)

    def start_over(self) -> None:
        """The victim has begun only now."""
        self._since = [time.monotonic()] * len(self._since)

    @contextlib.contextmanager
    def held(self, wait: Callable[[Callable[[], bool]], None]) -> Iterator[None]:
        """Hold the file's lock, with which the victim keeps its own crashes apart from deaths of the supervisor."""

        def lock() -> bool:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            return False

        with self._path.open("rb") as file:
            wait(lock)
            yield


class Killer:
    """Kills, stops and holds up the processes of one victim's pager, one at a time: the other one always lives."""

    def __init__(self, victim: Victim, rng: random.Random, pulse: Pulse, supervisor: int, worker: int) -> None:
        self.victim, self.rng, self.pulse = victim, rng, pulse
        self.pids = {"supervisor": supervisor, "worker": worker}
        self.kills: list[float] = []
        """When a worker was killed."""
        self.counts = dict.fromkeys(("supervisor kills", "workers stopped", "supervisors stopped", "hiccups"), 0)
        self.starved: list[float] = []
        """How long threads had to wait for peace."""

    # -- waiting ---------------------------------------------------------------------------------------------

    def await_work(self) -> None:
        """Wait until the worker of the moment has taken everything over, and the victim goes on."""
        self._wait(lambda: self.victim.threads(self.find("worker")) > 1)
        due = sum(self.pulse.steps()) + STEPS * len(self.pulse.steps())
        self._wait(lambda: sum(self.pulse.steps()) >= due)
        if self.pulse.rest() > STARVED_S:
            begun = time.monotonic()
            self._wait(lambda: self.pulse.rest() < STARVED_S)
            self.starved.append(STARVED_S + time.monotonic() - begun)

    def _wait(self, condition: Callable[[], bool]) -> None:
        while not condition():
            assert not self.victim.has_spoken(), f"the victim said {self.victim.line()}"
            if self.pulse.rest() > HANGS_S:
                raise HangError(self._evidence())
            time.sleep(0.0005)

    def _evidence(self) -> str:
        """Say who waits for what. The victim writes its stacks to its standard error, even from within a fault."""
        os.kill(self.victim.pid, signal.SIGUSR1)
        roles = {pid: role for role, pid in self.pids.items()} | {self.victim.pid: "application"}
        states = [f"{pid} {roles.get(pid, '')}: {waits(pid)}" for pid in self.victim.alive()]
        stacks = self.victim._result(0).stderr
        steps = f"no step for {self.pulse.rest():.0f} s; steps of each thread: {self.pulse.steps()}"
        return "\n".join([steps, *states, stacks])

    def find(self, role: str) -> int:
        """Return the living process that has a role; if it has died, the one that its fellow has started since."""
        deadline = time.monotonic() + SUCCESSION_S
        while self.victim.role(self.pids[role]) != role:
            for pid in children(self.pids[OTHER[role]]) or self._search(role):
                if self.victim.role(pid) == role:
                    self.pids[role] = pid
            assert time.monotonic() < deadline, f"no other {role} after {self.pids[role]}"
            assert not self.victim.has_spoken(), f"the victim said {self.victim.line()}"
            time.sleep(0.0005)
        return self.pids[role]

    def _search(self, role: str) -> list[int]:
        """Look everywhere; a forked child of the victim has a pager of its own, which is not meant."""
        return [
            pid for pid in self.victim.pagers() if self.victim.role(pid) == role and not self.victim.generation(pid)
        ]

    # -- doing -----------------------------------------------------------------------------------------------

    def kill_worker(self) -> None:
        self.kills.append(self._kill("worker"))

    def kill_supervisor(self) -> None:
        with self.pulse.held(self._wait):
            self._kill("supervisor")
        self.counts["supervisor kills"] += 1

    def _kill(self, role: str) -> float:
        """Kill one of the two, and wait until it has a successor: both dead at once is another story."""
        pid = self.find(role)
        os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        self._wait_for_another(role, pid)
        return killed

    def stop_worker(self) -> None:
        """Stop a worker; the supervisor notices, and replaces it."""
        self._stop("worker")

    def stop_supervisor(self) -> None:
        """Stop a supervisor; the worker notices, and replaces it, or says something, and that wakes it."""
        with self.pulse.held(self._wait):
            self._stop("supervisor")

    def _stop(self, role: str) -> None:
        pid = self.find(role)
        os.kill(pid, signal.SIGSTOP)
        self.counts[f"{role}s stopped"] += 1
        time.sleep(STOPPING_S)
        self._wait(lambda: state(pid) != "T")
        self.find(role)

    def hold_up(self) -> None:
        """Stop the worker for a moment, in which nobody need do anything."""
        pid = self.find("worker")
        os.kill(pid, signal.SIGSTOP)
        time.sleep(self.rng.uniform(0.001, 0.3))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        self.counts["hiccups"] += 1

    def _wait_for_another(self, role: str, pid: int) -> None:
        self._wait(lambda: self.victim.role(pid) != role)
        self.find(role)


def children(pid: int) -> list[int]:
    """Return the children of a process."""
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            found += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text(encoding="ascii").split())
    return found


def state(pid: int) -> str:
    """Return the letter that `/proc` has for what a process does; nothing if it is gone."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    return ""


def waits(pid: int) -> str:
    """Return where each thread of a process waits in the kernel."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        threads = [Path(f"/proc/{pid}/task/{thread}") for thread in os.listdir(f"/proc/{pid}/task")]
        return ", ".join((thread / "wchan").read_text(encoding="ascii") or "runs" for thread in threads)
    return "gone"
