"""Whoever writes is killed in the middle of it: what was flushed or changed is there, and blocks are whole."""

from __future__ import annotations

import os
import random
import signal
from typing import TYPE_CHECKING

import pytest
from tests.crash.programs.common import BLOCK
from tests.crash.programs.stamps import BLOCKS, STAMPS, stamp
from tests.crash.test_kills import Killer

from userfault import FileStore, Region

if TYPE_CHECKING:
    from pathlib import Path

    from tests.crash.conftest import Start, Victim

THREADS = 4
FLUSHED = 40
"""So many blocks have been flushed before anybody is killed."""
ENDS, MANY_ENDS = 2, 60
KILLS, MANY_KILLS = 5, 300
WHOLE_BLOCKS = 32


@pytest.mark.parametrize("who", ["the application", "its worker too", "everybody"])
def test_an_application_is_killed_while_it_writes(
    start: Start, rng: random.Random, tmp_path: Path, who: str, soak: bool
) -> None:
    for number in range(MANY_ENDS if soak else ENDS):
        folder = tmp_path / str(number)
        folder.mkdir()
        end_one(start, rng, folder, who)


def end_one(start: Start, rng: random.Random, folder: Path, who: str) -> None:
    path, notes = folder / "data", folder / "notes"
    path.write_bytes(bytes(BLOCKS * BLOCK))
    notes.write_bytes(bytes(2 * 8 * BLOCKS))
    budget = rng.choice(["1MiB", "64MiB"])
    with start("stamps.write_for_ever", str(path), str(notes), rng.randrange(1 << 32), THREADS, budget) as victim:
        _, worker, _ = victim.expect("ready")
        at_least = rng.randint(1, FLUSHED)
        victim.wait_until(lambda: sum(read_notes(notes)[1]) >= at_least, "nothing is flushed")
        kill(victim, worker, who)
        victim.process.wait()
        victim.assert_no_pager()
    check(path.read_bytes(), *read_notes(notes), loses=who == "everybody")
    with Region(FileStore(path, writable=True), "r+", BLOCK) as region:
        assert bytes(region.memory) == path.read_bytes(), "it cannot be opened again"


def kill(victim: Victim, worker: int, who: str) -> None:
    """Kill the application, and perhaps others with it."""
    others = {"the application": [], "its worker too": [worker], "everybody": victim.pagers()}[who]
    for pid in (victim.pid, *others):
        os.kill(pid, signal.SIGKILL)


def read_notes(path: Path) -> tuple[list[int], list[int]]:
    words = memoryview(path.read_bytes()).cast("Q").tolist()
    return words[:BLOCKS], words[BLOCKS:]


def check(content: bytes, written: list[int], flushed: list[int], *, loses: bool) -> None:
    """Each block is what was written last, or a mixture of that and the next: one for each thread that was at it."""
    mixed = 0
    for block in range(BLOCKS):
        data = content[block * BLOCK : block * BLOCK + BLOCK]
        oldest = flushed[block] if loses else written[block]
        allowed = {number % STAMPS for number in range(oldest, written[block] + 2)}
        assert set(data) <= allowed, f"block {block}: {set(data)}, flushed {flushed[block]}, written {written[block]}"
        mixed += data != stamp(written[block])
    assert loses or mixed <= THREADS, f"{mixed} blocks are not what was written last"


def test_a_worker_is_killed_while_it_flushes(start: Start, rng: random.Random, tmp_path: Path, soak: bool) -> None:
    for block in range(WHOLE_BLOCKS):
        (tmp_path / str(block)).write_bytes(stamp(0))
    kills = MANY_KILLS if soak else KILLS
    with start("stamps.flush_whole_blocks", str(tmp_path), WHOLE_BLOCKS, limit=60 + kills / 2) as victim:
        victim.expect("ready")
        killer = Killer(victim, rng)
        for _ in range(kills):
            killer.kill("worker")
            assert not torn(tmp_path)
        victim.say("stop")
        assert victim.expect("wrong") == []
        print("flushes:", victim.expect("flushes"))
        victim.end().check()


def torn(folder: Path) -> list[int]:
    """Return the blocks of which the store has a mixture."""
    found = [(block, (folder / str(block)).read_bytes()) for block in range(WHOLE_BLOCKS)]
    return [block for block, data in found if len(data) != BLOCK or len(set(data)) != 1]
