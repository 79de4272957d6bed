"""Signals during a fault: nothing is lost, others are served, and Ctrl-C works as soon as the fault is over."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.crash.conftest import Start

MOST_DUPLICATES = 3000
"""Messages a second, of all threads together, that a worker may handle in vain."""
BLOCKS, READ_MS = 12, 50


@pytest.mark.parametrize(
    ("way", "spinners", "block_size"),
    [
        ("preadv", 1, 4096),
        ("preadv", 1, 65536),
        ("write", 1, 65536),
        ("touch", 1, 4096),
        ("preadv", 3, 4096),
        ("write", 3, 4096),
    ],
)
def test_alarms_during_slow_faults(start: Start, way: str, spinners: int, block_size: int) -> None:
    with start("signals.alarms", way, spinners, block_size) as victim:
        assert victim.expect("right") == ["True", "True", 0]
        took, median, worst, duplicates, count = victim.expect("times")
        victim.end().check()
    print(f"{took} ms; others: {count} faults, median {median} ms, worst {worst} ms; {duplicates} duplicates/s")
    assert took < 5 * BLOCKS * READ_MS
    if way != "touch":  # which keeps the GIL: no other thread runs
        assert count > 10
        assert median < 20
        assert worst < 500
    assert duplicates < MOST_DUPLICATES


@pytest.mark.parametrize("way", ["touch", "write", "ensure"])
def test_ctrl_c_ends_a_thread_that_is_stopped_in_a_fault(start: Start, way: str) -> None:
    with start("signals.interrupted", way) as victim:
        _, _, uffd = victim.expect("ready")
        victim.say()
        if way != "ensure":
            victim.await_fault(uffd)
        sent = time.monotonic()
        if way == "ensure":
            time.sleep(0.1)  # it waits for an answer, which nothing outside can see
        os.kill(victim.pid, signal.SIGINT)
        victim.expect("interrupted")
        took = time.monotonic() - sent
        assert victim.expect("right") == ["True"]
        victim.end().check()
    assert took < 0.5 + 0.4, "the fault takes half a second"
