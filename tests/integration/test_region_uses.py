"""Samples of use: what is popular is found to be, nothing is lost by the look, and it stops where it cannot be had."""

from __future__ import annotations

import math
import threading
from random import Random

import pytest

from userfault import EvictionPolicy, Region
from userfault.testing import PatternStore, run_child

pytestmark = pytest.mark.usefixtures("default_pager")

PAGE = 4096
BLOCKS = 8000
STORE = PatternStore(BLOCKS * PAGE, concurrency=0)
EXPECTED = STORE.expected(0, STORE.size)


def touch(region: Region, steps: int, seed: int) -> int:
    """Read popular blocks and others in turn; return how many faults that took."""
    random, before = Random(seed), region.stats().faults
    with region.memory as memory:
        for step in range(steps):
            block = random.randrange(500) if step % 2 else random.randrange(500, BLOCKS)
            at = block * PAGE + 77
            assert memory[at : at + 8] == EXPECTED[at : at + 8]
    return region.stats().faults - before


def test_what_is_popular_is_found_and_kept() -> None:
    faults = {}
    for policy in ("clock", "fifo"):
        with Region(STORE, block_size=PAGE, budget=2000 * PAGE, policy=policy) as region:
            touch(region, 20_000, 1)
            faults[policy] = touch(region, 20_000, 2)
    assert faults["clock"] < 0.95 * faults["fifo"], "clock is fifo, but for what it is told of use"


@pytest.mark.parametrize("mode", ["r", "c"])
def test_while_samples_are_taken_regions_come_and_go_and_are_right(mode: str) -> None:
    over = threading.Event()

    def come_and_go() -> None:
        random = Random(5)
        while not over.is_set():
            with Region(STORE, mode, PAGE, budget=100 * PAGE) as region, region.memory as memory:
                for _ in range(1000):
                    at = random.randrange(STORE.size - 8)
                    assert memory[at : at + 8] == EXPECTED[at : at + 8]

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        with Region(STORE, mode, PAGE, budget=2000 * PAGE) as region:
            touch(region, 20_000, 3)
    finally:
        over.set()
        thread.join(60)


def test_memory_that_is_locked_is_not_sampled_and_right() -> None:
    run_child(
        """
import ctypes, userfault
from random import Random
from userfault.testing import PatternStore
store = PatternStore(1000 * 4096, concurrency=0)
expected = store.expected(0, store.size)
with userfault.Region(store, block_size=4096, budget=200 * 4096) as region, region.memory as memory:
    libc = ctypes.CDLL(None, use_errno=True)
    MLOCK_ONFAULT = 1
    assert not libc.mlock2(ctypes.c_void_p(region.address), ctypes.c_size_t(store.size), MLOCK_ONFAULT)
    random = Random(1)
    for _ in range(20_000):
        at = random.randrange(store.size - 8)
        assert memory[at : at + 8] == expected[at : at + 8]
    assert region.stats().resident_bytes <= 200 * 4096
""",
        timeout=40,
    ).check()


def test_a_policy_may_say_that_it_does_not_ask() -> None:
    class Quiet(EvictionPolicy):
        asks = False

        def admit(self, block: int) -> None: ...

        def victim(self, used: object) -> int:
            return 0

        def remove(self, block: int) -> None: ...

    assert not Quiet().asks
    assert EvictionPolicy.asks
    with Region(STORE, block_size=PAGE, budget=math.inf) as region:
        touch(region, 100, 1)
