"""Many regions, threads, kills, failing stores and forks at once, for a minute or for twenty: every byte right."""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from tests.crash.figures import in_words, of_histogram, pauses, percentiles
from tests.crash.killer import Killer, Pulse
from tests.crash.programs.soak_errands import peace

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.crash.conftest import Report, Start

KILLS, MANY = 200, int(os.environ.get("USERFAULT_SOAK_KILLS", "10000"))
THREADS = 7
FINE = 8
"""Steps of the victim's histogram in each octave."""
GAP_S = 0.02
"""How long a worker works before it is killed, on average."""
EARLY_S = 0.1
"""A successor that is killed early is killed within this time: as it begins, or takes over."""
EARLY, MOST_EARLY = 0.15, 2
"""The share of early kills; in a row, only so many that the pager does not give up."""
SHARES = {"kill supervisor": 0.03, "stop worker": 0.005, "stop supervisor": 0.005, "hold up": 0.02}
"""How often something else is done, for each worker that is killed."""
END_S = 60.0
OURS = ("file", "file, small blocks", "file, large blocks", "memory", "copy of a file", "copy of memory")
"""Regions whose blocks nobody suspects when a worker dies (see `pager/trial.py`)."""


def plan(kills: int, rng: random.Random) -> list[str]:
    """Return what is done to the pager, one after the other."""
    actions = ["kill worker"] * kills
    for action, share in SHARES.items():
        actions += [action] * max(2, round(share * kills))
    rng.shuffle(actions)
    return actions


class Executor:
    """Carries the plan out."""

    def __init__(self, killer: Killer, rng: random.Random, folder: str) -> None:
        self.killer, self.rng, self.folder = killer, rng, folder
        self.early = 0
        self.actions: dict[str, Callable[[], None]] = {
            "kill worker": killer.kill_worker,
            "kill supervisor": self.kill_supervisor,
            "stop worker": killer.stop_worker,
            "stop supervisor": killer.stop_supervisor,
            "hold up": killer.hold_up,
        }

    def kill_supervisor(self) -> None:
        """Kill it when no store is about to end the worker."""
        with peace(self.folder):
            self.killer.kill_supervisor()

    def do(self, action: str) -> None:
        if self.early < MOST_EARLY and self.rng.random() < EARLY:
            self.early += 1
            time.sleep(self.rng.uniform(0, EARLY_S))
        else:
            self.early = 0
            self.killer.await_work()
            time.sleep(min(self.rng.expovariate(1 / GAP_S), 10 * GAP_S))
        self.actions[action]()


def run(start: Start, seed: int, folder: Path, report: Report, progress: Callable[[str], None], kills: int) -> None:
    rng = random.Random(seed)
    pulse = Pulse(folder, THREADS)
    begun = time.monotonic()
    with start("soak.run", str(folder), rng.randrange(1 << 32), limit=300.0 + kills) as victim:
        supervisor, worker, _ = victim.expect("ready")
        pulse.start_over()
        killer = Killer(victim, rng, pulse, supervisor, worker)
        executor = Executor(killer, rng, str(folder))
        for action in plan(kills, rng):
            executor.do(action)
            progress(f"soak with seed {seed}: {len(killer.kills)} of {kills} kills, {time.monotonic() - begun:.0f} s")
        killer.await_work()
        victim.say("stop")
        victim.wait_until(victim.has_spoken, "the victim does not come to an end", END_S)
        victim.expect("over")
        results = json.loads((folder / "results.json").read_text(encoding="ascii"))
        report(f"soak: seed {seed}, {time.monotonic() - begun:.0f} s", *describe(killer, results))
        errors = victim.end().check().stderr
    assert not any(thread["wrong"] for thread in results["threads"])
    assert all(got == due for got, due in (thread["checksums"] for thread in results["threads"]))
    assert len(killer.kills) == kills
    assert "Traceback" not in errors, errors


def describe(killer: Killer, results: dict[str, Any]) -> list[str]:
    """Return the report."""
    threads = results["threads"]
    counts: Counter[str] = sum((Counter(thread["counts"]) for thread in threads), Counter())
    times: Counter[float] = Counter()
    for thread in threads:
        times.update({1000 * 2 ** (int(bucket) / FINE): count for bucket, count in thread["histogram"].items()})
    regions: Counter[str] = sum((Counter(region) for region in results["regions"].values()), Counter())
    steps = [step for thread in threads for step in thread["long"]]
    held_up = pauses(killer.kills, [(begun, ended) for begun, ended, _, _ in steps])
    ours = pauses(killer.kills, [(begun, ended) for begun, ended, _, where in steps if where in OURS])
    read, wrong = (sum(amounts) for amounts in zip(*((t["bytes"], len(t["wrong"])) for t in threads), strict=True))
    done = {"worker kills": len(killer.kills)} | killer.counts | {"new workers greeted": results["restarts"]}
    return [
        f"done to the pager: {in_words(done)}",
        f"bytes read and compared: {read:,}; wrong: {wrong}; checksum of all: {checksum(threads)}",
        f"steps: {sum(times.values()):,}: {in_words(counts)}",
        f"counted by the workers, as far as they lived to write it down: {in_words(regions)}",
        f"ms a step took: {of_histogram(times)}",
        f"ms from a kill until nothing is held up by it: {percentiles([1000 * pause for pause in held_up])}",
        f"    where the store is one of the package's own: {percentiles([1000 * pause for pause in ours])}",
        f"longest steps: {', '.join(longest(steps))}",
        f"threads that waited for peace: {len(killer.starved)}; s: {percentiles(killer.starved, (50, 100))}",
    ]


def checksum(threads: list[dict[str, Any]]) -> str:
    got, due = (sum(thread["checksums"][i] for thread in threads) & 0xFFFFFFFF for i in range(2))
    return f"{got:08x}, due {due:08x}"


def longest(steps: list[tuple[float, float, str, str]]) -> list[str]:
    ordered = sorted(steps, key=lambda step: step[0] - step[1])
    return [f"{what} ({where}) {ended - begun:.2f} s" for begun, ended, what, where in ordered[:6]]


def test_everything_at_once(
    start: Start, seed: int, tmp_path: Path, report: Report, progress: Callable[[str], None]
) -> None:
    run(start, seed, tmp_path, report, progress, KILLS)


@pytest.mark.soak
def test_everything_at_once_for_long(
    start: Start, seed: int, tmp_path: Path, report: Report, progress: Callable[[str], None]
) -> None:
    run(start, seed, tmp_path, report, progress, MANY)
