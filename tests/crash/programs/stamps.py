"""Victims that write one stamp after the other into each block, and note outside of the region how far they are."""

from __future__ import annotations

import contextlib
import math
import mmap
import random
import select
import threading

from tests.crash.programs.common import BLOCK, begin, introduce, listen, say
from tests.crash.programs.stores import WholeBlocksStore

from userfault import FileStore, Region, StoreError

BLOCKS = 48
STAMPS = 251
"""So many different ones there are, of one byte each."""


def stamp(number: int) -> bytes:
    """Return what a block holds after it was written so often."""
    return bytes((number % STAMPS,)) * BLOCK


class Notes:
    """By block: the number of its last stamp, and of the last one that a flush had come after; in a file."""

    def __init__(self, path: str) -> None:
        with open(path, "r+b") as file:
            words = memoryview(mmap.mmap(file.fileno(), 2 * 8 * BLOCKS)).cast("Q")
        self.written, self.flushed = words[:BLOCKS], words[BLOCKS:]


def write_for_ever(path: str, notes: str, seed: int, threads: int, budget: str) -> None:
    """Write and flush in many threads until killed."""
    kept = Notes(notes)
    region = Region(FileStore(path, writable=True), "r+", BLOCK, budget)

    def write(first: int) -> None:
        rng = random.Random(seed + first)
        mine = range(first, BLOCKS, threads)
        with region.memory as memory:
            while True:
                for _ in range(rng.randrange(12)):
                    block = rng.choice(mine)
                    memory[block * BLOCK : block * BLOCK + BLOCK] = stamp(kept.written[block] + 1)
                    kept.written[block] += 1
                region.flush()
                for block in mine:
                    kept.flushed[block] = kept.written[block]

    workers = [threading.Thread(target=write, args=(first,), daemon=True) for first in range(threads)]
    introduce(region)
    for worker in workers:
        worker.start()
    listen()


def flush_whole_blocks(folder: str, blocks: int) -> None:
    """Write all blocks and flush, again and again, until told to stop; each time see that the store has them."""
    store = WholeBlocksStore(folder, blocks, BLOCK)
    wrong, number = [], 0
    with Region(store, "r+", BLOCK, math.inf) as region:
        introduce(region)
        while not select.select([0], [], [], 0)[0]:
            number += 1
            with region.memory as memory:
                for block in range(blocks):
                    memory[block * BLOCK : block * BLOCK + BLOCK] = stamp(number)
            while not try_flush(region):
                pass
            for block in range(blocks):
                with open(store.path(block), "rb") as file:
                    if file.read() != stamp(number):
                        wrong.append((number, block))
        listen()
    say("wrong", *wrong)
    say("flushes", number)


def try_flush(region: Region) -> bool:
    """Flush; False if three workers have been killed in a write, of which it is told."""
    with contextlib.suppress(StoreError):
        region.flush()
        return True
    return False


if __name__ == "__main__":
    begin(globals())
