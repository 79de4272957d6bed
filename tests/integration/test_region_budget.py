"""A budget is kept, oldest clean blocks first; what is private or pinned stays, and a fault always goes on."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest
from tests.integration.regions import await_true, resident

from userfault import BlockState, FileStore, MemoryStore, Region, Store
from userfault.testing import PatternStore, SlowStore, run_child

pytestmark = pytest.mark.usefixtures("default_pager")

PAGE = 4096
BLOCKS = 200
SIZE = BLOCKS * PAGE - 77
PATTERN = PatternStore(SIZE)
EXPECTED = PATTERN.expected(0, SIZE)


def file_store(folder: Path) -> Store:
    (folder / "data").write_bytes(EXPECTED)
    return FileStore(folder / "data")


STORES: dict[str, Callable[[Path], Store]] = {
    "memory": lambda _: MemoryStore(EXPECTED),
    "file": file_store,
    "inline": lambda _: PatternStore(SIZE, concurrency=0),
    "pool": lambda _: PATTERN,
    "slow": lambda _: SlowStore(PATTERN, 0.0005),
}


@pytest.mark.parametrize("blocks", [1, 2, 3, 16, 150])
@pytest.mark.parametrize("kind", STORES)
def test_an_explicit_budget_is_kept(kind: str, blocks: int, tmp_path: Path) -> None:
    most = max(blocks, 4)  # one instruction may need four
    with Region(STORES[kind](tmp_path), block_size=PAGE, budget=blocks * PAGE) as region, region.memory as memory:
        assert region.budget == blocks * PAGE
        for at in range(0, SIZE, PAGE):
            assert memory[at + 5] == EXPECTED[at + 5]
            assert len(resident(region)) <= most + 1, "one may be on its way"
        await_true(lambda: BlockState.FILLING not in region.residency())
        assert len(resident(region)) <= most
        stats = region.stats()
        assert stats.resident_bytes <= most * PAGE
        assert stats.evictions >= BLOCKS - most


@pytest.mark.parametrize("kind", ["memory", "pool"])
def test_the_oldest_go_first(kind: str, tmp_path: Path) -> None:
    with Region(STORES[kind](tmp_path), block_size=PAGE, budget=16 * PAGE) as region, region.memory as memory:
        for at in range(100):
            memory[at * PAGE]
        await_true(lambda: BlockState.FILLING not in region.residency())
        left = resident(region)
        assert left == list(range(left[0], 100)), "the youngest are left, without a gap"


def test_without_limit_everything_stays() -> None:
    with Region(PATTERN, block_size=PAGE, budget=math.inf) as region:
        assert region.budget is None
        region.ensure()
        assert len(resident(region)) == BLOCKS
        assert region.stats().evictions == 0


@pytest.mark.parametrize("budget", ["64KiB", 65536, 65537, 69000])
def test_more_than_the_budget_cannot_be_ensured(budget: int | str) -> None:
    with Region(PATTERN, block_size=PAGE, budget=budget) as region:
        for offset, length in ((0, None), (0, 17 * PAGE), (PAGE - 1, 15 * PAGE + 2)):
            with pytest.raises(ValueError, match="more than the budget of 6") as caught:
                region.ensure(offset, length)
            assert "larger budget=" in str(caught.value)
        assert not any(region.residency()), "nothing was begun"
        region.ensure(0, 16 * PAGE)
        region.ensure(100 * PAGE, 16 * PAGE)
        assert resident(region)[-16:] == list(range(100, 116))


def test_pins_together_are_held_to_the_budget() -> None:
    with Region(PATTERN, block_size=PAGE, budget=16 * PAGE) as region:
        with region.pinned(0, 10 * PAGE), region.pinned(5 * PAGE, 10 * PAGE):
            assert region.stats().pinned_bytes == 15 * PAGE
            with pytest.raises(ValueError, match="17 blocks would be pinned at once, and the budget holds 16"):
                region.ensure(20 * PAGE, 2 * PAGE)
            with region.pinned(20 * PAGE, PAGE) as view:
                assert view == EXPECTED[20 * PAGE : 21 * PAGE]
        assert region.stats().pinned_bytes == 0
        region.ensure(100 * PAGE, 16 * PAGE)


def test_a_prefetch_takes_no_more_than_the_budget() -> None:
    with Region(PATTERN, block_size=PAGE, budget=16 * PAGE) as region:
        region.prefetch(wait=True)
        assert resident(region) == list(range(16))
        assert region.stats().evictions == 0


@pytest.mark.parametrize("mode", ["r", "c"])
def test_pinned_blocks_outlast_any_pressure(mode: str) -> None:
    with Region(PatternStore(SIZE, concurrency=0), mode, PAGE, budget=8 * PAGE) as region, region.memory as memory:
        with region.pinned(50 * PAGE, 8 * PAGE) as view:  # all of the budget
            for at in range(0, SIZE, PAGE):
                assert memory[at] == EXPECTED[at]
            states = region.residency()
            assert set(states[50:58]) == {BlockState.CLEAN}
            assert view == EXPECTED[50 * PAGE : 58 * PAGE]
        for at in range(0, SIZE, PAGE):
            memory[at]
        await_true(lambda: len(resident(region)) <= 9)


def test_private_blocks_outlast_any_pressure_and_count() -> None:
    with Region(PATTERN, "c", PAGE, budget=8 * PAGE) as region, region.memory as memory:
        changed = bytearray(EXPECTED)
        for at in range(0, SIZE, 3 * PAGE):  # 67 blocks, eight times the budget
            memory[at] = changed[at] = at // PAGE % 256
        for _ in range(2):
            for at in range(0, SIZE, PAGE):
                assert memory[at + 1] == changed[at + 1]
        assert bytes(memory) == changed
        private = [block for block, state in enumerate(region.residency()) if state == BlockState.PRIVATE]
        assert private == list(range(0, BLOCKS, 3))
        await_true(lambda: region.stats().private_bytes == 67 * PAGE)
        await_true(lambda: region.stats().resident_bytes <= (67 + 4) * PAGE)
        region.evict()
        assert resident(region) == private


def test_threads_on_a_tiny_budget_all_go_on() -> None:
    """More threads than blocks: each takes what another needs, and all come through."""
    with Region(PATTERN, block_size=PAGE, budget=2 * PAGE) as region, region.memory as memory:

        def read(seed: int) -> None:
            random = Random(seed)
            for _ in range(150):
                at = random.randrange(SIZE - 10_000)
                assert memory[at : at + 10_000] == EXPECTED[at : at + 10_000]  # three or four blocks at a time

        with ThreadPoolExecutor(8) as threads:
            for job in [threads.submit(read, seed) for seed in range(8)]:
                job.result(60)


def test_a_system_call_that_needs_more_than_the_budget_goes_on(tmp_path: Path) -> None:
    """write(2) and read(2) touch 49 blocks in one call, and the budget holds one."""
    run_child(
        """
