"""Arrays in several processes: what is sent arrives, what is inherited can be opened, and no byte is ever wrong."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.integration import arrays_programs as programs

from userfault.testing import run_child

METHODS = ["fork", "forkserver", "spawn"]
MARK = "USERFAULT_TEST_MARK"
ARRIVED = ("PagedArray", True)
"""As an array over a region of the receiving process, and with the right bytes."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("processes") / "rows.npy"
    np.save(path, programs.ROWS)
    return str(path)


def run(program: Callable[..., Any], *args: str) -> Any:
    """Run a program in a process of its own; nothing that it has started may be left."""
    mark = uuid.uuid4().hex
    value = run_child(program, *args, timeout=90, env={MARK: mark}).check().value
    deadline = time.monotonic() + 20
    while left := [name for name in os.listdir("/proc") if name.isdigit() and bears(name, mark)]:
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.005)
    return value


def bears(pid: str, mark: str) -> bool:
    try:
        return f"{MARK}={mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # it has just gone, or is somebody else's
        return False


@pytest.mark.parametrize("method", METHODS)
def test_slices_go_to_a_pool_and_come_back(method: str, path: str) -> None:
    seen = run(programs.pool, path, method)

    assert seen["each"] == {ARRIVED}
    assert seen["many"] == (True, 1)
    assert seen["back"] == [ARRIVED] * 2
    assert seen["faults"] == 0  # nobody read the bytes here in order to send them


@pytest.mark.parametrize("method", METHODS)
def test_an_argument_of_a_process(method: str, path: str) -> None:
    assert run(programs.argument, path, method) == (ARRIVED, 1, ARRIVED)


@pytest.mark.parametrize("method", METHODS)
def test_a_queue(method: str, path: str) -> None:
    assert run(programs.queue, path, method) == [ARRIVED] * 20


@pytest.mark.parametrize("method", METHODS)
def test_an_executor(method: str, path: str) -> None:
    assert run(programs.executor, path, method) == ({ARRIVED}, ARRIVED)


@pytest.mark.parametrize("method", METHODS)
def test_changes_are_not_lost_on_the_way(method: str, path: str) -> None:
    before, untouched, after, ours = run(programs.changed, path, method)

    assert before == ("PagedArray", programs.ROWS[3, 3], 77)
    assert untouched
    assert after == ("ndarray", -1, 77)
    assert ours == -1


@pytest.mark.parametrize("method", METHODS)
def test_a_loader(method: str, path: str) -> None:
    assert run(programs.load, path, method) == (True, 1)


def test_a_forked_child(path: str) -> None:
    seen = run(programs.forked, path)

    assert seen["recipe"] == seen["shared"] == seen["sent"] == ARRIVED
    assert seen["memory"] == b"bcab"
    assert seen["region"] == b"\x93NUMPY\x01\x00"
    assert seen["region sent"]
    for name in ("private", "private sent", "private region"):
        assert seen[name].startswith("RegionClosedError: the region belongs to process "), name
    assert seen["closing"] == [0, 0, 0, 0]
    assert seen["parent"] == [ARRIVED] * 3


def test_a_child_that_is_forked_while_a_recipe_is_opened(path: str) -> None:
    assert run(programs.fork_while_shared, path) == (ARRIVED, True)


def test_forks_while_threads_open_and_close(path: str) -> None:
    assert run(programs.forks_and_threads, path) == [ARRIVED] * 10


def test_a_recipe_is_opened_after_its_pager_was_lost(path: str) -> None:
    assert run(programs.open_after_a_loss, path) == (True, True)
