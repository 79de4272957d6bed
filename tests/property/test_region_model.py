"""A region against a model: whatever is done, in whatever order, its bytes are those of a bytearray.

The pager's processes are real, so is the kernel; the worker is killed now and then. One step is a few milliseconds.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from tests.property.regions import PagedMachine, run_machine

from userfault import BlockState, FileStore, MemoryStore, Region, Store, StoreError
from userfault.blocks.geometry import PAGE_SIZE, round_up
from userfault.testing import FailingStore, PatternStore

SIZES = [1, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1, 10 * PAGE_SIZE + 7, 65536, 65536 * 3 + 5, 40 * PAGE_SIZE]
BLOCKS = [PAGE_SIZE, 2 * PAGE_SIZE, 16 * PAGE_SIZE, 2 << 20]
AT_REST = {BlockState.ABSENT, BlockState.CLEAN, BlockState.PRIVATE, BlockState.FAILED}
IN_MEMORY = {BlockState.CLEAN, BlockState.PRIVATE}
where = st.tuples(st.floats(0, 1), st.floats(0, 1))


class RegionMachine(PagedMachine):
    """One region at a time, in either mode, over any kind of store."""

    def __init__(self) -> None:
        super().__init__()
        self.cleanup = contextlib.ExitStack()
        self.folder = Path(self.cleanup.enter_context(tempfile.TemporaryDirectory()))
        self.region: Region | None = None
        self.kills = 0

    @initialize(
        mode=st.sampled_from("rc"),
        size=st.sampled_from(SIZES),
        kind=st.sampled_from(["memory", "file", "inline", "pool", "failing"]),
        seed=st.integers(0, 5),
    )
    def choose(self, mode: str, size: int, kind: str, seed: int) -> None:
        self.mode, self.size = mode, size
        self.original = PatternStore(size, seed).expected(0, size)
        self.bad: set[int] = set()
        self.store = self.make(kind, seed)

    def make(self, kind: str, seed: int) -> Store:
        if kind == "memory":
            return MemoryStore(self.original)
        if kind == "file":
            (self.folder / "data").write_bytes(self.original)
            return FileStore(self.folder / "data")
        if kind == "failing":
            self.original = PatternStore(self.size).expected(0, self.size)
            self.bad = {self.size // 2}
            return FailingStore(self.size, fail_offsets=self.bad, healed_by=self.folder / "healed")
        return PatternStore(self.size, seed, concurrency=0 if kind == "inline" else 4)

    # -- opening and closing

    @precondition(lambda self: self.region is None)
    @rule(block_size=st.sampled_from(BLOCKS), blocks=st.one_of(st.none(), st.integers(1, 12)))
    def open(self, block_size: int, blocks: int | None) -> None:
        self.block_size = block_size
        self.limit = blocks
        budget = float("inf") if blocks is None else blocks * block_size
        self.region = Region(self.store, self.mode, block_size, budget, self.pager)
        self.model = bytearray(self.original)
        self.private: set[int] = set()
        self.failed: set[int] = set()
        self.pins: list[tuple[contextlib.ExitStack, range, memoryview]] = []

    @property
    def open_region(self) -> Region:
        assert self.region is not None
        return self.region

    @precondition(lambda self: self.region is not None)
    @rule()
    def close(self) -> None:
        if self.pins:
            with pytest.raises(BufferError):
                self.open_region.close()
            while self.pins:
                self.pins.pop()[0].close()
        self.open_region.close()
        self.open_region.close()
        self.region = None

    # -- ranges

    def bytes_of(self, part: tuple[float, float]) -> tuple[int, int]:
        start, end = sorted(round(fraction * self.size) for fraction in part)
        return start, end

    def blocks_of(self, start: int, end: int) -> range:
        return range(start // self.block_size, -(-end // self.block_size)) if end > start else range(0)

    def sick(self) -> set[int]:
        """Blocks that the store cannot give at present."""
        return set() if (self.folder / "healed").exists() else {byte // self.block_size for byte in self.bad}

    def is_bad(self, start: int, end: int) -> bool:
        """Whether a read of this range would, or might, end in a SIGBUS."""
        return any(block in (self.sick() | self.failed) - self.private for block in self.blocks_of(start, end))

    def would_pin(self, blocks: range) -> int:
        return len(set(blocks).union(*(pinned for _, pinned, _ in self.pins)))

    # -- what one does with a region

    @precondition(lambda self: self.region is not None)
    @rule(part=where)
    def read(self, part: tuple[float, float]) -> None:
        start, end = self.bytes_of(part)
        if not self.is_bad(start, end):
            with self.open_region.memory as memory:
                assert bytes(memory[start:end]) == self.model[start:end]

    @precondition(lambda self: self.region is not None and self.mode == "c")
    @rule(part=where, value=st.integers(0, 255))
    def write(self, part: tuple[float, float], value: int) -> None:
        start, end = self.bytes_of(part)
        if not self.is_bad(start, end):
            with self.open_region.memory as memory:
                memory[start:end] = bytes([value]) * (end - start)
            self.model[start:end] = bytes([value]) * (end - start)
            self.private.update(self.blocks_of(start, end))

    @precondition(lambda self: self.region is not None)
    @rule(part=where, write=st.booleans())
    def ensure(self, part: tuple[float, float], write: bool) -> None:
        start, end = self.bytes_of(part)
        blocks, write = self.blocks_of(start, end), write and self.mode == "c"
        if self.limit is not None and self.would_pin(blocks) > self.limit:
            with pytest.raises(ValueError, match=r"budget"):
                self.open_region.ensure(start, end - start, write)
        elif self.sick().intersection(blocks) - self.private:
            with pytest.raises(StoreError, match=r"on fire|the worker that knew why"):
                self.open_region.ensure(start, end - start, write)
            self.settle_failures(blocks)
        elif self.is_bad(start, end):  # healed since; it failed before, or not: a prefetch does so when it likes
            with contextlib.suppress(StoreError):
                self.open_region.ensure(start, end - start, write)
        else:
            self.open_region.ensure(start, end - start, write)
        if write:
            self.note_private()

    @precondition(lambda self: self.region is not None and len(self.pins) < 3)
    @rule(part=where, write=st.booleans())
    def pin(self, part: tuple[float, float], write: bool) -> None:
        start, end = self.bytes_of(part)
        blocks, write = self.blocks_of(start, end), write and self.mode == "c"
        if self.is_bad(start, end) or (self.limit is not None and self.would_pin(blocks) > self.limit):
            return
        stack = contextlib.ExitStack()
        view = stack.enter_context(self.open_region.pinned(start, end - start, write))
        self.pins.append((stack, blocks, view))
        if write:
            view[:] = self.model[start:end] = bytes([start % 256]) * (end - start)
            self.note_private()
        assert bytes(view) == self.model[start:end]

    @precondition(lambda self: self.region is not None and self.pins)
    @rule()
    def unpin(self) -> None:
        self.pins.pop(0)[0].close()

    @precondition(lambda self: self.region is not None)
    @rule(part=where, wait=st.booleans())
    def prefetch(self, part: tuple[float, float], wait: bool) -> None:
        start, end = self.bytes_of(part)
        try:
            self.open_region.prefetch(start, end - start, wait)
        except StoreError as error:
            assert self.is_bad(start, end), error  # noqa: PT017  # a prefetch ends at the budget, and may not get there
        self.settle_failures(self.blocks_of(start, end))

    @precondition(lambda self: self.region is not None)
    @rule(part=where)
    def evict(self, part: tuple[float, float]) -> None:
        start, end = self.bytes_of(part)
        dropped = self.open_region.evict(start, end - start)
        assert 0 <= dropped <= round_up(end - start, self.block_size)

    @precondition(lambda self: self.region is not None)
    @rule(part=where)
    def retry(self, part: tuple[float, float]) -> None:
        start, end = self.bytes_of(part)
        if (self.folder / "healed").exists():
            self.open_region.retry(start, end - start)
            self.failed -= set(self.blocks_of(start, end))
        else:
            with contextlib.suppress(StoreError):
                self.open_region.retry(start, end - start)
            self.settle_failures(self.blocks_of(start, end))

    @precondition(lambda self: self.bad and not (self.folder / "healed").exists())
    @rule()
    def heal(self) -> None:
        (self.folder / "healed").touch()

    @precondition(lambda self: self.region is not None and self.kills < 3)
    @rule()
    def kill_the_worker(self) -> None:
        self.kills += 1
        worker = self.pager.worker_pid
        with contextlib.suppress(ProcessLookupError):  # a new one that has not said hello yet
            os.kill(worker, 9)
        with Region(MemoryStore(b"x"), pager=self.pager) as other:
            other.ensure()  # answered by the next one; it has filled a block, so that its death will not count

    # -- what holds at any time

    def settle_failures(self, blocks: range) -> None:
        """Note what may have failed."""
        self.failed |= self.sick().intersection(blocks)

    def note_private(self) -> None:
        states = self.open_region.residency()
        self.private |= {block for block, state in enumerate(states) if state == BlockState.PRIVATE}

    @invariant()
    def states_are_plausible(self) -> None:
        if self.region is None:
            return
        states = [BlockState(state) for state in self.region.residency()]
        assert len(states) == -(-self.size // self.block_size)
        for block, state in enumerate(states):
            assert state in AT_REST | {BlockState.FILLING, BlockState.EVICTING}
            assert (state == BlockState.PRIVATE) == (block in self.private)
            if any(block in pinned for _, pinned, _ in self.pins):
                assert state in IN_MEMORY

    @invariant()
    def budgets_hold(self) -> None:
        """Private blocks may exceed a budget, and so may a block that is arriving; clean ones may not."""
        if self.region is not None and self.limit is not None:
            stats = self.region.stats()
            allowed = max(self.limit, len(self.private)) + 9
            assert stats.resident_bytes <= allowed * self.block_size
            assert stats.private_bytes <= round_up(self.size, self.block_size)

    def teardown(self) -> None:
        if self.region is not None:
            with self.cleanup:
                if not self.bad:
                    with self.region.memory as memory:
                        assert bytes(memory) == self.model
                self.close()
        self.cleanup.close()


def test_a_region_is_a_bytearray(soak: bool) -> None:
    run_machine(RegionMachine, soak=soak, lives=300)
