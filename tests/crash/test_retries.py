"""Stores that must be asked more than once, reads that never return, and processes that are stopped."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from tests.crash.conftest import Start, Victim

BLOCK = 65536
BAD = 3 * BLOCK
FAILED = 7


def test_a_store_that_is_asked_again(start: Start) -> None:
    with start("retries.heals", 2) as victim:
        assert victim.expect("right") == ["True", 2, 0, 0]
        victim.end().check()


def test_a_store_that_is_asked_as_often_as_the_policy_says(start: Start) -> None:
    with start("retries.exhausted") as victim:
        assert victim.expect("error") == [BAD, BLOCK, 3, "True", "True"]
        assert victim.expect("known") == ["True", 2, 1]
        victim.expect("ready")
        victim.say()
        result = victim.end()
        assert result.signal == signal.SIGBUS
        assert "after 3 attempts" in result.stderr


def test_a_file_that_was_replaced_is_not_asked_again(start: Start, tmp_path: Path) -> None:
    with start("retries.hopeless", str(tmp_path / "data")) as victim:
        assert victim.expect("error") == [1, "True"]
        victim.end().check()


def test_pauses_double_up_to_the_longest(start: Start, tmp_path: Path) -> None:
    with start("retries.pauses", str(tmp_path / "times")) as victim:
        gaps = victim.expect("gaps")
        assert len(gaps) == 4
        assert all(gap >= least for gap, least in zip(gaps, (50, 100, 150, 150), strict=True))
        victim.end().check()


@pytest.mark.parametrize("concurrency", [8, 0], ids=["reader", "fault loop"])
@pytest.mark.parametrize("way", ["touch", "ensure"])
def test_a_read_that_never_returns(start: Start, tmp_path: Path, way: str, concurrency: int) -> None:
    """It is abandoned at its timeout; the block fails, all others and other regions are served."""
    with start("retries.hangs", way, str(tmp_path / "release"), concurrency) as victim:
        victim.expect("ready")
        begun = time.monotonic()
        if way == "touch":
            result = victim.end()
            assert result.signal == signal.SIGBUS
            assert "others True" in result.stdout or "others" not in result.stdout
            assert "did not return in time" in result.stderr
        else:
            assert victim.expect("error") == [BAD, 1, "True"]
            assert victim.expect("others") == ["True"]
            assert victim.expect("state") == [FAILED]
            assert victim.expect("healed") == ["True"]
            victim.end().check()
        assert time.monotonic() - begun < 20


def test_a_read_that_is_abandoned_and_made_again(start: Start, tmp_path: Path) -> None:
    """What the first one brings, when it comes back after all, is thrown away."""
    with start("retries.hangs_once", str(tmp_path / "release"), str(tmp_path / "entered")) as victim:
        assert victim.expect("right") == ["True", 1]
        assert victim.expect("again") == ["True"]
        victim.end().check()


def test_a_store_in_which_every_read_hangs(start: Start) -> None:
    blocks = 100
    with start("retries.all_hang", blocks) as victim:
        supervisor, *_ = victim.expect("ready")
        assert victim.expect("error") == ["True"]
        assert victim.expect("failed") == [blocks]
        assert victim.expect("told") == ["True"]
        (worker,) = (pid for pid in victim.pagers() if pid != supervisor)
        assert victim.threads(worker) < 64
        victim.say()
        victim.end().check()


@pytest.mark.parametrize("missing", [1 << 30, BLOCK // 2, 16])
def test_a_store_that_fills_too_little_and_says_nothing(start: Start, missing: int) -> None:
    with start("retries.short", missing) as victim:
        assert victim.expect("error") == [3, "True"]
        victim.end().check()


def test_a_retry_that_is_given_up_and_whose_worker_dies(start: Start, tmp_path: Path) -> None:
    with start("retries.retry_that_is_lost", str(tmp_path / "stalled")) as victim:
        assert victim.expect("state") == [FAILED, "OSError:", "the", "first", "read"]
        victim.expect("ready")
        victim.say()
        assert victim.end().signal == signal.SIGBUS


def test_what_is_logged(start: Start) -> None:
    with start("retries.logs") as victim:
        lines = [" ".join(map(str, victim.expect("log"))) for _ in range(4)]
        victim.end().check()
    assert [line.split()[:2] for line in lines] == [
        ["userfault.region", "WARNING"],
        ["userfault.region", "WARNING"],
        ["userfault.region", "ERROR"],
        ["userfault.pager", "WARNING"],
    ]
    assert all("FailingStore" in line and "busy" in line for line in lines[:3])
    assert lines[3].startswith("userfault.pager WARNING worker N has ended, and ")


@pytest.mark.parametrize("role", ["worker", "supervisor"])
def test_a_process_that_is_stopped_is_replaced(start: Start, role: str) -> None:
    with start("retries.stopped") as victim:
        supervisor, worker, _ = victim.expect("ready")
        stopped = {"worker": worker, "supervisor": supervisor}[role]
        victim.say("touch")
        victim.expect("right")  # from here on neither has anything to say to the other, which would continue it
        os.kill(stopped, signal.SIGSTOP)
        begun = time.monotonic()
        victim.say("evict")
        right, *_ = victim.expect("right")
        assert right == "True"
        _await_end(victim, stopped)
        print(f"replaced after {time.monotonic() - begun:.2f} s")
        _await_news(victim, stopped)
        victim.say("end")
        victim.end().check()
        victim.assert_no_pager()


@pytest.mark.parametrize("role", ["worker", "supervisor"])
def test_one_is_stopped_and_the_other_killed(start: Start, role: str) -> None:
    """Nobody is left who could notice, and the kernel continues the one that is stopped."""
    with start("retries.stopped") as victim:
        supervisor, worker, _ = victim.expect("ready")
        stopped, killed = {"worker": (worker, supervisor), "supervisor": (supervisor, worker)}[role]
        os.kill(stopped, signal.SIGSTOP)
        os.kill(killed, signal.SIGKILL)
        victim.say("touch")
        right, *_ = victim.expect("right")
        assert right == "True"
        _await_news(victim, killed)
        victim.say("end")
        victim.end().check()
        victim.assert_no_pager()


def _await_news(victim: Victim, stopped: int) -> None:
    """The application knows the new process as soon as it has said hello."""
    deadline = time.monotonic() + 10
    while True:
        victim.say("evict")
        right, *now = victim.expect("right")
        assert right == "True"
        if stopped not in now:
            return
        assert time.monotonic() < deadline


def _await_end(victim: Victim, pid: int) -> None:
    victim.wait_until(lambda: pid not in victim.pagers(), "a stopped process was not replaced", 10)
    victim.wait_until(lambda: len(victim.pagers()) == 2, "nobody took its place", 10)


@pytest.mark.parametrize("role", ["worker", "supervisor"])
def test_a_successor_that_is_stopped_before_it_has_said_a_word(start: Start, role: str) -> None:
    with start("retries.stopped") as victim:
        first = dict(zip(("supervisor", "worker"), victim.expect("ready")[:2], strict=True))[role]
        os.kill(first, signal.SIGKILL)
        victim.wait_until(lambda: _others(victim, role, first) != [], "there is no successor")
        (second,) = _others(victim, role, first)
        os.kill(second, signal.SIGSTOP)
        victim.say("evict")
        right, *_ = victim.expect("right")
        assert right == "True"
        victim.wait_until(lambda: _others(victim, role, first) not in ([], [second]), "it was not replaced", 20)
        victim.say("end")
        victim.end().check()
        victim.assert_no_pager()


def _others(victim: Victim, role: str, first: int) -> list[int]:
    return [pid for pid in victim.pagers() if pid != first and victim.role(pid) == role]
