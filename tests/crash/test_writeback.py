"""Changes of an `r+` region, whatever dies: what was written is in the file at the end, and nothing else is."""

from __future__ import annotations

import os
import random
import signal
from typing import TYPE_CHECKING

import pytest
from tests.crash.programs.changes import expected
from tests.crash.programs.common import BLOCK
from tests.crash.test_kills import Killer

if TYPE_CHECKING:
    from pathlib import Path

    from tests.crash.conftest import Start, Victim

SIZE = 8 << 20
KILLS = {"nobody": 0, "worker": 40, "supervisor": 15, "in turn": 30}
SOAK = 25
"""How many times as often in a soak run."""


@pytest.fixture
def content(tmp_path: Path, rng: random.Random) -> bytes:
    """What is in the file before."""
    data = rng.randbytes(SIZE + 1000)
    (tmp_path / "data").write_bytes(data)
    return data


def change(start: Start, rng: random.Random, path: Path, who: str, kills: int, block_size: int) -> None:
    roles = ("worker", "supervisor") if who == "in turn" else (who,)
    budget = "1MiB" if block_size <= BLOCK else "16MiB"
    with start(
        "changes.scribble", str(path), rng.randrange(1 << 32), 4, budget, block_size, limit=60 + kills / 2
    ) as victim:
        victim.expect("ready")
        victim.expect("changing")
        killer = Killer(victim, rng)
        for number in range(kills):
            killer.kill(roles[number % len(roles)])
        finish(victim)


def finish(victim: Victim) -> None:
    victim.say("stop")
    assert victim.expect("wrong") == []
    assert all(victim.expect("steps"))
    resident, budget = victim.expect("resident")
    assert resident <= budget * 1.1, "more than the budget is in memory"
    assert victim.expect("different") == [0]
    print("restarts, longest step (ms):", victim.expect("restarts"))
    victim.end().check()


@pytest.mark.usefixtures("content")
@pytest.mark.parametrize("block_size", [4096, BLOCK, 2 << 20])
@pytest.mark.parametrize("who", KILLS)
def test_every_change_is_in_the_file(
    start: Start, rng: random.Random, tmp_path: Path, who: str, block_size: int, soak: bool
) -> None:
    change(
        start,
        rng,
        tmp_path / "data",
        who,
        KILLS[who] * (SOAK if soak else 1) // (1 if block_size == BLOCK else 4),
        block_size,
    )


@pytest.mark.parametrize("how", ["killed", "exits"])
@pytest.mark.parametrize("worker", ["lives", "is killed"])
def test_what_a_dead_application_has_changed_is_written_back(
    start: Start, rng: random.Random, tmp_path: Path, content: bytes, how: str, worker: str
) -> None:
    seed = rng.randrange(1 << 32)
    with start("changes.leave_changes", str(tmp_path / "data"), seed) as victim:
        _, pid, _ = victim.expect("ready")
        victim.expect("flushed")
        victim.expect("dirty")
        if how == "killed":
            os.kill(victim.pid, signal.SIGKILL)
        else:
            victim.say()
        if worker == "is killed":
            os.kill(pid, signal.SIGKILL)
        victim.process.wait()
        victim.assert_no_pager()
        assert (tmp_path / "data").read_bytes() == expected(content, seed)


@pytest.mark.usefixtures("content")
def test_a_region_does_not_end_while_a_block_is_being_written(start: Start, tmp_path: Path) -> None:
    """Else zeros of its emptied memory would be written, or what somebody else has written meanwhile be undone."""
    with start("changes.close_while_writing", str(tmp_path / "data"), str(tmp_path / "log")) as victim:
        assert victim.expect("order") == ["written", "closed"]
        assert victim.expect("found") == ["pinned"]
        victim.end().check()
