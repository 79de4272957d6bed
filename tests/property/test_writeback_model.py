"""A region of mode `r+` against a model: its bytes are those of a bytearray, and so are the file's after a flush.

The pager's processes are real, so is the kernel; worker and supervisor are killed now and then.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from pathlib import Path

from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from tests.property.regions import PagedMachine, run_machine

from userfault import BlockState, FileStore, MemoryStore, Region
from userfault.blocks.geometry import PAGE_SIZE
from userfault.testing import PatternStore

SIZES = [1, PAGE_SIZE, PAGE_SIZE + 1, 10 * PAGE_SIZE + 7, 65536 * 3 + 5, 40 * PAGE_SIZE]
BLOCKS = [PAGE_SIZE, 2 * PAGE_SIZE, 16 * PAGE_SIZE, 2 << 20]
PATIENCE_S = 20.0
"""How long a successor may take on a busy machine."""
where = st.tuples(st.floats(0, 1), st.floats(0, 1))


class WriteBackMachine(PagedMachine):
    """One region at a time, over one file."""

    def __init__(self) -> None:
        super().__init__()
        self.cleanup = contextlib.ExitStack()
        self.path = Path(self.cleanup.enter_context(tempfile.TemporaryDirectory())) / "data"
        self.region: Region | None = None
        self.kills = 0

    @initialize(size=st.sampled_from(SIZES), seed=st.integers(0, 5))
    def choose(self, size: int, seed: int) -> None:
        self.size = size
        self.model = bytearray(PatternStore(size, seed).expected(0, size))
        self.path.write_bytes(self.model)

    @property
    def open_region(self) -> Region:
        assert self.region is not None
        return self.region

    def bytes_of(self, part: tuple[float, float]) -> tuple[int, int]:
        start, end = sorted(round(fraction * self.size) for fraction in part)
        return start, end

    @precondition(lambda self: self.region is None)
    @rule(
        block_size=st.sampled_from(BLOCKS),
        blocks=st.one_of(st.none(), st.integers(1, 12)),
        sync=st.sampled_from([None, 0.5]),
    )
    def open(self, block_size: int, blocks: int | None, sync: float | None) -> None:
        budget = float("inf") if blocks is None else blocks * block_size
        self.budget = budget
        self.limit = None if blocks is None else max(blocks, 4) * block_size
        store = FileStore(self.path, writable=True)
        self.region = Region(store, "r+", block_size, budget, self.pager, sync_interval=sync)
        self.pins: list[tuple[int, int]] = []
        self.most_pinned = 0

    @precondition(lambda self: self.region is not None)
    @rule()
    def close(self) -> None:
        self.open_region.close()
        assert self.path.read_bytes() == self.model
        self.region = None

    @precondition(lambda self: self.region is not None)
    @rule(part=where)
    def read(self, part: tuple[float, float]) -> None:
        start, end = self.bytes_of(part)
        with self.open_region.memory as memory:
            assert bytes(memory[start:end]) == self.model[start:end]

    @precondition(lambda self: self.region is not None)
    @rule(part=where, value=st.integers(0, 255))
    def write(self, part: tuple[float, float], value: int) -> None:
        start, end = self.bytes_of(part)
        with self.open_region.memory as memory:
            memory[start:end] = bytes([value]) * (end - start)
        self.model[start:end] = bytes([value]) * (end - start)

    @precondition(lambda self: self.region is not None)
    @rule()
    def flush(self) -> None:
        self.open_region.flush()
        assert self.path.read_bytes() == self.model

    @precondition(lambda self: self.region is not None)
    @rule(part=where)
    def evict(self, part: tuple[float, float]) -> None:
        start, end = self.bytes_of(part)
        self.open_region.evict(start, end - start)

    @precondition(lambda self: self.region is not None)
    @rule(part=where, write=st.booleans())
    def pin(self, part: tuple[float, float], write: bool) -> None:
        start, end = self.bytes_of(part)
        with contextlib.suppress(ValueError):  # more than the budget holds
            self.open_region.pin(start, end - start, write)
            self.pins.append((start, end - start))

    @precondition(lambda self: self.region is not None and self.pins)
    @rule()
    def unpin(self) -> None:
        self.open_region.unpin(*self.pins.pop(0))

    @precondition(lambda self: self.region is not None)
    @rule()
    def save(self) -> None:
        other = self.path.with_name("other")
        self.open_region.save(other)
        assert other.read_bytes() == self.model

    @precondition(lambda self: self.region is not None and self.kills < 3)
    @rule(who=st.sampled_from(["worker", "supervisor"]))
    def kill(self, who: str) -> None:
        self.kills += 1
        pid = self._pid(who)
        with contextlib.suppress(ProcessLookupError):  # a new one that has not said hello yet
            os.kill(pid, 9)
        with Region(MemoryStore(b"x"), pager=self.pager) as other:
            other.ensure()  # answered by the next one; it has filled a block, so that its death will not count
        deadline = time.monotonic() + PATIENCE_S
        while self._pid(who) == pid:  # were the other killed before this one is missed, that would be the end
            assert time.monotonic() < deadline, f"no successor of {who} {pid}"
            time.sleep(0.001)

    def _pid(self, who: str) -> int:
        return self.pager.worker_pid if who == "worker" else self.pager.pid

    @invariant()
    def budgets_hold(self) -> None:
        if self.region is not None and self.limit is not None:
            stats = self.region.stats()
            self.most_pinned = max(self.most_pinned, stats.pinned_bytes)  # what came in beside stays for a while
            most = max(self.limit, self.most_pinned + 4 * self.region.block_size)
            assert stats.resident_bytes <= most + self.region.block_size, "fault loop and readers may find one room"
            assert BlockState.PRIVATE not in self.region.residency()

    def teardown(self) -> None:
        if self.region is not None:
            self.close()
        self.cleanup.close()


def test_a_region_that_writes_back_is_a_bytearray_and_its_file_too(soak: bool) -> None:
    run_machine(WriteBackMachine, soak=soak, lives=1700)
