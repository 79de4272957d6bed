"""Budgets that change, budgets that regions share, what is dropped first, and who decides."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest
from tests.integration.policies import Broken, NewestFirst, Unborn
from tests.integration.regions import await_true, resident

import userfault
from userfault import FileStore, MemoryStore, Pager, Region, Store, StoreError
from userfault.testing import PatternStore, SlowStore, run_child

pytestmark = pytest.mark.usefixtures("default_pager")

PAGE = 4096
BLOCKS = 400
SIZE = BLOCKS * PAGE
PATTERN = PatternStore(SIZE)
EXPECTED = PATTERN.expected(0, SIZE)


@pytest.fixture
def pager() -> Iterator[Pager]:
    with Pager(budget="2MiB") as pager:
        yield pager


def budget_of(region: Region) -> int | None:
    return region.budget


def read_all(region: Region) -> None:
    with region.memory as memory:
        for at in range(0, region.size, PAGE):
            assert memory[at + 3] == EXPECTED[at + 3]


# -- a budget that changes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_budget_may_be_changed_at_any_time(mode: str, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(EXPECTED)
    with Region(FileStore(tmp_path / "data", writable=True), mode, PAGE, budget=math.inf) as region:
        read_all(region)
        if mode == "r+":
            with region.memory as memory:
                memory[: 100 * PAGE] = bytes(100 * PAGE)
        assert len(resident(region)) == BLOCKS
        region.budget = 64 * PAGE
        assert region.budget == 64 * PAGE
        await_true(lambda: len(resident(region)) <= 64 or (mode == "r+" and len(resident(region)) <= 100))
        with region.memory as memory:
            assert memory[200 * PAGE :] == EXPECTED[200 * PAGE :]
        await_true(lambda: region.stats().resident_bytes <= 64 * PAGE)
        with pytest.raises(ValueError, match="budget of 262144 bytes holds at once"):
            region.ensure(0, 65 * PAGE)
        region.budget = "1MiB"
        with region.pinned(0, 256 * PAGE):  # without a pin, some may be dropped again, down to the low watermark
            assert len(resident(region)) >= 256
        region.budget = None
        assert (budget_of(region) or 0) > 1 << 20
        region.budget = math.inf
        assert budget_of(region) is None
        for wrong, error in ((0, ValueError), ("many", ValueError), (1.5, TypeError)):
            with pytest.raises(error, match="budget"):
                region.budget = wrong
        assert budget_of(region) is None


def test_a_new_worker_knows_of_the_change() -> None:
    with Pager() as pager, Region(PATTERN, block_size=PAGE, budget=math.inf, pager=pager) as region:
        region.budget = 32 * PAGE
        os.kill(pager.worker_pid, 9)
        read_all(region)
        await_true(lambda: region.stats().resident_bytes <= 32 * PAGE)


# -- a budget for all --------------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[], Store]] = {
    "memory": lambda: MemoryStore(EXPECTED),
    "inline": lambda: PatternStore(SIZE, concurrency=0),
    "pool": lambda: PATTERN,
    "slow": lambda: SlowStore(PATTERN, 0.0005),
}


@pytest.mark.parametrize("kind", KINDS)
def test_regions_share_their_pagers_budget(kind: str, pager: Pager) -> None:
    regions = [Region(KINDS[kind](), block_size=PAGE, budget=math.inf, pager=pager) for _ in range(4)]
    for _ in range(2):
        for region in regions:
            read_all(region)
            total = sum(region.stats().resident_bytes for region in regions)
            assert total <= (2 << 20) + 8 * PAGE
    assert total > 3 << 19, "and it is used"
    for region in regions:
        region.close()
    with Region(PATTERN, block_size=PAGE, pager=pager) as last:
        last.prefetch(wait=True)
        assert len(resident(last)) == BLOCKS, "what the others had is free again"


def test_a_scan_takes_no_more_than_its_part_from_the_others(pager: Pager) -> None:
    """Two that fit keep what they have; the one that does not takes from itself."""
    small = [Region(PATTERN, block_size=PAGE, pager=pager) for _ in range(2)]
    for region in small:
        region.ensure(0, 60 * PAGE)
    with Region(PatternStore(16 << 20, concurrency=0), block_size=PAGE, pager=pager) as large, large.memory as memory:
        for at in range(0, 16 << 20, PAGE):
            memory[at]
        assert large.stats().resident_bytes <= 2 << 20
        for region in small:
            assert len(resident(region)) >= 60
            region.close()


def test_what_one_has_and_does_not_need_goes_to_another(pager: Pager) -> None:
    with (
        Region(PATTERN, block_size=PAGE, pager=pager) as one,
        Region(PATTERN, block_size=PAGE, pager=pager) as two,
        Region(PATTERN, block_size=PAGE, pager=pager) as three,
    ):
        for region in (one, two, three):
            region.prefetch(wait=True)
        sizes = [region.stats().resident_bytes for region in (one, two, three)]
        assert sum(sizes) <= (2 << 20) + 8 * PAGE
        assert min(sizes) > 2 << 17, "the last got its part, though the first two had it all"


def test_dirty_blocks_of_another_are_written_back_for_one_that_wants_room(pager: Pager, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(2 << 20))
    store = FileStore(tmp_path / "data", writable=True)
    with Region(store, "r+", PAGE, math.inf, pager) as writer, Region(PATTERN, block_size=PAGE, pager=pager) as reader:
        with writer.memory as memory:
            memory[:] = b"w" * (2 << 20)
        read_all(reader)
        assert writer.stats().resident_bytes + reader.stats().resident_bytes <= (2 << 20) + 8 * PAGE
        with writer.memory as memory:
            assert memory == b"w" * (2 << 20)
    assert (tmp_path / "data").read_bytes() == b"w" * (2 << 20)


def test_a_pagers_budget_may_be_changed(pager: Pager) -> None:
    regions = [Region(PATTERN, block_size=PAGE, budget=math.inf, pager=pager) for _ in range(2)]
    for region in regions:
        region.ensure(0, 250 * PAGE)
    pager.budget = 2 << 20
    assert pager.budget == 2 << 20
    for region in regions:
        region.budget = "1MiB"
    pager.budget = math.inf
    assert pager.budget is None
    for region in regions:
        region.budget = math.inf
        region.prefetch(wait=True)
        assert len(resident(region)) == BLOCKS
    pager.budget = "2MiB"
    await_true(lambda: sum(region.stats().resident_bytes for region in regions) <= 2 << 20)
    os.kill(pager.worker_pid, 9)
    for region in regions:
        read_all(region)
    assert sum(region.stats().resident_bytes for region in regions) <= (2 << 20) + 8 * PAGE
    with pytest.raises(ValueError, match="budget must hold at least one block of 2097152 bytes, got 5"):
        pager.budget = 5
    for region in regions:
        region.close()


def test_an_automatic_budget_is_for_regions_with_an_automatic_one() -> None:
    with Pager() as pager:
        assert pager.budget is not None
        with Region(PATTERN, block_size=PAGE, budget=SIZE, pager=pager) as mine:
            mine.prefetch(wait=True)
            assert len(resident(mine)) == BLOCKS
        assert userfault.default_pager().budget is not None
    with Pager(budget=math.inf) as pager:
        assert pager.budget is None


def test_nothing_larger_than_the_pagers_budget_can_be_pinned(pager: Pager) -> None:
    store = PatternStore(4 << 20)
    with Region(store, block_size=PAGE, budget=math.inf, pager=pager) as region:
        with pytest.raises(ValueError, match="holds at once"):
            region.ensure(0, (2 << 20) + PAGE)
        region.ensure(0, 2 << 20)


# -- who goes first ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["s3fifo", "clock", "fifo", "random", NewestFirst()])
def test_whatever_the_policy_the_bytes_are_right(policy: str | userfault.EvictionPolicy) -> None:
    with Region(PATTERN, block_size=PAGE, budget=64 * PAGE, policy=policy) as region, region.memory as memory:
        assert region.policy is policy

        def read(seed: int) -> None:
            random = Random(seed)
            for _ in range(400):
                at = random.randrange(SIZE - 100)
                assert memory[at : at + 100] == EXPECTED[at : at + 100]

        with ThreadPoolExecutor(4) as threads:
            for job in [threads.submit(read, seed) for seed in range(4)]:
                job.result(60)
        stats = region.stats()
        assert stats.resident_bytes <= 64 * PAGE
        assert stats.refaults > 500
        assert stats.evictions >= stats.refaults
        assert stats.blocks_filled >= stats.refaults + BLOCKS // 2


def test_a_policy_of_ones_own_decides() -> None:
    with Region(PATTERN, block_size=PAGE, budget=100 * PAGE, policy=NewestFirst()) as region:
        read_all(region)
        assert resident(region)[:60] == list(range(60)), "the oldest are still there"


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("raises", "ZeroDivisionError: no victim today"),
        ("invents", "it names block 1099511627776, which it does not have"),
        ("answers text", "it names block 'x', which it does not have"),
    ],
)
def test_a_policy_that_misbehaves_is_replaced(how: str, why: str) -> None:
    child = run_child(
        """
