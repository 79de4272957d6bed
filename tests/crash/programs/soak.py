"""The victim of the soak: many regions, many threads, every way to read and to change memory, each byte checked.

It runs until it is told to stop, whatever is done to its pager meanwhile; then it reads everything once more, compares
what the states say with what the kernel has, and writes its results down.
"""

from __future__ import annotations

import faulthandler
import json
import logging  # noqa: F401  # its first import must not come in the middle of another thread's fork
import mmap
import os
import random
import signal
import sys
import threading
from typing import TYPE_CHECKING

from tests.crash.programs.common import begin, introduce, listen, say
from tests.crash.programs.soak_errands import Errands
from tests.crash.programs.soak_patches import Patch, lay_out
from tests.crash.programs.soak_steps import Walker
from tests.crash.programs.soak_tally import Tally

if TYPE_CHECKING:
    from collections.abc import Callable

WALKERS = 6


class Soak:
    """Everything that the threads share."""

    def __init__(self, folder: str, seed: int, words: memoryview) -> None:
        rng = random.Random(seed)
        self.folder = folder
        self.over = threading.Event()
        self.patches = lay_out(folder)
        self.tallies = [Tally(f"walker {n}", words, n) for n in range(WALKERS)]
        self.tallies.append(Tally("errands", words, WALKERS))
        self.walkers = [Walker(self.patches, rng.randrange(1 << 32), tally) for tally in self.tallies[:WALKERS]]
        self.errands = Errands(self.patches, folder, rng.randrange(1 << 32), self.tallies[-1])

    def run(self) -> None:
        """Let the threads work until the test says so."""
        steps: list[Callable[[], None]] = [walker.step for walker in self.walkers]
        steps.append(lambda: self.errands.step(self.over))
        threads = [
            threading.Thread(target=self.repeat, args=pair, name=pair[1].name)
            for pair in zip(steps, self.tallies, strict=True)
        ]
        for thread in threads:
            thread.start()
        listen()
        self.over.set()
        for thread in threads:
            thread.join()

    def repeat(self, step: Callable[[], None], tally: Tally) -> None:
        try:
            while not self.over.is_set():
                step()
        except BaseException as error:  # noqa: BLE001  # the test is to hear of it, whatever it is
            tally.complain(f"{type(error).__name__}: {error}")
            sys.excepthook(*sys.exc_info())

    def check_all(self) -> None:
        """Read everything once more; the states say what the kernel says, and the budgets hold."""
        tally, walker = self.tallies[0], self.walkers[0]
        for patch in self.patches:
            if excess := patch.over_budget():
                tally.complain(f"{patch.name}: {excess} bytes are in memory beyond its budget")
            walker.check_all(patch)
            for complaint in patch.odd_blocks():
                tally.complain(f"{patch.name}: {complaint}")

    def results(self) -> dict[str, object]:
        pager = self.patches[0].region.pager
        return {
            "threads": [tally.results() for tally in self.tallies],
            "regions": {patch.name: counters(patch) for patch in self.patches},
            "restarts": pager.restarts,
            "open": pager.regions - len(self.patches),
        }


def counters(patch: Patch) -> dict[str, int]:
    """Return a region's counters: as far as its workers lived to write them down."""
    stats = patch.region.stats()
    names = ("faults", "blocks_filled", "bytes_read", "evictions", "retries", "failures", "duplicates")
    return {name: getattr(stats, name) for name in names}


def run(folder: str, seed: int) -> None:
    """Go on until the test says so; leave the results in a file."""
    faulthandler.register(signal.SIGUSR1)
    with open(os.path.join(folder, "pulse"), "r+b") as file:
        words = memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")
    soak = Soak(folder, seed, words)
    introduce(soak.patches[0].region)
    soak.run()
    soak.check_all()
    with open(os.path.join(folder, "results.json"), "w", encoding="ascii") as file:
        json.dump(soak.results(), file)
    say("over")
    for patch in soak.patches:
        patch.close()


if __name__ == "__main__":
    begin(globals())
