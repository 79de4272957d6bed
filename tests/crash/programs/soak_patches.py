"""The regions of the soak: a `Patch` is one, and what must be in it.

Sizes are odd, so that each has a last block that is short; budgets are small, so that something is always dropped.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.crash.programs.common import PAGE
from tests.crash.programs.soak_stores import MoodyStore

import userfault
from userfault import BlockState
from userfault.blocks import ledger
from userfault.kernel import memfd
from userfault.stores import FileStore, MemoryStore
from userfault.testing import GilHoldingStore, PatternStore, SlowStore

if TYPE_CHECKING:
    from collections.abc import Callable

    from userfault.stores import Store

KB = 1 << 10
ODD = 1000
"""So many bytes are missing from the last block."""
STUBBORN = userfault.RetryPolicy(attempts=16, backoff=0.001, longest=0.02)
"""A store that fails one read in five gives a block up once in 10**11."""
IMPATIENT = userfault.RetryPolicy(attempts=2, backoff=0.001)
WRITABLE = 4
"""Every fourth block of a `c` region is written to: private blocks are never dropped."""


@dataclass(frozen=True)
class Kind:
    """How a region is opened."""

    make: Callable[[str, int, int], Store]
    """From a folder, a size and a seed."""
    block_size: int
    blocks: int
    held: int
    """Blocks of its budget."""
    mode: str = "r"
    policy: userfault.RetryPolicy = STUBBORN
    fickle: bool = False
    """Whether its blocks fail for good now and then: then only pinned ones are touched, as a touch can but crash."""

    @property
    def size(self) -> int:
        return self.blocks * self.block_size - ODD


def _file(folder: str, size: int, seed: int) -> Store:
    path = os.path.join(folder, f"data.{size}.{seed}")
    if not os.path.exists(path):
        with open(path, "wb") as file:
            file.write(PatternStore(size, seed).expected(0, size))
    return FileStore(path)


def _memory(folder: str, size: int, seed: int) -> Store:
    return MemoryStore(PatternStore(size, seed).expected(0, size))


def _moody(folder: str, size: int, seed: int) -> Store:
    return MoodyStore(size, seed, failing=0.1, short=0.1, slow=0.05)


KINDS = {
    "file": Kind(_file, 64 * KB, 64, 12),
    "file, small blocks": Kind(_file, 4 * KB, 300, 40),
    "file, large blocks": Kind(_file, 2048 * KB, 7, 4),
    "memory": Kind(_memory, 64 * KB, 64, 16),
    "computed": Kind(lambda _, size, seed: PatternStore(size, seed, 0), 16 * KB, 100, 20),
    "readers": Kind(lambda _, size, seed: PatternStore(size, seed), 64 * KB, 64, 16),
    "slow": Kind(lambda _, size, seed: SlowStore(PatternStore(size, seed), 0.003), 32 * KB, 64, 24),
    "greedy": Kind(lambda _, size, seed: GilHoldingStore(PatternStore(size, seed), 0.001), 8 * KB, 64, 24),
    "moody": Kind(_moody, 64 * KB, 64, 16),
    "broken": Kind(
        lambda _, size, seed: MoodyStore(size, seed, failing=0.4), 64 * KB, 64, 24, policy=IMPATIENT, fickle=True
    ),
    "copy of a file": Kind(_file, 64 * KB, 64, 28, "c"),
    "copy of memory": Kind(_memory, 4 * KB, 128, 48, "c"),
    "copy of a moody store": Kind(_moody, 32 * KB, 64, 28, "c"),
}


@dataclass
class Patch:
    """A region, what must be in it, and for one of mode `c` who may use it at the moment."""

    name: str
    kind: Kind
    store: Store
    truth: bytearray
    region: userfault.Region = field(init=False)
    memory: memoryview = field(init=False)
    turn: threading.Lock = field(default_factory=threading.Lock)
    """Of those whose truth changes."""

    def __post_init__(self) -> None:
        self.open()

    def open(self) -> None:
        kind = self.kind
        self.region = userfault.Region(
            self.store, kind.mode, kind.block_size, kind.held * kind.block_size, retry_policy=kind.policy
        )
        self.memory = self.region.memory

    def close(self) -> None:
        self.memory.release()
        self.region.close()

    def reopen(self) -> None:
        """Close it, and open another on the same store: changes are gone."""
        self.close()
        self.truth[:] = pattern_of(self.kind, self.name)
        self.open()

    def over_budget(self) -> int:
        """How many bytes are in memory beyond what the budget allows, with what readers may bring in at once."""
        kind = self.kind
        most = (kind.held + max(self.store.concurrency, 1)) * kind.block_size
        return max(0, self.region.stats().resident_bytes - most)

    def odd_blocks(self) -> list[str]:
        """Say which blocks the kernel has and the states do not, or the other way round."""
        while any(state in (BlockState.FILLING, BlockState.EVICTING) for state in self.region.residency()):
            time.sleep(0.001)  # a thread goes on a moment before the worker has written it down
        states, present = self.region.residency(), self._pages()
        odd = []
        for block, state in enumerate(states):
            length = min(self.kind.block_size, len(self.truth) - block * self.kind.block_size)
            due = -(-length // PAGE) if state in (BlockState.CLEAN, BlockState.PRIVATE) else 0
            if present[block] != due:
                odd.append(f"block {block} is in state {state}, and {present[block]} pages are there instead of {due}")
        return odd

    def _pages(self) -> list[int]:
        """Count the pages of each block that are in memory. Asks the supervisor's descriptor: we have none."""
        folder = f"/proc/{self.region.pager.pid}/fd"
        pages = [0] * self.kind.blocks
        for name in os.listdir(folder):
            if "userfault-region" not in os.readlink(f"{folder}/{name}"):
                continue
            with open(f"{folder}/{name}", "rb") as file:
                if ledger.read_words(file.fileno())[ledger.W_ADDRESS] == self.region.address:
                    for start, end in memfd.data_extents(file.fileno(), 0, -(-len(self.truth) // PAGE) * PAGE):
                        for at in range(start, end, PAGE):
                            pages[at // self.kind.block_size] += 1
        return pages


def seed_of(name: str) -> int:
    """Return the seed of a patch's pattern; no two have the same bytes."""
    return list(KINDS).index(name) + 1


def pattern_of(kind: Kind, name: str) -> bytes:
    """Return what a patch holds at first."""
    return PatternStore(kind.size, seed_of(name)).expected(0, kind.size)


def lay_out(folder: str) -> list[Patch]:
    """Open one region of each kind."""
    return [
        Patch(name, kind, kind.make(folder, kind.size, seed_of(name)), bytearray(pattern_of(kind, name)))
        for name, kind in KINDS.items()
    ]