import math, userfault
from tests.integration.policies import Broken
from userfault.testing import PatternStore
store = PatternStore(400 * 4096)
expected = store.expected(0, store.size)
with userfault.Region(store, block_size=4096, budget=64 * 4096, policy=Broken(args[0])) as region:
    for _ in range(2):
        assert bytes(region.memory) == expected
    assert region.stats().resident_bytes <= 64 * 4096
""",
        how,
        timeout=40,
    )
    child.check()
    assert child.stderr.count("the eviction policy Broken is replaced by fifo: ") == 1
    assert why in child.stderr


@pytest.mark.parametrize("how", ["dies", "dies on arrival", "hangs"])
def test_a_policy_that_ends_the_worker_does_so_once(how: str) -> None:
    with (
        Pager() as pager,
        Region(PATTERN, block_size=PAGE, budget=64 * PAGE, pager=pager, policy=Broken(how)) as region,
    ):
        for _ in range(2):
            read_all(region)
        assert region.stats().resident_bytes <= 64 * PAGE


def test_a_policy_that_cannot_travel_is_refused() -> None:
    with pytest.raises(StoreError, match=r"the pager could not make the eviction policy; .*not in this process"):
        Region(PATTERN, policy=Unborn())
    with pytest.raises(ValueError, match=r"policy must be one of .*, got 'lru'"):
        Region(PATTERN, policy="lru")
    with pytest.raises(TypeError, match="policy must be a name or an EvictionPolicy, not ABCMeta"):
        Region(PATTERN, policy=NewestFirst)  # type: ignore[arg-type]


def test_a_sequential_range_leaves_the_rest_alone() -> None:
    with Region(PatternStore(SIZE, concurrency=0), block_size=PAGE, budget=128 * PAGE, policy="fifo") as region:
        region.ensure(0, 60 * PAGE)
        region.advise("sequential", 100 * PAGE)
        with region.memory as memory:
            for at in range(100, BLOCKS):
                memory[at * PAGE]
            assert set(range(60)) <= set(resident(region)), "fifo alone would have dropped them"
            region.advise("random", 200 * PAGE, 100 * PAGE)
            for at in range(100, BLOCKS):
                memory[at * PAGE]
            assert not set(range(40)) & set(resident(region))
        for advice in ("willneed", "dontneed"):
            region.advise(advice, 0, 8 * PAGE)
        with pytest.raises(
            ValueError, match="advice must be 'sequential', 'random', 'willneed' or 'dontneed', got 'normal'"
        ):
            region.advise("normal")


def test_private_changes_that_fill_a_budget_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "userfault.region")
    with Region(PATTERN, "c", PAGE, budget=32 * PAGE) as region, region.memory as memory:
        for at in range(100):
            memory[at * PAGE] = 1
        await_true(lambda: any("is full" in record.getMessage() for record in caplog.records))
        (message,) = [record.getMessage() for record in caplog.records if "is full" in record.getMessage()]
        assert "the budget of 131072 bytes is full" in message
        assert "bytes of private changes (mode='c') stay in memory" in message
        assert region.stats().private_bytes == 100 * PAGE
        assert [memory[at * PAGE] for at in range(100)] == [1] * 100


def test_the_latency_of_writes_is_counted(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(EXPECTED)
    with Region(FileStore(tmp_path / "data", writable=True), "r+", PAGE) as region, region.memory as memory:
        assert region.stats().write_latency.count == 0
        memory[0] = memory[10 * PAGE] = 1
        region.flush()
        stats = region.stats()
        assert stats.write_latency.count == 2
        assert 0 < stats.write_latency.percentile(50) < 10
        assert stats.bytes_written == 2 * PAGE
