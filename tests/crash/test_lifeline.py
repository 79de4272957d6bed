"""When the whole pager is dead the application ends at once: never a hang, never a zero."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.conformance.protocol_tools import wait_until

if TYPE_CHECKING:
    from tests.crash.conftest import Start, Victim

    from userfault.testing.child import ChildResult

FAULTS = ("user", "write", "preadv")
DISPOSITIONS = (
    "default",
    "handled",
    "ignored",
    "blocked before",
    "blocked after",
    "all blocked before",
    "all blocked after",
)
EVERYTHING = tuple(itertools.product(FAULTS, DISPOSITIONS, ("main", "thread"), (True, False)))
# Each fault with each disposition; the other two in turn.
CHOSEN = tuple(
    (fault, disposition, ("main", "thread")[(i + j) % 2], bool(j % 2))
    for i, fault in enumerate(FAULTS)
    for j, disposition in enumerate(DISPOSITIONS)
)
ROUNDS = 200
"""Deaths in a soak run."""
PROGRAM = Path(__file__).parent / "programs" / "lifeline.py"
TOUCHED = tuple(n for n, line in enumerate(PROGRAM.read_text().splitlines(), 1) if line.endswith("# touched here"))
DEADLINE_S = 1.0


def stop(*pids: int) -> None:
    """Stop processes of a pager, and return when they are; what one has said to another before continues that one."""

    def are_stopped() -> bool:
        running = [pid for pid in pids if set(_states(pid)) != {"T"}]
        for pid in running:
            os.kill(pid, signal.SIGSTOP)  # which reaches one thread, and that one tells the others
        return not running

    wait_until(are_stopped)


def _states(pid: int) -> list[str]:
    stats = [entry / "stat" for entry in Path(f"/proc/{pid}/task").iterdir()]
    return [stat.read_text(encoding="ascii").rpartition(")")[2].split()[0] for stat in stats]


def kill_both(first: int, second: int) -> float:
    """Kill two processes that are stopped already, or not; return when.

    The death of one continues the other, which would then see to a successor; so nobody may come in between.
    """
    with contextlib.ExitStack() as stack:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
        stack.callback(os.sched_setscheduler, 0, os.SCHED_OTHER, os.sched_param(0))
        killed = time.monotonic()
        os.kill(first, signal.SIGKILL)
        os.kill(second, signal.SIGKILL)
    return killed


def assert_aborted(victim: Victim, killed: float) -> ChildResult:
    """It ended by SIGABRT within a second, and never went on with what it had asked for."""
    result = victim.end(within=20)
    took = time.monotonic() - killed
    assert result.signal == signal.SIGABRT, f"{result}"
    assert took < DEADLINE_S
    assert "VALUE" not in result.stdout
    assert "WRONG" not in result.stdout
    return result


def die_in_a_fault(start: Start, fault: str, sigabrt: str, where: str, with_faulthandler: bool) -> None:
    """Stop both, let a thread run into the fault, kill both."""
    with start("lifeline.touch", fault, sigabrt, where, with_faulthandler) as victim:
        supervisor, worker, uffd = victim.expect("ready")
        stop(supervisor, worker)
        victim.say()
        victim.await_fault(uffd)
        result = assert_aborted(victim, kill_both(supervisor, worker))
    if with_faulthandler:
        assert "Fatal Python error: Aborted" in result.stderr
        names = [f'"{PROGRAM}", line {number} in touch_in_{fault}' for number in TOUCHED]
        names = [name.replace("touch_in_user", "touch_in_user_code") for name in names]
        assert any(name in result.stderr for name in names), result.stderr


@pytest.mark.parametrize(("fault", "sigabrt", "where", "with_faulthandler"), CHOSEN)
def test_both_killed_in_a_fault(start: Start, fault: str, sigabrt: str, where: str, with_faulthandler: bool) -> None:
    die_in_a_fault(start, fault, sigabrt, where, with_faulthandler)


def test_both_killed_in_a_fault_of_an_unprivileged_user(start: Start) -> None:
    with start("lifeline.touch_unprivileged", "handled") as victim:
        supervisor, worker, uffd = victim.expect("ready")
        stop(supervisor, worker)
        victim.say()
        victim.await_fault(uffd)
        assert "in touch_in_user_code" in assert_aborted(victim, kill_both(supervisor, worker)).stderr


@pytest.mark.soak
def test_both_killed_in_a_fault_for_long(start: Start) -> None:
    for case in itertools.islice(itertools.cycle(EVERYTHING), ROUNDS):
        die_in_a_fault(start, *case)


def kill_back_to_back(start: Start, rng: random.Random, program: str, *args: str) -> bool:
    """Kill both of a running pager, one right after the other. Returns whether that was quick enough to end it.

    If this process loses the processor in between, the second to be killed may already have a successor for the
    first: then the application goes on, and nothing was promised.
    """
    with start(program, *args) as victim:
        supervisor, worker, _ = victim.expect("ready")
        time.sleep(rng.uniform(0, 0.05))  # at any moment of what it does
        order = (supervisor, worker) if rng.random() < 0.5 else (worker, supervisor)
        killed = kill_both(*order)
        while victim.process.poll() is None and time.monotonic() < killed + DEADLINE_S:
            time.sleep(0.001)
        if victim.process.poll() is None:
            assert len(victim.pagers()) == 2, "the application neither ended nor has a pager"
            return False
        assert_aborted(victim, killed)
    return True


@pytest.mark.parametrize(
    "program",
    [("scan",), ("rest", "sleeping"), ("rest", "computing"), ("rest", "listening"), ("rest", "deaf")],
    ids=" ".join,
)
def test_both_killed_back_to_back(start: Start, rng: random.Random, program: tuple[str, ...], soak: bool) -> None:
    rounds = 25 if soak else 3
    ended = sum(kill_back_to_back(start, rng, f"lifeline.{program[0]}", *program[1:]) for _ in range(rounds))
    print(f"{ended} of {rounds} ended")
    assert ended


@pytest.mark.parametrize("how", ["region closed", "pager closed", "memory collected"])
def test_no_region_no_end(start: Start, how: str) -> None:
    with start("lifeline.go_on", how) as victim:
        supervisor, worker, _ = victim.expect("ready")
        victim.expect("ended")
        if how != "pager closed":
            kill_both(supervisor, worker)
            time.sleep(0.05)  # a wrong signal would come within this time
        victim.say()
        assert victim.expect("works") == ["True"]
        assert victim.end().status == 0


def test_a_pager_that_dies_as_a_region_opens_kills_nobody(start: Start) -> None:
    with start("lifeline.open_on_a_dead_pager") as victim:
        assert victim.end().check().stdout.split() == ["refused", "PagerLostError", "works", "True"]


@pytest.mark.parametrize(("how", "status"), [("return", 0), ("exit", 3), ("_exit", 3), ("exception", 1), ("exec", 3)])
def test_an_exit_with_open_regions_is_none_by_signal(start: Start, how: str, status: int) -> None:
    with start("lifeline.leave", how) as victim:
        victim.expect("ready")
        victim.say()
        assert victim.end().status == status


def test_a_forked_child_survives(start: Start) -> None:
    with start("lifeline.fork") as victim:
        lines = {line[0]: line[1:] for line in (victim.line(), victim.line())}
        supervisor, worker, uffd = lines["ready"]
        stop(supervisor, worker)
        victim.say()
        victim.await_fault(uffd)
        killed = kill_both(supervisor, worker)
        assert_aborted(victim, killed)
        victim.expect("survived")
