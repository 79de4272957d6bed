"""Stores that fail and workers that cannot live: the application is told, in the way it asked; it never hangs."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import random

    from tests.crash.conftest import Start

BLOCK = 65536
BAD = 3 * BLOCK
FAILED = 7
RAISES = ("ensure", "prefetch", "retry", "pinned")
SYSTEM_CALLS = ("write", "preadv")
TOUCHES = ("touch", "thread")


@pytest.mark.parametrize("again", [False, True], ids=["", "known"])
@pytest.mark.parametrize("way", [*RAISES, *SYSTEM_CALLS, *TOUCHES])
def test_a_failing_store(start: Start, way: str, again: bool) -> None:
    with start("failures.use_failing", way, again) as victim:
        if again:
            victim.expect("known")
        victim.expect("ready")
        victim.say()
        begun = time.monotonic()
        if way in TOUCHES:
            assert victim.end(within=10).signal == signal.SIGBUS
            assert time.monotonic() - begun < 1
            return
        answer = victim.line()
        assert time.monotonic() - begun < 1
        if way in RAISES:
            assert answer == ["StoreError", BAD, BLOCK, "True", "True"]
        else:
            assert answer == ["EFAULT"]
        assert victim.expect("others") == ["True"]
        victim.end().check()


def test_a_healed_store(start: Start, tmp_path: Path) -> None:
    with start("failures.heal", str(tmp_path / "healed")) as victim:
        assert victim.expect("failed") == [FAILED]
        assert victim.expect("failed") == [FAILED]
        assert victim.expect("healed") == ["True"]
        assert victim.expect("whole") == ["True"]
        victim.end().check()


@pytest.mark.parametrize(
    ("way", "how"), [("ensure", "kill"), ("touch", "segv"), ("write", "exit"), ("prefetch", "abort")]
)
def test_a_block_that_kills_whoever_reads_it(start: Start, way: str, how: str) -> None:
    """The third death is the last: the block fails, the pager lives, and nobody else is any the worse for it."""
    with start("failures.crash", way, how) as victim:
        victim.expect("ready")
        victim.say()
        if way == "touch":
            result = victim.end(within=20)
            assert result.signal == signal.SIGBUS
            assert "CrashingStore(" in result.stderr
            assert ": 3 processes died while they read it" in result.stderr
            return
        told = ["StoreError", BAD, BLOCK, "False", "False"]
        assert victim.line() == (["EFAULT"] if way == "write" else told)
        deaths = {"kill": "SIGKILL", "abort": "SIGABRT", "exit": 3}
        assert victim.expect("again") == [3, deaths[how]]
        assert victim.expect("others") == ["True"]
        right, restarts = victim.expect("beside")
        assert right == "True"
        assert 1 <= restarts <= 2  # a worker that dies at once says no hello
        assert victim.expect("known") == ["True"]
        victim.end().check()


@pytest.mark.parametrize("way", ["touch", "write", "ensure", "prefetch"])
def test_workers_that_are_killed_without_end(start: Start, way: str) -> None:
    """After a few workers that have achieved nothing the regions fail, rather than flap."""
    with start("failures.lost", way) as victim:
        victim.expect("ready")
        (first,) = (pid for pid in victim.pagers() if victim.role(pid) == "worker")
        os.kill(first, signal.SIGSTOP)  # before it can fill anything
        victim.say()
        killed: set[int] = set()
        while not victim.has_spoken():
            for pid in (pid for pid in victim.pagers() if victim.role(pid) == "worker"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                killed.add(pid)
        print(f"given up after {len(killed)} deaths")
        if way == "touch":
            assert victim.end(within=20).signal == signal.SIGBUS
            return
        assert victim.line() == ["EFAULT" if way == "write" else "PagerLostError"]
        closed, restarts = victim.expect("state")
        assert closed == "True" or way == "write"
        assert restarts < 20
        (milliseconds,) = victim.expect("closed")
        assert milliseconds < 1000
        assert victim.expect("left") == []
        assert victim.expect("anew") == ["True"]
        victim.end().check()


@pytest.mark.soak
def test_a_store_that_crashes_every_worker_late(start: Start) -> None:
    with start("failures.crash_late", 5.5, limit=150) as victim:
        victim.expect("ready")
        victim.say()
        assert victim.end().signal == signal.SIGBUS


def test_a_store_that_crashes_workers_which_are_busy_for_others(start: Start) -> None:
    with start("failures.crash_beside", 20.0) as victim:
        victim.expect("ready")
        result = victim.end()
    assert "WRONG" not in result.stdout
    assert result.signal == signal.SIGBUS, f"the thread still waits: {result.stdout}"


def test_a_store_that_cannot_be_made_again(start: Start, tmp_path: Path) -> None:
    with start("failures.made_once", str(tmp_path / "made")) as victim:
        assert victim.expect("good") == ["True"]
        assert victim.expect("resident") == ["True"]
        assert victim.expect("StoreError") == ["True"]
        victim.expect("ready")
        victim.say()
        assert victim.end().signal == signal.SIGBUS


def test_a_slowly_made_store_delays_nobody_else(start: Start) -> None:
    with start("failures.made_slowly_again", 2.0) as victim:
        assert victim.expect("good") == ["True", "True"]
        assert victim.expect("slow") == ["True"]
        victim.end().check()


@pytest.mark.parametrize("moment", ["before OK", "after OK", "before GOODBYE", "after GOODBYE"])
def test_the_worker_dies_as_it_says_goodbye(start: Start, tmp_path: Path, moment: str) -> None:
    with start("failures.goodbye", moment, str(tmp_path)) as victim:
        (milliseconds,) = victim.expect("closed")
        assert milliseconds < 2000
        victim.assert_no_pager()
        victim.say()
        victim.end().check()


def test_as_many_regions_as_descriptors(start: Start, tmp_path: Path) -> None:
    """As few descriptors to spare as with 1000 regions under the usual limit of 1024."""
    regions = 100
    with start("failures.many", regions, str(tmp_path), prefix=("prlimit", f"--nofile={regions + 24}")) as victim:
        assert victim.expect("opened") == [0]
        for restarts in (0, 1, 1):
            right, counted = victim.expect("right")
            assert right == "True"
            assert counted <= restarts  # the news may not have come yet
        assert victim.expect("right") == ["True"]
        victim.end().check()


def test_the_worker_is_lost_while_a_region_opens(start: Start) -> None:
    with start("failures.made_slowly") as victim:
        assert victim.expect("slow") == ["True"]
        assert victim.expect("memfds") == [1, 1]
        assert victim.expect("others")[0] == "True"
        victim.end().check()


def test_an_opening_that_was_given_up(start: Start) -> None:
    with start("failures.abandoned_opening") as victim:
        victim.expect("interrupted")
        assert victim.expect("others") == ["True", 4]
        assert victim.expect("memfds") == [1, 1]
        victim.end().check()


def test_a_start_that_was_given_up(start: Start) -> None:
    with start("failures.abandoned_start") as victim:
        given_up, threads = victim.expect("interrupted")
        assert given_up
        assert not threads
        victim.assert_no_pager()
        victim.say()
        assert victim.expect("works") == ["True"]
        assert victim.expect("descriptors")[0] < 12
        victim.end().check()


def test_a_start_given_up_at_each_line(start: Start) -> None:
    """KeyboardInterrupt may come between any two lines: nothing may be left of the start, whichever they are."""
    with start("failures.start_given_up_at_each_line", limit=300) as victim:
        given_up, threads, descriptors, total = victim.expect("interrupted")
        print(f"{given_up} starts given up, {total} lines")
        assert given_up > 0.8 * total
        assert not threads
        assert descriptors <= 0
        victim.assert_no_pager()
        victim.say()
        victim.end().check()


def test_kills_while_pagers_start(start: Start, rng: random.Random, soak: bool) -> None:
    """One of the two dies at any moment of its beginning: the other one sees to it."""
    with start("failures.starts", 60 if soak else 6, limit=300) as victim:
        kills = 0
        while not victim.has_spoken():
            time.sleep(rng.uniform(0, 0.02))
            pagers = victim.pagers()
            newest = max(map(victim.generation, pagers), default=0)
            pagers = [pid for pid in pagers if victim.generation(pid) == newest]
            if sorted(map(victim.role, pagers)) == ["supervisor", "worker"]:  # each has somebody to see to it
                kills += 1
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rng.choice(pagers), signal.SIGKILL)
        started, lost, threads = victim.expect("started")
        print(f"{started} started, {lost} lost, {kills} kills")
        assert started
        assert not threads
        victim.assert_no_pager()
        victim.say()
        victim.end().check()


def test_a_stopped_worker_resumes(start: Start) -> None:
    with start("failures.idle") as victim:
        supervisor, worker, uffd = victim.expect("ready")
        for number, stopped in enumerate(([worker], [supervisor], [worker, supervisor], [supervisor, worker]), 1):
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
            victim.say(str(number))
            if worker in stopped:
                victim.await_fault(uffd)
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
            victim.expect("touched")
        assert sorted(victim.pagers()) == sorted((supervisor, worker))
        victim.end().check()


def test_a_supervisor_without_a_successor(start: Start, tmp_path: Path) -> None:
    """The interpreter is gone, as after an upgrade: the worker goes on alone, and tries again."""
    python = tmp_path / "python"
    shutil.copy(os.path.realpath(sys.executable), python)
    with start("failures.orphan", str(python)) as victim:
        supervisor, _, _ = victim.expect("ready")
        python.rename(tmp_path / "away")
        os.kill(supervisor, signal.SIGKILL)
        time.sleep(0.3)  # the worker notices, and fails to start another
        for number in (1, 2):
            victim.say(str(number))
            victim.expect("touched")
        assert len(victim.pagers()) == 1
        (tmp_path / "away").rename(python)
        deadline = time.monotonic() + 10
        while len(victim.pagers()) < 2:
            assert time.monotonic() < deadline, "the worker did not try again"
            time.sleep(0.01)
        victim.say("3")
        victim.expect("touched")
        victim.end().check()
