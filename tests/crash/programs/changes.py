"""Victims that change memory which is written back, with a model kept beside it."""

from __future__ import annotations

import os
import random
import threading
import time
from typing import TYPE_CHECKING

from tests.crash.programs.common import BLOCK, begin, introduce, listen, say
from tests.crash.programs.stores import LateWritingStore

from userfault import FileStore, Region

if TYPE_CHECKING:
    from collections.abc import Callable


class Part:
    """A part of a region that one thread changes, and what ought to be there."""

    def __init__(self, region: Region, start: int, model: bytearray, seed: int) -> None:
        self.region, self.start, self.model = region, start, model
        self.rng = random.Random(seed)
        self.wrong: list[int] = []
        self.steps = 0
        self.longest = 0.0
        self.over = False

    def run(self) -> None:
        """Change and compare until it is over."""
        does: list[Callable[[], None]] = [self.write] * 12 + [self.read] * 6 + [self.flush, self.evict, self.add]
        while not self.over:
            begun = time.monotonic()
            self.rng.choice(does)()
            self.longest = max(self.longest, time.monotonic() - begun)
            self.steps += 1

    def _range(self, most: int = 3 * BLOCK) -> tuple[int, int]:
        length = min(int(self.rng.expovariate(0.001)) + 1, most)
        return self.rng.randrange(len(self.model) - length), length

    def write(self) -> None:
        """Write bytes that were not there."""
        at, length = self._range()
        data = self.rng.randbytes(length)
        with self.region.memory as memory:
            memory[self.start + at : self.start + at + length] = data
        self.model[at : at + length] = data

    def add(self) -> None:
        """Read, modify and write one byte in each of many blocks."""
        with self.region.memory as memory:
            for at in range(self.rng.randrange(BLOCK), len(self.model), BLOCK):
                value = (memory[self.start + at] + 1) % 256
                self.model[at] = (self.model[at] + 1) % 256
                if value != self.model[at]:
                    self.wrong.append(self.start + at)
                memory[self.start + at] = value

    def read(self) -> None:
        """Compare a range."""
        at, length = self._range(8 * BLOCK)
        with self.region.memory as memory:
            if memory[self.start + at : self.start + at + length] != self.model[at : at + length]:
                self.wrong.append(self.start + at)

    def flush(self) -> None:
        """Have everything written back."""
        self.region.flush()

    def evict(self) -> None:
        """Have a range dropped."""
        at, length = self._range(len(self.model) // 2)
        self.region.evict(self.start + at, length)


def scribble(path: str, seed: int, threads: int, budget: str, block_size: int) -> None:
    """Change a file in many threads, until told to stop; then close it, and compare it with the model."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        content = file.read()
    region = Region(FileStore(path, writable=True), "r+", block_size, budget)
    share = size // threads
    parts = [
        Part(region, start, bytearray(content[start : start + share]), seed + start)
        for start in range(0, share * threads, share)
    ]
    workers = [threading.Thread(target=part.run) for part in parts]
    introduce(region)
    for worker in workers:
        worker.start()
    most = 0
    say("changing")
    while not listen():
        pass
    for part in parts:
        part.over = True
    for worker in workers:
        worker.join()
    most = region.stats().resident_bytes
    say("wrong", *(place for part in parts for place in part.wrong))
    say("steps", *(part.steps for part in parts))
    say("resident", most, region.budget)
    restarts = region.pager.restarts
    region.close()
    with open(path, "rb") as file:
        now = file.read()
    model = b"".join(bytes(part.model) for part in parts) + content[share * threads :]
    say("different", sum(now[at : at + BLOCK] != model[at : at + BLOCK] for at in range(0, size, BLOCK)))
    say("restarts", restarts, round(1000 * max(part.longest for part in parts)))


def leave_changes(path: str, seed: int) -> None:
    """Change much, flush, change more; then be killed, or end without a word."""
    rng = random.Random(seed)
    region = Region(FileStore(path, writable=True), "r+", budget="1MiB")
    introduce(region)
    for word in ("flushed", "dirty"):
        with region.memory as memory:
            for at in range(0, region.size, BLOCK // 2):
                memory[at : at + 100] = rng.randbytes(100)
        if word == "flushed":
            region.flush()
        say(word)
    listen()
    os._exit(7)


def expected(content: bytes, seed: int) -> bytes:
    """Return what `leave_changes` makes of a file."""
    rng, model = random.Random(seed), bytearray(content)
    for _ in range(2):
        for at in range(0, len(content), BLOCK // 2):
            model[at : at + 100] = rng.randbytes(100)
    return bytes(model)


def close_while_writing(path: str, log: str) -> None:
    """Close a region of which a block is being written at that time."""
    region = Region(LateWritingStore(path, log), "r+")
    region.pin(0, BLOCK, write=True)  # and so it stays dirty
    with region.memory as memory:
        memory[:6] = b"pinned"
    region.close()
    with open(log, encoding="ascii") as file:
        say("order", *file.read().split())
    with open(path, "rb") as file:
        say("found", file.read(6).decode())


if __name__ == "__main__":
    begin(globals())
