"""A victim that changes far more than its budget holds, from many threads that do not hold the GIL while they fault.

The model is one number for each page, since the array itself would be as large as the file.  Threads that share blocks
own pages of their own in them: so a write-back always races with somebody's change.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import os
import random
import threading
import time

from tests.crash.programs.common import PAGE, begin, introduce, say

from userfault import FileStore, Region

_LIBC = ctypes.CDLL(None)  # calls let go of the GIL
_LIBC.memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class Adder(threading.Thread):
    """Adds to a number on pages that are its own, at random, and keeps the sums."""

    def __init__(self, region: Region, model: array.array[int], first: int, step: int) -> None:
        super().__init__(daemon=True)
        self.region, self.model, self.rng = region, model, random.Random(first)
        self.pages = range(first, len(model), step)
        self.additions = self.wrong = 0
        self.over = False

    def run(self) -> None:
        """Add until it is over."""
        number = ctypes.c_uint64()
        here, base, copy = ctypes.addressof(number), self.region.address, _LIBC.memmove
        while not self.over:
            page = self.rng.choice(self.pages)
            at = base + page * PAGE + page % 500 * 8
            copy(here, at, 8)
            self.wrong += number.value != self.model[page]
            number.value = self.model[page] = self.model[page] + self.rng.randrange(1, 1 << 32)
            copy(at, here, 8)
            self.additions += 1


def memory_of(region: Region) -> int:
    """Return the bytes that stand behind a region: its memfd, and what its processes have of their own besides."""
    own = 0
    for pid in (os.getpid(), region.pager.pid, region.pager.worker_pid):
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
            figures = dict(line.split(":", 1) for line in list(file)[1:])
        own += int(figures["Pss_Anon"].split()[0]) << 10
    return own + _memfds(region.pager.worker_pid)


def _memfds(pid: int) -> int:
    total = 0
    for fd in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{fd}"
        if os.readlink(path).startswith("/memfd:userfault-region"):
            total += os.stat(path).st_blocks * 512
    return total


def add(path: str, threads: int, budget: str, seconds: float) -> None:
    """Open a file that is larger than the budget; add to it for a while; close it, and compare it with the model."""
    pages = os.path.getsize(path) // PAGE
    model = array.array("Q", bytes(8 * pages))  # all of its memory is there before we look at how much we have
    with Region(FileStore(path, writable=True), "r+", budget=1 << 20) as small:
        before = memory_of(small)
    region = Region(FileStore(path, writable=True), "r+", budget=budget)
    introduce(region)
    adders = [Adder(region, model, first, threads) for first in range(threads)]
    for adder in adders:
        adder.start()
    most = most_resident = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.05)  # between two looks
        with contextlib.suppress(OSError, KeyError):  # a worker that was killed has none
            most = max(most, memory_of(region) - before)
        most_resident = max(most_resident, region.stats().resident_bytes)
    for adder in adders:
        adder.over = True
    for adder in adders:
        adder.join()
    stats = region.stats()
    say("wrong", sum(adder.wrong for adder in adders))
    say("memory", most, most_resident, region.budget)
    say("did", sum(adder.additions for adder in adders), stats.faults, stats.evictions, stats.refaults)
    say("wrote", stats.bytes_written, round(1e6 * stats.write_latency.percentile(99)))
    region.close()
    say("different", _different(path, model))


def _different(path: str, model: array.array[int]) -> int:
    different = 0
    with open(path, "rb") as file:
        for page, number in enumerate(model):
            data = file.read(PAGE)
            at = page % 500 * 8
            different += int.from_bytes(data[at : at + 8], "little") != number or any(data[:at]) or any(data[at + 8 :])
    return different


if __name__ == "__main__":
    begin({"add": add})
