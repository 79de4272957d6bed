"""Scenes of regions: reading, changing, dropping, failing."""

from __future__ import annotations

import os
import time
from functools import partial
from random import Random
from typing import TYPE_CHECKING

from tests.crash.injection.trial import collect, own
from tests.crash.programs.common import BLOCK, PAGE

import userfault
from userfault.kernel import abi, memory
from userfault.stores import FileStore, MemoryStore
from userfault.testing import FailingStore, PatternStore, touch

if TYPE_CHECKING:
    from tests.crash.injection.trial import Trial

SIZE = 12 * BLOCK - 1000
PATTERN = PatternStore(SIZE)
EXPECTED = PATTERN.expected(0, SIZE)
BAD = 3 * BLOCK


def prepare(folder: str) -> None:
    """Write the files that the scenes read: one on disk, and one in memory, which is tmpfs for whoever opens it."""
    with open(f"{folder}/data", "wb") as file:
        file.write(EXPECTED)
    memory_file = os.memfd_create("data")
    os.write(memory_file, EXPECTED)
    os.symlink(f"/proc/{os.getpid()}/fd/{memory_file}", f"{folder}/memory")


def first(trial: Trial) -> None:
    """The least that can be done: one block."""
    for region in trial.region("pattern", lambda: PATTERN, blocks=8):
        with trial.step("ensure"):
            region.ensure(0, 1)
        with trial.step("touch"):
            trial.check("touch", touch(region.address + 4 * BLOCK, 8), EXPECTED[4 * BLOCK : 4 * BLOCK + 8])


def files(trial: Trial) -> None:
    """Read a file, in every way."""
    for region in trial.region("file", lambda: FileStore(f"{trial.folder}/data"), blocks=8):
        read(trial, "file", region)
        with trial.step("pinned"), region.pinned(BLOCK, 2 * BLOCK) as view:
            trial.check("pinned", bytes(view), EXPECTED[BLOCK : 3 * BLOCK])
        with trial.step("prefetch"):
            region.prefetch(4 * BLOCK, 4 * BLOCK)
        with trial.step("stats"):
            region.stats()
        with trial.step("residency"):
            region.residency()
        with trial.step("evict"):
            region.evict()
        with trial.step("ensure"):
            region.ensure(4 * BLOCK, 4 * BLOCK)
        read(trial, "file again", region)
    for region in trial.region("file in memory", lambda: FileStore(f"{trial.folder}/memory"), blocks=8):
        read(trial, "file in memory", region)


def others(trial: Trial) -> None:
    """Read and change what comes from memory, and from a store of the user's own."""
    for region in trial.region("memory", lambda: MemoryStore(EXPECTED), "c"):
        change(trial, "memory", region)
    for region in trial.region("pattern", lambda: PATTERN, "c"):
        change(trial, "pattern", region)
        with trial.step("drop a page"):
            with own():
                memory.advise(region.address + 5 * BLOCK, PAGE, abi.MADV_REMOVE)
            trial.check("dropped", touch(region.address + 5 * BLOCK, 8), EXPECTED[5 * BLOCK : 5 * BLOCK + 8])
    with trial.step("abandon"):
        region = userfault.Region(PATTERN, "r", BLOCK)
        pager = region.pager
        trial.check("abandoned", touch(region.address, 8), EXPECTED[:8])
        region.owned_by_views()
        del region
        collect()
    for region in trial.region("another", lambda: PATTERN):  # what has not been sent yet goes out with this
        read(trial, "another", region)
    with trial.step("look for the abandoned"):
        pager = userfault.default_pager()
        trial.until("an abandoned region is closed", lambda: pager.closed or not pager.regions)


def read(trial: Trial, name: str, region: userfault.Region) -> None:
    """Touch every byte."""
    with trial.step(f"read {name}"):
        trial.check(name, bytes(region.memory), EXPECTED)


def change(trial: Trial, name: str, region: userfault.Region) -> None:
    """Change two blocks, and see that all the others are what they were."""
    expected = bytearray(EXPECTED)
    with trial.step(f"change {name}"):
        expected[BLOCK + 5 : BLOCK + 8] = b"new"
        region.memory[BLOCK + 5 : BLOCK + 8] = b"new"
        trial.check(f"change {name}", bytes(region.memory[: 2 * BLOCK]), bytes(expected[: 2 * BLOCK]))
    with trial.step(f"ensure {name}"):
        region.ensure(2 * BLOCK, BLOCK, write=True)
        region.memory[2 * BLOCK] ^= 255
        expected[2 * BLOCK] ^= 255
    with trial.step(f"evict {name}"):
        region.evict()
    with trial.step(f"read {name}"):
        trial.check(name, bytes(region.memory), bytes(expected))


def failing(trial: Trial) -> None:
    """Meet a block that cannot be had, heal its store, and have it."""
    healed = f"{trial.folder}/healed"
    with own():
        if os.path.exists(healed):
            os.unlink(healed)
    for region in trial.region("failing", lambda: FailingStore(SIZE, "broken", (BAD,), healed_by=healed)):
        trial.must_fail("ensure a bad block", partial(region.ensure, BAD, 1), userfault.StoreError)
        with own(), open(healed, "wb"):
            pass
        with trial.step("retry"):
            region.retry(BAD, 1)
            trial.check("retry", bytes(region.memory[BAD : BAD + BLOCK]), EXPECTED[BAD : BAD + BLOCK])


def crowded(trial: Trial) -> None:
    """Touch more than the budget holds again and again, until it has been sampled what is used."""
    store, order = PatternStore(160 * PAGE, concurrency=0), list(range(160))
    random, expected, end = Random(1), store.expected(0, store.size), time.monotonic() + 0.5
    opened: list[userfault.Region] = []
    with trial.step("open crowded"):
        opened.append(userfault.Region(store, "r", PAGE, budget=80 * PAGE))
    for region in opened:
        while time.monotonic() < end:
            random.shuffle(order)
            with trial.step("read crowded"):
                for block in order:
                    trial.check("crowded", touch(region.address + block * PAGE, 8), expected[block * PAGE :][:8])
        with trial.step("close crowded"):
            region.close()
