"""A forked child has no part in its parent's regions, and cannot harm them; it can have its own."""

from __future__ import annotations

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
