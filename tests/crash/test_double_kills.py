"""Supervisor and worker are killed one after the other, so quickly that nobody replaces them, or not quite so quickly.

Then the application ends by SIGABRT, or every byte is right and it goes on: never a hang, never a wrong byte.
"""

from __future__ import annotations

import os
import random
import select
import signal
import time
from collections import Counter, deque
from typing import TYPE_CHECKING

import pytest
from tests.crash.figures import percentiles
from tests.crash.killer import Pulse

from userfault.testing import PatternStore

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.crash.conftest import Report, Start, Victim

DOUBLES, MANY = 20, 1000
SIZE = 16 * 65536 - 1000
THREADS = 3
AHEAD = 2
"""So many victims are started before their turn."""
WORKING_S = 0.05
DEADLINE_S = 1.0


class Double:
    """One victim, and how it ended."""

    def __init__(self, start: Start, rng: random.Random, folder: Path, path: Path) -> None:
        folder.mkdir()
        self.rng = rng
        self.pulse = Pulse(folder, THREADS)
        self.has_faulthandler = rng.random() < 0.5
        seed = rng.randrange(1 << 32)
        self.victim: Victim = start("soak_light.run", str(folder), str(path), seed, self.has_faulthandler)
        self.gap = self.took = 0.0

    def kill(self) -> str:
        """Kill both; return what became of the victim."""
        with self.victim as victim:
            *both, _ = victim.expect("ready")
            victim.wait_until(lambda: all(self.pulse.steps()), "a thread does not begin")
            time.sleep(self.rng.uniform(0, WORKING_S))  # at any moment of what it does
            self.rng.shuffle(both)
            ended = os.pidfd_open(victim.pid)
            self._kill_both(*both)
            has_ended = select.select([ended], [], [], DEADLINE_S)[0]
            self.took = time.monotonic() - self.killed
            os.close(ended)
            return self._confess(victim) if has_ended else self._go_on(victim)

    def _kill_both(self, first: int, second: int) -> None:
        wait = self.rng.choice((0, self.rng.uniform(0, 0.0005), self.rng.expovariate(1 / 0.005)))
        begun = time.monotonic()
        os.kill(first, signal.SIGKILL)
        while time.monotonic() < begun + wait:  # a sleep would be much longer than asked for
            pass
        os.kill(second, signal.SIGKILL)
        self.killed = time.monotonic()
        self.gap = self.killed - begun

    def _confess(self, victim: Victim) -> str:
        result = victim.end()
        assert "WRONG" not in result.stdout, result
        assert result.signal in (signal.SIGABRT, signal.SIGSEGV), result
        if result.signal == signal.SIGABRT:
            return "aborted"
        # Known of CPython: the frames of a thread that runs meanwhile change under the eyes of faulthandler.
        assert self.has_faulthandler, result
        assert "Fatal Python error: Aborted" in result.stderr, result
        return "aborted, and faulthandler crashed"

    def _go_on(self, victim: Victim) -> str:
        """It did not end: a successor was quick enough. Then all goes on, and all is right."""
        due = [count + 10 for count in self.pulse.steps()]
        victim.wait_until(lambda: all(map(int.__ge__, self.pulse.steps(), due)), "a thread hangs")
        victim.say("stop")
        assert victim.expect("over") == [0]
        victim.end().check()
        return "went on"


def kill_doubles(
    start: Start, seed: int, folder: Path, report: Report, progress: Callable[[str], None], doubles: int
) -> None:
    rng = random.Random(seed)
    path = folder / "data"
    path.write_bytes(PatternStore(SIZE).expected(0, SIZE))
    started: deque[Double] = deque()
    ends: Counter[str] = Counter()
    times: list[float] = []
    gaps: dict[str, list[float]] = {}
    for number in range(doubles + AHEAD):
        if number < doubles:
            started.append(Double(start, rng, folder / str(number), path))
        if number >= AHEAD:
            double = started.popleft()
            end = double.kill()
            ends[end] += 1
            progress(f"double kills with seed {seed}: {ends.total()} of {doubles}")
            gaps.setdefault(end, []).append(1e6 * double.gap)
            times += [1000 * double.took] * (end != "went on")
    report(
        f"double kills: seed {seed}",
        *(f"{end}: {count}; µs between the kills: {percentiles(gaps[end])}" for end, count in ends.most_common()),
        f"ms from the second kill to the end: {percentiles(times, digits=1)}",
    )
    assert ends["aborted"] > doubles / 4


def test_both_killed(start: Start, seed: int, tmp_path: Path, report: Report, progress: Callable[[str], None]) -> None:
    kill_doubles(start, seed, tmp_path, report, progress, DOUBLES)


@pytest.mark.soak
def test_both_killed_for_long(
    start: Start, seed: int, tmp_path: Path, report: Report, progress: Callable[[str], None]
) -> None:
    kill_doubles(start, seed, tmp_path, report, progress, MANY)
