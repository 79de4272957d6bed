"""A region is memory with the store's bytes in it, and does what it says with blocks, in either mode."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest
from tests.integration.regions import await_true

from userfault import BlockState, FileStore, MemoryStore, Pager, Region, RegionClosedError, Store, StoreError
from userfault.blocks.geometry import PAGE_SIZE, round_up
from userfault.testing import CountingStore, FailingStore, PatternStore, SlowStore, StallingStore

pytestmark = pytest.mark.usefixtures("default_pager")

KIB, MIB = 1 << 10, 1 << 20
SIZE = 3 * MIB + 12345
BLOCK = 64 * KIB
PATTERN = PatternStore(SIZE, concurrency=0)
EXPECTED = PATTERN.expected(0, SIZE)


def states(region: Region) -> list[BlockState]:
    return [BlockState(state) for state in region.residency()]


@pytest.fixture
def region() -> Iterator[Region]:
    with Region(PATTERN) as opened:
        yield opened


@pytest.fixture
def private() -> Iterator[Region]:
    with Region(PATTERN, "c") as opened:
        yield opened


# -- the bytes ------------------------------------------------------------------------------------------------------


def file_store(data: bytes, folder: Path) -> Store:
    (folder / "data").write_bytes(b"before" + data + b"after")
    return FileStore(folder / "data", 6, len(data))


STORES: dict[str, Callable[[bytes, Path], Store]] = {
    "memory": lambda data, _: MemoryStore(data),
    "file": file_store,
    "inline": lambda data, _: PatternStore(len(data), concurrency=0),
    "pool": lambda data, _: PatternStore(len(data)),
}


@pytest.mark.parametrize("block_size", [PAGE_SIZE, BLOCK, 2 * MIB])
@pytest.mark.parametrize("kind", STORES)
def test_every_byte_of_every_store_is_there(kind: str, block_size: int, tmp_path: Path) -> None:
    for size in (1, 4095, 4096, 4097, BLOCK, BLOCK + 1, 2 * MIB + 5):
        data = EXPECTED[:size]
        store = STORES[kind](data, tmp_path)
        for mode in "rc":
            with Region(store, mode, block_size) as region, region.memory as memory:
                assert len(memory) == len(region) == region.size == size
                assert memory[-1] == data[-1]
                assert memory == data


def test_a_region_says_what_it_is(default_pager: Pager) -> None:
    with Region(PATTERN, "c", "128KiB", "1MiB") as region:
        assert (region.size, region.mode, region.block_size, region.budget) == (SIZE, "c", 128 * KIB, MIB)
        assert region.store is PATTERN
        assert region.pager is default_pager
        assert region.address % PAGE_SIZE == 0
        assert not region.closed
        assert "PatternStore" in repr(region)
        assert f"{region.address:#x}" in repr(region)


def test_blocks_are_brought_in_by_touch_alone(region: Region) -> None:
    assert set(region.residency()) == {BlockState.ABSENT}
    assert region.memory[5 * BLOCK + 7] == EXPECTED[5 * BLOCK + 7]
    wanted = [BlockState.CLEAN if number == 5 else BlockState.ABSENT for number in range(49)]
    await_true(lambda: states(region) == wanted)  # the touch goes on a moment before the block is written down


def test_memory_is_read_only_in_mode_r(region: Region) -> None:
    with region.memory as memory:
        assert memory.readonly
        with pytest.raises(TypeError, match="read-only"):
            memory[0] = 1


def test_each_block_is_read_once(tmp_path: Path) -> None:
    store = CountingStore(PatternStore(SIZE), tmp_path / "log")
    with Region(store) as region, region.memory as memory:
        with ThreadPoolExecutor(8) as threads:
            assert all(threads.map(lambda _: bytes(memory) == EXPECTED, range(8)))
        assert len(region.residency()) == 49
    reads = store.reads()
    assert sorted(reads) == [(at, min(BLOCK, SIZE - at)) for at in range(0, SIZE, BLOCK)]


# -- mode c ---------------------------------------------------------------------------------------------------------


def test_changes_stay_in_the_region(tmp_path: Path) -> None:
    store = file_store(EXPECTED, tmp_path)
    with Region(store, "c") as one, Region(store, "c") as other, one.memory as left, other.memory as right:
        left[10:15] = b"hello"  # before the block was ever read
        assert right[10] == EXPECTED[10]
        right[10] = 0  # after
        left[SIZE - 1] = 255
        assert left[:20] == EXPECTED[:10] + b"hello" + EXPECTED[15:20]
        assert right[:20] == EXPECTED[:10] + b"\0" + EXPECTED[11:20]
        assert left[SIZE - 3 :] == EXPECTED[-3:-1] + b"\xff"
        assert states(one)[0] == states(one)[-1] == states(other)[0] == BlockState.PRIVATE
        assert one.stats().private_bytes in (2 * BLOCK, BLOCK + SIZE % BLOCK)
        one.flush()
    assert (tmp_path / "data").read_bytes() == b"before" + EXPECTED + b"after"


def test_private_blocks_are_never_evicted(private: Region) -> None:
    with private.memory as memory:
        memory[3 * BLOCK] ^= 255
        private.ensure(4 * BLOCK, 1)
        assert private.evict() == BLOCK
        assert states(private)[3:5] == [BlockState.PRIVATE, BlockState.ABSENT]
        assert memory[3 * BLOCK] == EXPECTED[3 * BLOCK] ^ 255
        assert private.evict() == 0


def test_reading_leaves_a_block_clean(private: Region) -> None:
    private.ensure()
    assert set(states(private)) == {BlockState.CLEAN}
    assert private.stats().private_bytes == 0
    with private.memory as memory:
        assert memory == EXPECTED


# -- ensure and pinned ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "length", "first", "stop"),
    [
        (0, 1, 0, 1),
        (BLOCK - 1, 2, 0, 2),
        (BLOCK, BLOCK, 1, 2),
        (SIZE - 1, 1, 48, 49),
        (3 * BLOCK + 5, None, 3, 49),
        (0, None, 0, 49),
        (5, 0, 0, 0),
        (SIZE, 0, 0, 0),
        (SIZE, None, 0, 0),
    ],
)
def test_ensure_brings_in_what_it_touches(
    region: Region, offset: int, length: int | None, first: int, stop: int
) -> None:
    region.ensure(offset, length)
    wanted = [BlockState.CLEAN if first <= block < stop else BlockState.ABSENT for block in range(49)]
    assert states(region) == wanted
    assert region.stats().faults == 0


def test_ensure_for_writing_makes_blocks_private(private: Region) -> None:
    private.ensure(BLOCK, BLOCK, write=True)
    private.ensure(0, 3 * BLOCK)
    private.ensure(2 * BLOCK, 1, write=True)  # which is clean already
    assert states(private)[:4] == [BlockState.CLEAN, BlockState.PRIVATE, BlockState.PRIVATE, BlockState.ABSENT]
    with private.memory as memory:
        memory[BLOCK : 3 * BLOCK] = bytes(2 * BLOCK)
        assert private.stats().faults == 0
        assert memory == EXPECTED[:BLOCK] + bytes(2 * BLOCK) + EXPECTED[3 * BLOCK :]


def test_writing_is_refused_in_mode_r(region: Region) -> None:
    with pytest.raises(ValueError, match="mode='r\\+' or 'c'"):
        region.ensure(0, 1, write=True)
    with pytest.raises(ValueError, match="mode='r\\+' or 'c'"), region.pinned(0, 1, write=True):
        pass
    assert not any(region.residency())


@pytest.mark.parametrize("verb", ["ensure", "prefetch", "evict", "retry"])
@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, SIZE + 1), (SIZE, 1), (0, -1)])
def test_a_range_outside_is_refused(region: Region, verb: str, offset: int, length: int) -> None:
    with pytest.raises(
        ValueError, match=f"offset {offset} and length {length} is not inside the region's {SIZE} bytes"
    ):
        getattr(region, verb)(offset, length)


def test_a_pinned_range_stays(region: Region) -> None:
    with region.pinned(BLOCK + 5, BLOCK) as view:
        assert view == EXPECTED[BLOCK + 5 : 2 * BLOCK + 5]
        region.ensure()
        assert region.stats().pinned_bytes == 2 * BLOCK
        region.evict()
        assert [number for number, state in enumerate(states(region)) if state] == [1, 2]
        with pytest.raises(BufferError):
            region.close()
    assert region.stats().pinned_bytes == 0
    assert region.evict() == 2 * BLOCK


def test_pins_nest_and_end_with_an_exception(region: Region) -> None:
    with region.pinned(0, BLOCK), region.pinned(0, 2 * BLOCK):
        with pytest.raises(ZeroDivisionError), region.pinned(0, 4 * BLOCK):
            raise ZeroDivisionError
        assert region.evict() == 2 * BLOCK
    assert region.evict() == 2 * BLOCK


def test_a_view_that_outlives_its_pin_is_released(region: Region) -> None:
    with region.pinned(0, 10) as view:
        pass
    with pytest.raises(ValueError, match="released"):
        view[0]


def test_pinned_for_writing_can_be_written(private: Region) -> None:
    with private.pinned(100, 5, write=True) as view:
        view[:] = b"hello"
        assert private.stats().faults == 0
    with private.memory as memory:
        assert memory[99:106] == EXPECTED[99:100] + b"hello" + EXPECTED[105:106]


def test_a_block_is_pinned_255_times(region: Region) -> None:
    pins = [region.pinned(0, 1) for _ in range(256)]
    for pin in pins[:255]:
        pin.__enter__()
    with pytest.raises(ValueError, match="255 times"):
        pins[255].__enter__()
    for pin in pins[:255]:
        pin.__exit__(None, None, None)
    assert region.evict() == BLOCK


# -- prefetch, evict, retry -----------------------------------------------------------------------------------------


def test_prefetch_begins_and_does_not_wait(tmp_path: Path) -> None:
    store = StallingStore(PatternStore(SIZE), tmp_path / "go")
    with Region(store) as region:
        region.prefetch(0, 3 * BLOCK)
        await_true(lambda: states(region)[:3] == [BlockState.FILLING] * 3)
        (tmp_path / "go").touch()
        await_true(lambda: states(region)[:3] == [BlockState.CLEAN] * 3)
        assert states(region)[3] == BlockState.ABSENT
        assert region.stats().faults == 0


def test_prefetch_can_wait(region: Region) -> None:
    region.prefetch(BLOCK, wait=True)
    assert states(region) == [BlockState.ABSENT] + [BlockState.CLEAN] * 48


def test_a_touch_goes_before_a_prefetch(tmp_path: Path) -> None:
    inner = PatternStore(256 * BLOCK)
    with Region(SlowStore(inner, 0.01, concurrency=2), budget="1GiB") as region:
        region.prefetch()
        began = time.monotonic()
        assert region.memory[255 * BLOCK] == inner.expected(255 * BLOCK, 1)[0]
        assert time.monotonic() - began < 1, "the whole prefetch takes 1.3 seconds"
        assert states(region)[254] == BlockState.ABSENT


@pytest.mark.parametrize(
    ("offset", "length", "first", "stop"),
    [
        (0, None, 0, 49),
        (1, None, 1, 49),
        (0, 2 * BLOCK - 1, 0, 1),
        (BLOCK, BLOCK, 1, 2),
        (BLOCK + 1, BLOCK, 0, 0),
        (48 * BLOCK, None, 48, 49),
        (48 * BLOCK, SIZE - 48 * BLOCK - 1, 0, 0),
        (7, 0, 0, 0),
    ],
)
def test_evict_drops_what_lies_inside(region: Region, offset: int, length: int | None, first: int, stop: int) -> None:
    region.ensure()
    dropped = region.evict(offset, length)
    assert dropped == min(round_up(SIZE, PAGE_SIZE), stop * BLOCK) - first * BLOCK
    assert states(region) == [BlockState.ABSENT if first <= b < stop else BlockState.CLEAN for b in range(49)]
    assert region.stats().evictions == stop - first
    with region.memory as memory:
        assert memory == EXPECTED
    await_true(lambda: set(states(region)) == {BlockState.CLEAN})


def test_evict_of_nothing_is_nothing(region: Region) -> None:
    assert region.evict() == 0
    assert region.stats().evictions == 0


def test_eviction_under_readers_shows_no_wrong_byte(region: Region) -> None:
    stop = threading.Event()

    def read(seed: int) -> int:
        random, rounds = Random(seed), 0
        with region.memory as memory:
            while not stop.is_set() or not rounds:
                at = random.randrange(SIZE - 100)
                assert memory[at : at + 100] == EXPECTED[at : at + 100]
                rounds += 1
        return rounds

    with ThreadPoolExecutor(4) as threads:
        readers = [threads.submit(read, seed) for seed in range(4)]
        dropped = sum(region.evict() for _ in range(40))
        stop.set()
        assert all(reader.result(30) for reader in readers)
    short = round_up(SIZE, PAGE_SIZE) % BLOCK  # the last block
    assert dropped % BLOCK % (short or BLOCK) == 0 or dropped <= region.stats().evictions * BLOCK


def test_a_failing_store_is_an_exception_to_ensure(tmp_path: Path) -> None:
    bad = 5 * BLOCK + 10
    store = FailingStore(SIZE, "the tape is torn", [bad], healed_by=tmp_path / "healed")
    with Region(store) as region:
        waits: list[Callable[[], object]] = [
            lambda: region.ensure(0, 10 * BLOCK),
            lambda: region.ensure(bad, 1),
            lambda: region.prefetch(bad, 1, wait=True),
            lambda: region.retry(bad, 1),
        ]
        for wait in waits:
            with pytest.raises(StoreError, match="the tape is torn") as caught:
                wait()
            assert caught.value.offset == 5 * BLOCK
            assert caught.value.length == BLOCK
            assert "FailingStore" in caught.value.store
            assert "OSError" in caught.value.cause
        assert states(region)[5] == BlockState.FAILED
        assert [state for state in states(region)[:10] if state != BlockState.CLEAN] == [BlockState.FAILED]
        region.prefetch(bad, 1)  # says nothing
        region.ensure(0, 5 * BLOCK)
        (tmp_path / "healed").touch()
        with pytest.raises(StoreError, match="the tape is torn"):
            region.ensure(bad, 1)  # asking again is retry's business
        region.retry(bad, 1)
        with region.memory as memory:
            assert memory == EXPECTED
        await_true(lambda: states(region)[5] == BlockState.CLEAN)
        assert region.stats().failures == 2
        region.retry()


# -- stats ----------------------------------------------------------------------------------------------------------


def test_stats_count_what_happened(region: Region) -> None:
    fresh = region.stats()
    assert (fresh.faults, fresh.blocks_filled, fresh.bytes_read, fresh.resident_bytes) == (0, 0, 0, 0)
    assert (fresh.placement, fresh.worker_cpu) in [("free", None), ("following", fresh.worker_cpu)]
    with region.memory as memory:
        for block in (0, 3, 48):
            memory[block * BLOCK]
    await_true(lambda: region.stats().faults == 3)
    region.ensure(0, 10 * BLOCK)
    region.evict(0, BLOCK)
    stats = region.stats()
    assert stats.faults == 3
    assert stats.latency.count == 3
    assert 0 < stats.latency.percentile(50) <= stats.latency.percentile(100) < 10
    assert stats.blocks_filled == 11
    assert stats.resident_bytes == 10 * BLOCK
    assert stats.evictions == 1
    assert (stats.failures, stats.dirty_bytes, stats.bytes_written, stats.private_bytes) == (0, 0, 0, 0)
    assert 10 * BLOCK < stats.bytes_read <= 11 * BLOCK


@pytest.mark.parametrize("concurrency", [0, 4])
def test_a_whole_read_is_counted_to_the_byte(concurrency: int) -> None:
    with Region(PatternStore(SIZE, concurrency=concurrency)) as region, region.memory as memory:
        assert bytes(memory) == EXPECTED
        await_true(lambda: region.stats().faults == 49)
        stats = region.stats()
    assert stats.bytes_read == SIZE
    assert stats.resident_bytes == SIZE
    assert stats.blocks_filled == stats.faults == stats.latency.count == 49


def test_a_first_write_is_a_fault_too(private: Region) -> None:
    with private.memory as memory:
        memory[0]
        memory[0] = 1
        memory[1] = 2
    await_true(lambda: private.stats().faults == 2)
    assert private.stats().blocks_filled == 1


# -- many threads, and the end --------------------------------------------------------------------------------------


def test_threads_share_a_region() -> None:
    budget = 16 * BLOCK
    with Region(PatternStore(SIZE), budget=budget) as region, region.memory as memory:

        def work(seed: int) -> None:
            random = Random(seed)
            for _ in range(40):
                at = random.randrange(SIZE - BLOCK)
                match random.randrange(6):
                    case 0:
                        region.ensure(at, 1000)
                    case 1:
                        region.prefetch(at)
                    case 2:
                        region.evict(at, 200_000 if at + 200_000 < SIZE else None)
                    case 3:
                        with region.pinned(at, 1) as view:
                            assert view[0] == EXPECTED[at]
                    case 4:
                        region.stats()
                    case _:
                        assert memory[at : at + 5000] == EXPECTED[at : at + 5000]

        with ThreadPoolExecutor(8) as threads:
            for job in [threads.submit(work, seed) for seed in range(8)]:
                job.result(60)
        assert region.stats().pinned_bytes == 0


VERBS: dict[str, Callable[[Region], object]] = {
    "memory": lambda region: region.memory,
    "address": lambda region: region.address,
    "ensure": lambda region: region.ensure(),
    "pinned": lambda region: region.pinned().__enter__(),
    "prefetch": lambda region: region.prefetch(),
    "evict": lambda region: region.evict(),
    "retry": lambda region: region.retry(),
    "flush": lambda region: region.flush(),
    "stats": lambda region: region.stats(),
    "residency": lambda region: region.residency(),
}


def test_a_closed_region_does_nothing_more() -> None:
    region = Region(PATTERN)
    region.ensure()
    region.close()
    region.close()
    assert region.closed
    assert "closed" in repr(region)
    assert (region.size, region.mode, region.store) == (SIZE, "r", PATTERN)
    for name, verb in VERBS.items():
        with pytest.raises(RegionClosedError, match="closed") as caught:
            verb(region)
        assert isinstance(caught.value, ValueError), name
    region.close()


def test_a_view_keeps_a_region_open(default_pager: Pager) -> None:
    region = Region(PATTERN, "c")
    memory = region.memory
    part = memory[5:10]
    for holder in (memory, part):
        with pytest.raises(BufferError, match="release"):
            region.close()
        assert not region.closed
        assert bytes(part) == EXPECTED[5:10]
        region.ensure(BLOCK, 1)
        holder.release()
    region.close()
    assert default_pager.regions == 0


def test_a_forgotten_region_is_a_warning_and_ends(default_pager: Pager) -> None:
    held = [Region(PATTERN)]
    with pytest.warns(ResourceWarning, match=r"unclosed <userfault.Region PatternStore"):
        held.clear()
    await_true(lambda: default_pager.regions == 0)


def test_views_outlive_a_forgotten_region(default_pager: Pager) -> None:
    with pytest.warns(ResourceWarning, match="unclosed"):
        memory = Region(PATTERN, "c").memory
    memory[0] ^= 255
    assert memory[0] == EXPECTED[0] ^ 255
    assert memory[1:] == EXPECTED[1:]
    assert default_pager.regions == 1
    memory.release()
    await_true(lambda: default_pager.regions == 0)


def test_an_exception_in_a_with_block_closes_and_travels() -> None:
    with pytest.raises(ZeroDivisionError), Region(PATTERN) as region:
        raise ZeroDivisionError
    assert region.closed


def test_close_does_not_wait_for_a_read_that_hangs(tmp_path: Path) -> None:
    store = StallingStore(PatternStore(SIZE), tmp_path / "never", tmp_path / "entered")
    region = Region(store)
    region.prefetch()
    await_true((tmp_path / "entered").exists)
    began = time.monotonic()
    region.close()
    assert time.monotonic() - began < 5
    (tmp_path / "never").touch()


def test_the_pager_reads_from_a_region_like_from_any_memory(region: Region) -> None:
    with region.memory as memory:
        other = Region(MemoryStore(memory[:100_000]))
        with other, other.memory as copy:
            assert copy == EXPECTED[:100_000]
        del copy


def test_a_file_that_changes_is_an_error_not_a_mixture(tmp_path: Path) -> None:
    store = file_store(EXPECTED, tmp_path)
    with Region(store) as region:
        region.ensure(0, BLOCK)
        fd = os.open(tmp_path / "data", os.O_WRONLY)
        os.pwrite(fd, b"changed", 10)
        os.utime(fd, ns=(1, 1))
        os.close(fd)
        with pytest.raises(StoreError, match="written to"):
            region.ensure(BLOCK)
        with region.memory as memory:
            assert memory[:BLOCK] == EXPECTED[:BLOCK]
