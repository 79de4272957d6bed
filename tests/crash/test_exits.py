"""However the application ends, nothing of its pager is left within a second."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import random

    from tests.crash.conftest import Start

ENDS = {
    "return": 0,
    "exception": 1,
    "exception in a thread": 0,
    "sys.exit": 0,
    "sys.exit in a thread": 0,
    "os._exit": 0,
    "os._exit in a thread": 3,
    "abort": -signal.SIGABRT,
    "SIGINT": -signal.SIGINT,
    "SIGKILL": -signal.SIGKILL,
    "SIGTERM": -signal.SIGTERM,
    "SIGSEGV": -signal.SIGSEGV,
    "closerange": 0,
}
REMAINS = (
    "exec",
    "exec in a thread",
    "fork, child execs",
    "fork, parent execs",
    "fork, child stays",
    "daemon",
)
AMID = ("slow fault", "hung fault", "fault loop", "system call", "ensure", "prefetch", "opening")
STARTS = 3
"""Ends while a pager starts."""


def holdings(pid: int) -> list[str]:
    """What a process holds of ours: descriptors and mappings."""
    links = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
    maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines()
    held = [link for link in links if any(word in link for word in ("userfault", "socket:", "pidfd"))]
    return held + [line for line in maps if "memfd:userfault" in line]


@pytest.mark.parametrize("stalled", [False, True], ids=["", "a read hangs"])
@pytest.mark.parametrize(("how", "status"), ENDS.items(), ids=ENDS)
def test_nothing_is_left_after_the_end(start: Start, how: str, status: int, stalled: bool) -> None:
    with start("exits.leave", how, stalled) as victim:
        victim.expect("ready")
        assert len(victim.pagers()) == 2
        victim.say()
        assert victim.end(within=10).status == status
        victim.assert_no_pager()
        assert not victim.alive()


@pytest.mark.parametrize("stalled", [False, True], ids=["", "a read hangs"])
@pytest.mark.parametrize("how", REMAINS)
def test_nothing_is_left_when_another_program_goes_on(start: Start, how: str, stalled: bool) -> None:
    with start("exits.leave", how, stalled) as victim:
        victim.expect("ready")
        victim.say()
        (pid,) = victim.expect("stays")
        victim.expect("settled")
        victim.assert_no_pager()
        assert pid in victim.alive(), "what was to stay has ended"
        assert not holdings(pid)


@pytest.mark.parametrize("how", ["store keeps the GIL", "stopped"])
def test_nothing_is_left_when_the_worker_cannot_notice(start: Start, how: str) -> None:
    with start("exits.leave_with_a_deaf_worker") as victim:
        _, worker, _ = victim.expect("ready")
        if how == "stopped":
            os.kill(worker, signal.SIGSTOP)
        victim.process.kill()
        victim.process.wait()
        victim.assert_no_pager(within=3)  # a second, and the second that a worker is given to end by itself


@pytest.mark.parametrize("how", ["return", "SIGKILL"])
@pytest.mark.parametrize("what", AMID)
def test_nothing_is_left_of_what_was_under_way(start: Start, what: str, how: str) -> None:
    with start("exits.leave_amid", what, how) as victim:
        _, _, uffd = victim.expect("ready")
        if what in ("slow fault", "hung fault", "fault loop", "system call"):
            victim.await_fault(uffd)
        victim.say()
        assert victim.end(within=10).status == ENDS[how]
        victim.assert_no_pager()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("interrupted", [False, True], ids=["", "interrupted"])
@pytest.mark.parametrize("way", ["touch", "write"])
def test_a_hung_main_thread_can_be_ended(start: Start, way: str, interrupted: bool, number: signal.Signals) -> None:
    with start("exits.hang_with_the_gil", way) as victim:
        _, _, uffd = victim.expect("ready")
        victim.await_fault(uffd)
        if interrupted:  # in a system call it spins from now on
            os.kill(victim.pid, signal.SIGINT)
        os.kill(victim.pid, number)
        assert victim.end(within=5).status == -number
        victim.assert_no_pager()


@pytest.mark.parametrize("how", ["os._exit", "SIGKILL", "exec"])
def test_nothing_is_left_of_a_pager_that_starts(start: Start, how: str, rng: random.Random, soak: bool) -> None:
    for _ in range(STARTS * (20 if soak else 1)):
        with start("exits.start_pagers", how, rng.uniform(0, 200)) as victim:
            victim.expect("ready")
            victim.say()
            if how == "exec":
                victim.expect("stays")
                victim.expect("settled")
            else:
                assert victim.end(within=10).status == ENDS[how]
            victim.assert_no_pager()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("globals", []),
        ("cycle", []),
        ("touch in atexit", ["right"]),
        ("close in atexit", []),
        ("open in atexit", ["right"]),
        ("touch in a finalizer", ["right"]),
        ("touch in __del__", ["right"]),
        ("ask in __del__", ["refused"]),
        ("open in __del__", ["refused"]),
        ("close in __del__", []),
    ],
)
def test_regions_at_the_end_of_the_interpreter(start: Start, how: str, said: list[str]) -> None:
    with start("exits.finalize", how) as victim:
        victim.expect("ready")
        victim.say()
        result = victim.end(within=10).check()
        assert not result.stderr
        assert result.stdout.split()[1:] == said
        victim.assert_no_pager()


@pytest.mark.parametrize("closed", ["0", "12", "012"])
def test_standard_streams_may_be_closed(start: Start, closed: str) -> None:
    with start("exits.without_streams", closed) as victim:
        assert victim.expect("right") == ["True"]
        victim.end().check()
        victim.assert_no_pager()
