"""A victim whose worker dies between two steps of a write-back, while another thread writes to the same blocks.

Everything is changed, flushed and dropped, again and again, until the worker has died often enough; after each flush
what was changed before it is in the file, and at the end every byte is, and the states say what the kernel says.
"""

from __future__ import annotations

import os
import random
import threading
import time
from typing import TYPE_CHECKING

from tests.crash.programs.common import BLOCK, PAGE, begin, say
from tests.crash.programs.stores import MinedFileStore, MinedStore
from tests.crash.programs.transitions import present

import userfault
from userfault import BlockState
from userfault.stores import FileStore
from userfault.testing import PatternStore

if TYPE_CHECKING:
    from userfault.stores import Store

BLOCKS = 16
SIZE = BLOCKS * BLOCK - 1000
BUDGET = 8
READERS = 8
"""Each may install one block more at the same time."""
ROUNDS = 60
"""In which the worker has to have died as often as it should."""
OURS, THEIRS = (1, 3), 2
"""Pages of each block that this thread changes, and the one that another thread does."""


class Scenario:
    """One region, what it and its file should hold, and somebody who disturbs."""

    def __init__(self, kind: str, mine: tuple[str, str, int], folder: str) -> None:
        function, moment, self.times = mine
        self.counts = os.path.join(folder, "mine")
        self.path = os.path.join(folder, "data")
        laid = (function, moment, self.counts, self.times)
        self.model = bytearray(PatternStore(SIZE).expected(0, SIZE))
        with open(self.path, "wb") as file:
            file.write(self.model)
        store: Store = MinedFileStore(self.path, laid) if kind == "own" else FileStore(self.path, writable=True)
        self.layer = userfault.Region(MinedStore(4 * BLOCK, laid, "hot", -1, ""), "r", BLOCK)
        self.layer.ensure(0, 1)
        self.region = userfault.Region(store, "r+", BLOCK, budget=BUDGET * BLOCK)
        self.memory = self.region.memory
        self.over = False
        self.wrong: list[str] = []

    def run(self) -> None:
        """Change, flush and drop, while another thread changes; then look at everything."""
        other = threading.Thread(target=self.disturb, daemon=True)
        other.start()
        rounds = 0
        while rounds < 2 or (self.deaths() < self.times and rounds < ROUNDS):
            self.change(rounds)
            self.region.flush()
            self.compare("a flush", [page for page in range(SIZE // PAGE) if page % (BLOCK // PAGE) in OURS])
            self.region.evict()
            self.read()
            self.keep_pager()
            rounds += 1
        self.over = True
        other.join()
        assert not self.wrong, self.wrong
        self.finish()

    def finish(self) -> None:
        """Flush for the last time, and close."""
        assert self.memory == self.model, "a change is lost"
        self.region.flush()
        self.compare("the last flush", list(range(-(-SIZE // PAGE))))
        self.check_states()
        pager = self.region.pager
        self.memory.release()
        self.region.close()
        self.layer.close()
        pager.close()
        self.compare("close", list(range(-(-SIZE // PAGE))))

    # -- steps -----------------------------------------------------------------------------------------------

    def change(self, number: int) -> None:
        """Write to our pages of each block."""
        for block in range(BLOCKS):
            for page in OURS:
                self.put(block * BLOCK + page * PAGE + 17, f"{number:08}".encode())

    def put(self, at: int, data: bytes) -> None:
        self.model[at : at + len(data)] = data
        self.memory[at : at + len(data)] = data

    def disturb(self) -> None:
        """Write to the other pages all the time, and read them back."""
        rng, number = random.Random(1), 0
        while not self.over:
            number += 1
            at = rng.randrange(BLOCKS) * BLOCK + THEIRS * PAGE + rng.randrange(PAGE - 8)
            self.put(at, number.to_bytes(8, "little"))
            at = rng.randrange(BLOCKS) * BLOCK + THEIRS * PAGE
            if self.memory[at : at + PAGE] != self.model[at : at + PAGE]:
                self.wrong.append(f"block {at // BLOCK}")
            time.sleep(0)  # so that the other thread gets on too

    def keep_pager(self) -> None:
        """Have something filled, which makes a restart one that does not count."""
        self.layer.ensure(0, 1)
        self.layer.evict()

    # -- looking ---------------------------------------------------------------------------------------------

    def read(self) -> None:
        """Compare our pages in memory."""
        for block in range(BLOCKS):
            for page in OURS:
                at = block * BLOCK + page * PAGE
                assert self.memory[at : at + PAGE] == self.model[at : at + PAGE], f"block {block} in memory"

    def compare(self, when: str, pages: list[int]) -> None:
        """Compare pages of the file."""
        with open(self.path, "rb") as file:
            content = file.read()
        assert len(content) == SIZE, when
        wrong = [page for page in pages if content[page * PAGE :][:PAGE] != self.model[page * PAGE :][:PAGE]]
        assert not wrong, f"after {when} pages are not in the file: {wrong}, states {self.region.residency().hex()}"

    def check_states(self) -> None:
        """Nothing is on its way any more: what is there is clean, the kernel has it, and the budget holds."""
        while set(self.region.residency()) & {BlockState.FILLING, BlockState.EVICTING}:
            time.sleep(0.001)  # a thread of the application goes on a moment before the worker has written it down
        states, pages, stats = self.region.residency(), present(self.region), self.region.stats()
        assert set(states) <= {BlockState.ABSENT, BlockState.CLEAN}, states.hex()
        for block, state in enumerate(states):
            whole = -(-min(BLOCK, SIZE - block * BLOCK) // PAGE)
            assert pages[block] == (whole if state else 0), f"block {block}: state {state}, {pages[block]} pages"
        resident = len(states) - states.count(BlockState.ABSENT)
        assert resident <= BUDGET + READERS
        assert abs(stats.resident_bytes - resident * BLOCK) < BLOCK, (stats.resident_bytes, resident)
        assert (stats.dirty_bytes, stats.pinned_bytes) == (0, 0)

    def deaths(self) -> int:
        try:
            return os.stat(f"{self.counts}.deaths").st_size
        except FileNotFoundError:
            return 0


def run(kind: str, mine: tuple[str, str, int], folder: str) -> None:
    """Go through all of it."""
    scenario = Scenario(kind, mine, folder)
    scenario.run()
    say("over", scenario.deaths())


if __name__ == "__main__":
    begin(globals())
