"""A victim that reads, writes and asks in every way it can, and checks every byte, until it is told to stop."""

from __future__ import annotations

import os
import random
import sys
import threading
import time
import zlib
from typing import TYPE_CHECKING

import numpy as np
from tests.crash.programs.common import BLOCK, PAGE, begin, introduce, listen, preadv_all, say, write_all

import userfault
from userfault.stores import FileStore
from userfault.testing import PatternStore

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 64 * BLOCK
SLOW_S = 0.005
"""A step that takes longer has met a death."""


class Work:
    """What all the scanning threads share: when to stop, what went wrong, how long they were held up."""

    def __init__(self, folder: str, seed: int) -> None:
        self.over = threading.Event()
        self.rng = random.Random(seed)
        self.wrong: list[str] = []
        self.pauses: list[float] = []
        self.steps: dict[str, int] = {}
        self.data = self.rng.randbytes(SIZE)
        self.path = os.path.join(folder, "data")
        with open(self.path, "wb") as file:
            file.write(self.data)
        self.sums = [zlib.crc32(self.data[at : at + BLOCK]) for at in range(0, SIZE, BLOCK)]
        self.regions: list[userfault.Region] = []

    def open(self, mode: str, block_size: int, *, pattern: bool = False) -> userfault.Region:
        """Open a region that holds a quarter of its bytes."""
        store = PatternStore(SIZE, seed=3) if pattern else FileStore(self.path)
        self.regions.append(userfault.Region(store, mode, block_size, budget=SIZE // 4))
        return self.regions[-1]

    def scan(self, name: str, step: Callable[[int], bool]) -> None:
        """Take step after step until it is over; each says whether all was right."""
        number = 0
        try:
            while not self.over.is_set():
                begun = time.perf_counter()
                if not step(number):
                    self.wrong.append(f"{name}:{number}")
                took = time.perf_counter() - begun
                if took > SLOW_S:
                    self.pauses.append(took)
                number += 1
        except BaseException as error:  # noqa: BLE001  # the test is to hear of it, whatever it is
            self.wrong.append(f"{name}:{type(error).__name__}")
            sys.excepthook(*sys.exc_info())
        self.steps[name] = number

    # -- the ways --------------------------------------------------------------------------------------------

    def checksums(self) -> Callable[[int], bool]:
        """In C code that lets go of the GIL."""
        memory = self.open("r", BLOCK).memory

        def step(number: int) -> bool:
            block = number % len(self.sums)
            return zlib.crc32(memory[block * BLOCK : (block + 1) * BLOCK]) == self.sums[block]

        return step

    def sums_of_pages(self) -> Callable[[int], bool]:
        """In NumPy, which keeps the GIL; a 4 KiB block at a time, out of a store that computes."""
        region = self.open("r", PAGE, pattern=True)
        expected = np.frombuffer(PatternStore(SIZE, seed=3).expected(0, SIZE), np.uint64)
        array = np.frombuffer(region.memory, np.uint64)
        length = 4 * PAGE // 8

        def step(number: int) -> bool:
            at = (number * 7 % (SIZE // PAGE // 4)) * length
            return bool(array[at : at + length].sum() == expected[at : at + length].sum())

        return step

    def system_calls(self) -> Callable[[int], bool]:
        """In system calls that read the memory."""
        memory = self.open("r", BLOCK).memory

        def step(number: int) -> bool:
            at = number * 13 % 64 * BLOCK
            return write_all(memory[at : at + BLOCK]) == self.data[at : at + BLOCK]

        return step

    def writes(self) -> Callable[[int], bool]:
        """Changes of a private copy, from Python and from the kernel; what was written stays."""
        region = userfault.Region(FileStore(self.path), "c", BLOCK)
        self.regions.append(region)
        memory, mine, rng = region.memory, bytearray(self.data), random.Random(self.rng.random())
        source = os.open(self.path, os.O_RDONLY)

        def step(number: int) -> bool:
            at = rng.randrange(SIZE - PAGE)
            if number % 4 == 0:
                preadv_all(source, memory[at : at + PAGE])
                mine[at : at + PAGE] = self.data[:PAGE]
            elif number % 4 == 1:
                memory[at : at + 8] = mine[at : at + 8] = number.to_bytes(8, "little")
            else:
                start = at & -BLOCK
                return bytes(memory[start : start + BLOCK]) == mine[start : start + BLOCK]
            return True

        return step

    def requests(self) -> Callable[[int], bool]:
        """Everything that one can ask a pager."""
        region = self.open("c", BLOCK)
        memory, rng = region.memory, random.Random(self.rng.random())

        def step(number: int) -> bool:
            block = rng.randrange(48)
            at, length = block * BLOCK, rng.randrange(1, 4 * BLOCK)
            if number % 5 == 0:
                region.evict(at, length)
            elif number % 5 == 1:
                region.prefetch(at, length)
            elif number % 5 == 2:
                region.ensure(at, length)
            elif number % 5 == 3:
                region.retry(at, length)
                return region.stats().pinned_bytes == 0
            else:
                with region.pinned(at, length) as view:
                    return region.evict(at, length) >= 0 and view == self.data[at : at + length]
            return bytes(memory[at : at + length]) == self.data[at : at + length]

        return step

    def openings(self) -> Callable[[int], bool]:
        """Regions that come and go: closed, or forgotten with the last view of them."""

        def step(number: int) -> bool:
            at = number % 32 * BLOCK
            expected = self.data[at : at + BLOCK + 5]
            region = userfault.Region(FileStore(self.path, offset=at, size=BLOCK + 5), "rc"[number % 2], PAGE)
            view = region.memory
            if number % 3:
                region.owned_by_views()
                del region
                return view == expected
            right = view == expected
            view.release()
            region.close()
            return right

        return step


def scan(folder: str, seed: int) -> None:
    """Scan until the test has had enough; then say how it was."""
    work = Work(folder, seed)
    ways = {
        "checksums": work.checksums(),
        "sums": work.sums_of_pages(),
        "system calls": work.system_calls(),
        "writes": work.writes(),
        "requests": work.requests(),
        "openings": work.openings(),
    }
    threads = [threading.Thread(target=work.scan, args=way, name=way[0]) for way in ways.items()]
    introduce(work.regions[0])
    for thread in threads:
        thread.start()
    listen()
    work.over.set()
    for thread in threads:
        thread.join()
    for region in work.regions[:3]:
        region.evict()
    last = [ways[name](number) for name in ways for number in range(len(work.sums))]
    say("wrong", len(work.wrong) + last.count(False), *work.wrong[:5])
    say("steps", *work.steps.values())
    say("restarts", work.regions[0].pager.restarts)
    say("pauses", *(round(1000 * pause) for pause in sorted(work.pauses)))
    for region in work.regions:
        say("budget", region.stats().resident_bytes, region.budget)
    pager = work.regions[0].pager
    while pager.regions > len(work.regions):  # what was forgotten is closed some time soon
        time.sleep(0.001)
    say("regions", len(work.regions))
    listen()


if __name__ == "__main__":
    begin(globals())
