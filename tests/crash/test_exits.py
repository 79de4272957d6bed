"""However the application ends, nothing of its pager is left within a second."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.crash.conftest import Start

ENDS = {
    "return": 0,
    "exception": 1,
    "sys.exit": 0,
    "os._exit": 0,
    "abort": -signal.SIGABRT,
    "SIGKILL": -signal.SIGKILL,
    "SIGTERM": -signal.SIGTERM,
    "SIGSEGV": -signal.SIGSEGV,
    "closerange": 0,
}
REMAINS = ("exec", "fork, child execs", "fork, parent execs", "fork, child stays")


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
