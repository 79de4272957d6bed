"""A forked child has no part in its parent's regions, and cannot harm them; it can have its own."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.crash.conftest import Start


@pytest.mark.parametrize("resident", [False, True], ids=["cold", "resident"])
@pytest.mark.parametrize("how", ["memoryview", "bytes", "write", "address", "array"])
def test_a_touch_in_a_child_is_a_sigsegv(start: Start, how: str, resident: bool) -> None:
    with start("forks.touch_in_child", how, resident) as victim:
        assert victim.expect("child") == [-signal.SIGSEGV]
        assert victim.expect("parent") == ["True"]
        assert "VALUE" not in victim.end().check().stdout


def test_methods_in_a_child_say_that_the_region_is_closed(start: Start) -> None:
    with start("forks.call_in_child") as victim:
        victim.expect("ready")
        for _ in range(10):
            name, outcome = victim.line()
            assert outcome == "RegionClosedError", name
        assert victim.expect("closed") == ["True", "True", "True"]
        assert victim.expect("child") == [0]
        assert victim.expect("parent") == ["True"]
        victim.end().check()


def test_children_open_regions_of_their_own(start: Start) -> None:
    with start("forks.open_in_child") as victim:
        assert victim.expect("child") == [0]
        assert victim.expect("parent") == ["True"]
        victim.end().check()


@pytest.mark.parametrize("drop", [False, True], ids=["objects alive", "objects dropped"])
def test_a_child_may_use_the_addresses(start: Start, drop: bool) -> None:
    with start("forks.use_their_addresses", drop) as victim:
        victim.expect("intact")
        assert victim.expect("child") == [0]
        assert victim.expect("parent") == ["True"]
        assert not victim.end().check().stderr


def test_a_child_exits_the_long_way(start: Start) -> None:
    with start("forks.exit_the_long_way") as victim:
        assert victim.expect("exit") == [0]
        assert victim.expect("parent") == ["True", 2, "True", "True"]
        victim.end().check()


def test_a_child_leaves_the_pins_alone(start: Start) -> None:
    with start("forks.fork_in_pinned") as victim:
        assert victim.expect("child") == [0]
        assert victim.expect("pinned") == ["True", 0]
        assert victim.expect("parent") == [0, "True"]
        victim.end().check()


def test_a_child_keeps_no_memory_of_a_closed_region(start: Start) -> None:
    with start("forks.outlive_parent") as victim:
        lines = {line[0]: line[1:] for line in (victim.line(), victim.line())}
        (pid,) = lines["stays"]
        assert "memfd:userfault" not in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")
        victim.say()
        victim.end().check()


def test_forking_while_threads_fault(start: Start, soak: bool) -> None:
    with start("forks.storm", 400 if soak else 40, limit=120.0) as victim:
        assert victim.expect("storm") == [0, 0, 0]
        victim.end().check()


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_multiprocessing(start: Start, method: str) -> None:
    with start("forks.pool", method) as victim:
        assert victim.expect("pool") == ["True"]
        assert victim.expect("parent") == ["True", 0]
        victim.end().check()


@pytest.mark.parametrize("kill_every", [0.0, 0.2], ids=["", "workers are killed"])
def test_forking_while_regions_come_and_go(start: Start, kill_every: float, soak: bool) -> None:
    with start("storms.forks", 300 if soak else 8, kill_every, limit=120.0) as victim:
        assert victim.expect("storm") == [0, 0, "True", "True"]
        victim.end().check()


def test_forking_in_two_threads_while_pagers_start(start: Start, soak: bool) -> None:
    number = 100 if soak else 4
    with start("storms.forks_in_threads", number, limit=120.0) as victim:
        assert victim.expect("storm") == [0, 0, 2 * number]
        victim.end().check()


def test_other_programs_inherit_nothing(start: Start, soak: bool) -> None:
    with start("storms.programs", 300 if soak else 9, limit=120.0) as victim:
        assert victim.expect("programs") == [0, 0]
        victim.end().check()


def test_a_fork_that_python_knows_nothing_of(start: Start) -> None:
    with start("storms.behind_pythons_back") as victim:
        (pid,) = victim.expect("stays")
        victim.say()
        assert victim.expect("parent") == ["True"]
        victim.end().check()
        victim.assert_no_pager()
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)], ids=str)
def test_generations_end_in_any_order(start: Start, order: tuple[int, ...]) -> None:
    with start("storms.family") as victim:
        members = {}
        for _ in range(3):
            number, *pids = victim.expect("ready")
            members[number] = pids
        for number in order:
            pid, *pagers = members.pop(number)
            os.kill(pid, signal.SIGKILL)
            if pid == victim.pid:
                victim.process.wait()
            victim.wait_until(lambda gone=pagers: not set(gone) & set(victim.pagers()), "a pager is left behind", 1.0)  # type: ignore[misc]  # bound
            for left, (other, *its_pagers) in members.items():
                assert set(its_pagers) <= set(victim.pagers())
                os.kill(other, signal.SIGUSR1)
                assert victim.expect("right") == [left, "True"]
        victim.assert_no_pager()


@pytest.mark.parametrize("how", ["close", "drop"])
def test_a_child_closes_what_it_inherited(start: Start, how: str) -> None:
    with start("storms.inherit_and_close", how) as victim:
        assert victim.expect("child") == [0]
        assert victim.expect("parent") == ["True", "True", 0]
        assert not victim.end().check().stderr


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_loader_whose_workers_are_killed(start: Start, method: str, tmp_path: Path, soak: bool) -> None:
    with start("storms.loader", str(tmp_path / "rows.npy"), method, 40 if soak else 2, limit=120.0) as victim:
        assert victim.expect("loader") == [0, "True"]
        victim.end().check()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_executors_whose_processes_die(start: Start, method: str, tmp_path: Path) -> None:
    with start("storms.executors", str(tmp_path / "rows.npy"), method) as victim:
        assert victim.expect("executors") == ["True", 2, 0, "True"]
        victim.end().check()
