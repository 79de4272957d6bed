"""One process of the pager is killed, at any moment, again and again: a pause, and every byte right."""

from __future__ import annotations

import os
import random
import signal
import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from tests.crash.conftest import Start, Victim

KILLS = {"worker": 60, "supervisor": 30, "in turn": 40}
SOAK = 10
"""How many times as often in a soak run."""
EARLY = 0.15
"""The share of successors that are killed before they serve; in a row, only so many that the pager does not give up."""
MOST_EARLY = 2
CHANGES = 3
"""So many different states in a row, and at least one block has been filled."""
SUCCESSION_S = 20.0


class Killer:
    """Kills processes of a victim's pager, each as soon as it has been alive for a random while."""

    def __init__(self, victim: Victim, rng: random.Random) -> None:
        self.victim = victim
        self.rng = rng
        self.early = 0
        self.successions: list[float] = []
        """From a kill until the successor exists, in seconds."""

    def kill(self, role: str) -> None:
        """Kill the process that has a role, and wait until it has a successor."""
        pid = self.find(role)
        self._wait(role, pid)
        os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        self.victim.wait_until(lambda: self.find(role, but=pid) > 0, f"no other {role} after {pid}", SUCCESSION_S)
        self.successions.append(time.monotonic() - killed)

    def find(self, role: str, but: int = 0) -> int:
        """Return the process that has a role, 0 if there is none."""
        for pid in self.victim.pagers():
            if pid != but and self.victim.role(pid) == role:
                return pid
        assert self.victim.process.poll() is None, "the application has ended"
        return 0

    def _wait(self, role: str, pid: int) -> None:
        if self.rng.random() < EARLY and self.early < MOST_EARLY:
            self.early += 1
            time.sleep(self.rng.uniform(0, 0.05))
            return
        self.early = 0
        if role == "worker":
            self.victim.wait_until(lambda: self._works(pid), "the worker does not begin to work")
        time.sleep(self.rng.uniform(0.001, 0.03))

    def _works(self, pid: int) -> bool:
        """Whether a worker has taken everything over (then it has a second thread), and has filled blocks."""
        if self.victim.threads(pid) == 1:
            return False
        seen = {self.victim.states(pid)}
        for _ in range(8):
            time.sleep(0.001)
            seen.add(self.victim.states(pid))
        return len(seen) > CHANGES or not self.victim.threads(pid)


def report(victim: Victim, killer: Killer) -> None:
    """End the victim, and check what it says of itself."""
    victim.say("stop")
    wrong, *places = victim.expect("wrong")
    assert not wrong, places
    steps = victim.expect("steps")
    assert all(steps), steps
    (restarts,) = victim.expect("restarts")
    pauses = victim.expect("pauses")
    while (words := victim.line())[0] == "budget":
        assert words[1] <= words[2] + 8 * 65536, "more than the budget is in memory"
    assert words[0] == "regions"
    for role in ("supervisor", "worker"):
        victim.wait_until(lambda r=role: victim.memfds(killer.find(r)) == words[1], "regions are left")  # type: ignore[misc]
    victim.end().check()
    print(f"{len(killer.successions)} kills, {restarts} restarts of the worker, {sum(steps)} steps")
    print(f"successor after (ms): {percentiles([round(1000 * s) for s in killer.successions])}")
    print(f"steps of more than 5 ms (ms): {len(pauses)}, {percentiles(pauses)}")


def percentiles(values: list[int]) -> str:
    ordered = sorted(values) or [0]
    return ", ".join(f"{p} %: {ordered[min(len(ordered) * p // 100, len(ordered) - 1)]}" for p in (0, 50, 90, 99, 100))


def kill_again_and_again(start: Start, rng: random.Random, folder: Path, who: str, kills: int) -> None:
    roles = ("worker", "supervisor") if who == "in turn" else (who,)
    with start("scans.scan", str(folder), rng.randrange(1 << 32), limit=60 + kills / 2) as victim:
        victim.expect("ready")
        killer = Killer(victim, rng)
        for number in range(kills):
            killer.kill(roles[number % len(roles)])
        report(victim, killer)


@pytest.mark.parametrize("who", KILLS)
def test_one_is_killed_again_and_again(start: Start, rng: random.Random, tmp_path: Path, who: str) -> None:
    kill_again_and_again(start, rng, tmp_path, who, KILLS[who])


@pytest.mark.soak
@pytest.mark.parametrize("who", KILLS)
def test_one_is_killed_for_long(start: Start, rng: random.Random, tmp_path: Path, who: str) -> None:
    kill_again_and_again(start, rng, tmp_path, who, SOAK * KILLS[who])
