"""A victim whose worker dies between the two halves of a transition: the state is written, the kernel not told yet.

Everything that changes a block's state is done once: fill, first write, evict, fail, retry; then all is checked: each
byte, the states against the pages that the kernel has, the counters, the pins.
"""

from __future__ import annotations

import os
import threading
import time

from tests.crash.programs.common import BLOCK, PAGE, begin, say, write_all
from tests.crash.programs.stores import MinedStore

import userfault
from userfault import BlockState
from userfault.blocks import ledger
from userfault.kernel import memfd
from userfault.stores import FileStore, Store
from userfault.testing import PatternStore

BLOCKS = 16
SIZE = BLOCKS * BLOCK - 1000
BUDGET = 8
READERS = 8
"""Each may install one block more at the same time."""
BAD = 13
"""A block that the store cannot give."""
WRITTEN = (2, 7)
PINNED = 5


class Scenario:
    """One region, what it should hold, and what may be done with it."""

    def __init__(self, kind: str, mine: tuple[str, str, int], folder: str) -> None:
        function, moment, times = mine
        self.path = os.path.join(folder, "mine")
        self.healed = os.path.join(folder, "healed")
        self.expected = bytearray(PatternStore(SIZE).expected(0, SIZE))
        self.has_bad = kind != "file"
        store: Store = MinedStore(SIZE, (function, moment, self.path, times), kind, BAD * BLOCK, self.healed)
        self.over, self.laid = threading.Event(), threading.Event()
        self.layer = None
        if kind == "file":
            self.layer = threading.Thread(target=self.lay_mines, args=(store,))
            self.layer.start()
            self.laid.wait()
            store = self.make_file(os.path.join(folder, "data"))
        self.region = userfault.Region(store, "c", BLOCK, budget=BUDGET * BLOCK)
        self.memory = self.region.memory

    def make_file(self, path: str) -> FileStore:
        with open(path, "wb") as file:
            file.write(self.expected)
        return FileStore(path)

    def lay_mines(self, store: Store) -> None:
        """Have a store made in each worker whose making lays the mine there; a file's has no such power."""
        with userfault.Region(store, "r", BLOCK) as region:
            self.laid.set()
            while not self.over.is_set():
                region.ensure(0, 1)
                region.evict()

    def run(self) -> None:
        """Everything, in an order in which each thing meets the others."""
        self.read()
        self.write()
        self.read()
        with self.region.pinned(PINNED * BLOCK, BLOCK):
            self.read_backwards()
            self.region.evict()
            assert self.states()[PINNED] == BlockState.CLEAN, "a pinned block was dropped"
            self.read()
        if self.has_bad:
            self.fail()
        self.read_in_threads()
        self.region.ensure(0, 3 * BLOCK)
        self.region.evict()
        self.check_pages()
        if self.has_bad:
            self.heal()
        self.read(bad=True)
        self.check_pages()

    def close(self) -> None:
        """End the region, and the pager."""
        pager = self.region.pager
        self.over.set()
        if self.layer:
            self.layer.join()
        self.memory.release()
        self.region.close()
        pager.close()

    # -- steps -----------------------------------------------------------------------------------------------

    def read(self, *, bad: bool = False) -> None:
        for block in range(BLOCKS):
            if bad or block != BAD:
                self.check(block)

    def read_backwards(self) -> None:
        for block in reversed(range(BLOCKS)):
            if block != BAD:
                self.check(block)

    def read_in_threads(self) -> None:
        """Let threads meet on the same blocks, in a system call."""
        blocks = [block for block in range(BLOCKS) if block != BAD]
        failed = []

        def read(order: list[int]) -> None:
            for block in order:
                start, end = self.span(block)
                if write_all(self.memory[start:end]) != self.expected[start:end]:
                    failed.append(block)

        threads = [threading.Thread(target=read, args=(order,)) for order in (blocks, blocks, blocks[::-1])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed, failed

    def write(self) -> None:
        for block in WRITTEN:
            for page in (1, 3):
                at = block * BLOCK + page * PAGE + 17
                if block != WRITTEN[0]:  # the first is filled for the write
                    assert self.memory[at] == self.expected[at]
                self.memory[at : at + 5] = self.expected[at : at + 5] = b"mine!"

    def fail(self) -> None:
        for _ in range(2):
            try:
                self.region.ensure(BAD * BLOCK, 1)
            except userfault.StoreError:
                continue
            raise AssertionError("no StoreError")
        try:
            write_all(self.memory[BAD * BLOCK : BAD * BLOCK + PAGE])
        except OSError as error:
            assert error.errno == 14, error  # noqa: PT017  # EFAULT
        else:
            raise AssertionError("a failed block can be read")

    def heal(self) -> None:
        with open(self.healed, "w", encoding="ascii"):
            pass
        self.region.retry(BAD * BLOCK, 1)
        self.check(BAD)

    # -- looking ---------------------------------------------------------------------------------------------

    def span(self, block: int) -> tuple[int, int]:
        return block * BLOCK, min(block * BLOCK + BLOCK, SIZE)

    def check(self, block: int) -> None:
        start, end = self.span(block)
        got = bytes(self.memory[start:end])
        if got != self.expected[start:end]:
            raise AssertionError(f"block {block}: {got.count(0)} zeros, state {self.states()[block]}")

    def states(self) -> bytes:
        return self.region.residency()

    def check_pages(self) -> None:
        """The states say what the kernel says, and the counters too; the budget holds."""
        while any(state in (BlockState.FILLING, BlockState.EVICTING) for state in self.states()):
            time.sleep(0.001)  # a thread of the application goes on a moment before the worker has written it down
        stats, states, there = self.region.stats(), self.states(), present(self.region)
        for block, state in enumerate(states):
            pages = -(-(self.span(block)[1] - self.span(block)[0]) // PAGE)
            if state in (BlockState.CLEAN, BlockState.PRIVATE):
                assert there[block] == pages, f"block {block}: state {state}, {there[block]} pages"
            else:
                assert not there[block], f"block {block}: state {state}, but {there[block]} pages are there"
        resident = sum(state in (BlockState.CLEAN, BlockState.PRIVATE) for state in states)
        assert abs(stats.resident_bytes - resident * BLOCK) < BLOCK, (stats.resident_bytes, resident)
        assert resident <= BUDGET + READERS, resident
        assert stats.pinned_bytes == 0
        assert [block for block, state in enumerate(states) if state == BlockState.PRIVATE] == list(WRITTEN)

    def deaths(self) -> int:
        try:
            return os.stat(f"{self.path}.deaths").st_size
        except FileNotFoundError:
            return 0


def present(region: userfault.Region) -> list[int]:
    """How many pages of each block the kernel has."""
    pages = [0] * len(region.residency())
    folder = f"/proc/{region.pager.pid}/fd"
    fds = [
        os.open(f"{folder}/{name}", os.O_RDONLY)
        for name in os.listdir(folder)
        if "userfault-region" in os.readlink(f"{folder}/{name}")
    ]
    fd = next(fd for fd in fds if ledger.read_words(fd)[ledger.W_ADDRESS] == region.address)
    for start, end in memfd.data_extents(fd, 0, -(-region.size // PAGE) * PAGE):
        for at in range(start, end, PAGE):
            pages[at // BLOCK] += 1
    for fd in fds:
        os.close(fd)
    return pages


def run(kind: str, mine: tuple[str, str, int], folder: str) -> None:
    """Go through all of it."""
    scenario = Scenario(kind, mine, folder)
    scenario.run()
    scenario.close()
    say("over", scenario.deaths())


if __name__ == "__main__":
    begin(globals())
