"""Ctrl-C, and handlers that raise: a second one ends what the first one cannot, and nothing is left half-way."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.crash.conftest import Start, Victim

BIT = 1 << (signal.SIGINT - 1)
HAMMER_S = 1.0


def status(pid: int, field: str) -> int:
    """A set of signals of a process's main thread, the bit of SIGINT alone."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1], 16) for line in lines if line.startswith(field)) & BIT


def await_first(victim: Victim, way: str) -> None:
    """Wait until the first SIGINT has arrived where it can: in the main thread's queue, or in CPython's handler."""
    if way == "write":
        victim.wait_until(lambda: status(victim.pid, "SigPnd") != 0, "nobody has passed the first one on")
    else:
        victim.wait_until(lambda: status(victim.pid, "SigCgt") == 0, "the first one was not taken")


@pytest.mark.parametrize("way", ["touch", "write", "touch in a thread"])
def test_a_second_ctrl_c_ends_a_program_that_hangs(start: Start, way: str) -> None:
    with start("interrupts.hang", way) as victim:
        _, _, uffd = victim.expect("ready")
        victim.await_fault(uffd)
        os.kill(victim.pid, signal.SIGINT)
        await_first(victim, way)
        assert victim.process.poll() is None
        os.kill(victim.pid, signal.SIGINT)
        assert victim.end(within=5).status == -signal.SIGINT
        victim.assert_no_pager()


@pytest.mark.parametrize("way", ["touch", "write"])
def test_the_count_begins_anew_when_the_first_is_handled(start: Start, way: str) -> None:
    with start("interrupts.interrupted_twice", way) as victim:
        _, _, uffd = victim.expect("ready")
        for _ in range(2):
            victim.say()
            victim.await_fault(uffd)
            os.kill(victim.pid, signal.SIGINT)
            victim.expect("interrupted")
        assert victim.expect("restored") == ["True"]
        victim.end().check()


@pytest.mark.parametrize("way", ["ensure", "pinned", "prefetch", "retry", "opening"])
def test_ctrl_c_ends_a_wait_for_the_pager_at_once(start: Start, way: str) -> None:
    with start("interrupts.wait_in_vain", way) as victim:
        victim.expect("ready")
        victim.say()
        time.sleep(0.1)  # it waits for an answer, which nothing outside can see
        sent = time.monotonic()
        os.kill(victim.pid, signal.SIGINT)
        victim.expect("interrupted")
        assert time.monotonic() - sent < 1
        assert victim.expect("right") == ["True", 0]
        victim.end().check()


def test_a_spinning_thread_leaves_room_for_others(start: Start) -> None:
    with start("interrupts.spin", 1.0) as victim:
        busy, median, count, wrong = victim.expect("quiet")
        victim.end().check()
    print(f"the worker uses {busy} % of a processor; others: {count} faults, median {median} ms")
    assert busy < 60
    assert count > 10
    assert median < 50
    assert not wrong


@pytest.mark.parametrize("what", ["ensure", "pinned", "prefetch", "open", "forget", "pager"])
def test_handlers_that_raise(start: Start, what: str, seed: int, soak: bool) -> None:
    seconds = HAMMER_S * (30 if soak else 2 if what == "pager" else 1)
    with start("interrupts.hammer", what, seconds, True, seed, limit=seconds + 60) as victim:
        assert victim.expect("after") == [0, 1, "True", 0]
        assert victim.expect("works") == ["True", 0]
        (interrupted,) = victim.expect("came")
        victim.end().check()
    assert interrupted


@pytest.mark.parametrize("what", ["ensure", "open", "pager"])
def test_handlers_that_return(start: Start, what: str, seed: int) -> None:
    with start("interrupts.hammer", what, HAMMER_S, False, seed) as victim:
        assert victim.expect("after") == [0, 1, "True", 0]
        assert victim.expect("works") == ["True", 0]
        (done,) = victim.expect("came")
        victim.end().check()
    assert done


@pytest.mark.parametrize("how", ["another comes", "the pager closes"])
def test_a_handler_that_raises_in_the_end_of_a_region(start: Start, how: str) -> None:
    with start("interrupts.raise_in_the_end_of", how) as victim:
        assert victim.expect("raised") == ["__del__", 2]
        if how == "another comes":
            assert victim.expect("regions") == [2, "True"]
        assert victim.expect("closed") == ["True"]
        victim.end().check()
