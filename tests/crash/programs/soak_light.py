"""A victim of the death of its whole pager: it starts quickly, reads in threads, and checks each byte."""

from __future__ import annotations

import faulthandler
import mmap
import os
import random
import sys
import threading
import time
from typing import TYPE_CHECKING

from tests.crash.programs.common import BLOCK, begin, introduce, listen, say

import userfault
from userfault.stores import FileStore
from userfault.testing import PatternStore, touch

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCKS = 16
SIZE = BLOCKS * BLOCK - 1000
BUDGET = 4 * BLOCK


class Work:
    """What the threads share: a truth, and regions that hold it."""

    def __init__(self, path: str, seed: int, words: memoryview) -> None:
        self.words = words
        self.over = threading.Event()
        self.seed = seed
        self.wrong = 0
        store = PatternStore(SIZE)
        self.truth = store.expected(0, SIZE)
        self.regions = [
            userfault.Region(FileStore(path), "r", BLOCK, BUDGET),
            userfault.Region(store, "r", BLOCK, BUDGET),
            userfault.Region(PatternStore(SIZE, concurrency=0), "c", 4096, BUDGET),
        ]

    def repeat(self, number: int, read: Callable[[userfault.Region, int, int], bytes]) -> None:
        """Read at random, compare, drop; until it is over."""
        rng = random.Random(self.seed + number)
        try:
            while not self.over.is_set():
                region = rng.choice(self.regions)
                start = rng.randrange(SIZE)
                stop = min(start + rng.choice((1, 5000, BLOCK)), SIZE)
                self.compare(start, stop, read(region, start, stop))
                if rng.random() < 0.1:
                    region.evict()
                self.words[number] += 1
        except userfault.PagerLostError:  # it is known a moment before the end comes
            time.sleep(30)
        except BaseException as error:  # noqa: BLE001  # the test is to hear of it, whatever it is
            say("WRONG", type(error).__name__)
            sys.excepthook(*sys.exc_info())

    def compare(self, start: int, stop: int, got: bytes) -> None:
        if got != self.truth[start:stop]:
            self.wrong += 1
            say("WRONG", start, stop, got.count(0))


def with_gil(region: userfault.Region, start: int, stop: int) -> bytes:
    return bytes(region.memory[start:stop])


def without_gil(region: userfault.Region, start: int, stop: int) -> bytes:
    return touch(region.address + start, stop - start)


def pinned(region: userfault.Region, start: int, stop: int) -> bytes:
    with region.pinned(start, min(stop - start, 1000)) as view:
        return bytes(view) + region.memory[start + len(view) : stop].tobytes()


WAYS = (with_gil, without_gil, pinned)


def run(folder: str, path: str, seed: int, with_faulthandler: bool) -> None:
    """Read until told to stop; then read everything once more."""
    if with_faulthandler:
        faulthandler.enable()
    with open(os.path.join(folder, "pulse"), "r+b") as file:
        words = memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")
    work = Work(path, seed, words)
    threads = [threading.Thread(target=work.repeat, args=pair) for pair in enumerate(WAYS)]
    introduce(work.regions[0])
    for thread in threads:
        thread.start()
    listen()
    work.over.set()
    for thread in threads:
        thread.join()
    for region in work.regions:
        region.evict()
        work.compare(0, SIZE, bytes(region.memory))
    say("over", work.wrong)


if __name__ == "__main__":
    begin(globals())