import os, tempfile, userfault
from userfault.testing import PatternStore
size = 200_000
for concurrency in (0, 4):
    store = PatternStore(size, concurrency=concurrency)
    expected = store.expected(0, size)
    with userfault.Region(store, "c", 4096, budget=4096) as region, region.memory as memory:
        with tempfile.TemporaryFile() as file:
            assert os.pwrite(file.fileno(), memory, 0) == size
            assert os.pread(file.fileno(), size, 0) == expected
            os.pwrite(file.fileno(), expected[::-1], 0)
            assert os.preadv(file.fileno(), [memory], 0) == size
            assert memory == expected[::-1]
""",
        timeout=40,
    ).check()


ACROSS = """
import userfault
from userfault.testing import PatternStore, poke, touch
PAGE, SIZE = 4096, 40 * 4096
store = PatternStore(SIZE, concurrency=args[0])
expected = store.expected(0, SIZE)

def read_across(region):
    for at in range(PAGE, SIZE, PAGE):
        for length in (8, 16, 32):  # one load instruction each
            assert touch(region.address + at - length // 2, length) == expected[at - length // 2 : at + length // 2]
"""


@pytest.mark.parametrize("concurrency", [0, 8], ids=["inline", "pool"])
@pytest.mark.parametrize(
    "body",
    [
        "with userfault.Region(store, 'r', PAGE, PAGE) as region: read_across(region)",
        "with userfault.Region(store, 'r', PAGE, 4 * PAGE) as region, region.pinned(0, 4 * PAGE): read_across(region)",
        """
with userfault.Region(store, "c", PAGE, 2 * PAGE) as region:
    for at in range(0, 20 * PAGE, PAGE):
        poke(region.address + at + 100, expected[at + 100 : at + 101])
    read_across(region)
    for at in range(PAGE, SIZE, PAGE):
        poke(region.address + at - 8, expected[at - 8 : at + 8])
    read_across(region)
""",
    ],
    ids=["one block", "all pinned", "all private"],
)
def test_an_access_across_a_block_boundary_goes_on(body: str, concurrency: int) -> None:
    """One instruction may need two blocks at once: to drop one for the other, in turn, would never end."""
    run_child(ACROSS + body, concurrency, timeout=20).check()


@pytest.mark.parametrize("block_size", [PAGE, 16 * PAGE, 512 * PAGE])
def test_a_budget_of_one_block(block_size: int) -> None:
    run_child(
        """
import userfault
from userfault.testing import PatternStore
block_size, = args
store = PatternStore(200 * 4096 - 77, concurrency=0)
with userfault.Region(store, "r", block_size, block_size) as region, region.memory as memory:
    assert bytes(memory) == store.expected(0, store.size)
    region.ensure(0, 1)
    assert region.stats().resident_bytes <= 8 * block_size
""",
        block_size,
        timeout=20,
    ).check()
