"""Victims that get signals while they are stopped in a fault."""

from __future__ import annotations

import os
import signal
import statistics
import threading
import time

from tests.crash.programs.common import BLOCK, PAGE, begin, introduce, listen, ones, preadv_all, say, write_all

import userfault
from userfault.testing import PatternStore, SlowStore, touch

BLOCKS = 12
READ_S = 0.05
"""How long the slow store takes for a block."""
PERIOD_S = 0.01
"""Between two signals."""


class Bystander(threading.Thread):
    """Touches a region of its own, and measures how long each fault took."""

    def __init__(self) -> None:
        super().__init__()
        self.store = PatternStore(2048 * PAGE, seed=5)
        self.region = userfault.Region(self.store, "r", PAGE)
        self.over = threading.Event()
        self.taken: list[float] = []
        self.wrong = 0

    def run(self) -> None:
        while not self.over.is_set():
            number = len(self.taken) % 2048
            if not number:
                self.region.evict()
            begun = time.perf_counter()
            data = touch(self.region.address + number * PAGE, 8)
            self.taken.append(time.perf_counter() - begun)
            self.wrong += data != self.store.expected(number * PAGE, 8)
            time.sleep(0.002)  # leave room for the others on a small machine

    def stop(self) -> None:
        self.over.set()
        self.join()


def _read(region: userfault.Region) -> bool:
    with region.memory as memory:
        preadv_all(ones(len(memory)), memory)
        return bytes(memory) == b"\x01" * len(memory)


def _write(region: userfault.Region) -> bool:
    with region.memory as memory:
        return write_all(memory) == PatternStore(len(memory)).expected(0, len(memory))


def _touch(region: userfault.Region) -> bool:
    with region.memory as memory:
        return bytes(memory) == PatternStore(len(memory)).expected(0, len(memory))


WAYS = {"preadv": _read, "write": _write, "touch": _touch}


def alarms(way: str, spinners: int, block_size: int) -> None:
    """Fault on a slow store while signals come to each thread that does; report what that did to the others."""
    signal.signal(signal.SIGALRM, lambda *_: None)
    size = BLOCKS * block_size
    mode = "c" if way == "preadv" else "r"
    store = SlowStore(PatternStore(size), READ_S)
    regions = [userfault.Region(store, mode, block_size) for _ in range(spinners)]
    results: list[bool] = []
    bystander = Bystander()
    threads = [threading.Thread(target=lambda r=region: results.append(WAYS[way](r))) for region in regions[1:]]
    begun = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, PERIOD_S, PERIOD_S)
    bystander.start()
    for thread in threads:
        thread.start()
    threading.Thread(target=_signal_all, args=(threads, bystander.over)).start()
    results.append(WAYS[way](regions[0]))
    for thread in threads:
        thread.join()
    signal.setitimer(signal.ITIMER_REAL, 0)
    took = time.monotonic() - begun
    bystander.stop()
    duplicates = sum(region.stats().duplicates for region in regions)
    say("right", all(results), len(results) == spinners, bystander.wrong)
    milliseconds = [round(1000 * t) for t in (took, statistics.median(bystander.taken), max(bystander.taken))]
    say("times", *milliseconds, round(duplicates / took), len(bystander.taken))


def _signal_all(threads: list[threading.Thread], over: threading.Event) -> None:
    """Signal threads other than the main one, which the timer takes care of."""
    while not over.wait(PERIOD_S):
        for thread in threads:
            if thread.is_alive() and thread.ident is not None:
                signal.pthread_kill(thread.ident, signal.SIGALRM)


def interrupted(way: str) -> None:
    """Be interrupted by Ctrl-C in a fault that takes a while."""
    region = userfault.Region(SlowStore(PatternStore(2 * BLOCK), 0.5), "r", BLOCK)
    memory = region.memory
    assert memory[0]
    introduce(region)
    listen()
    try:
        if way == "touch":
            for _ in range(1000):
                _ = memory[BLOCK]
                time.sleep(0.1)
        elif way == "ensure":
            region.evict()
            region.ensure()
        else:
            reader, writer = os.pipe()
            while True:
                os.write(writer, memory[BLOCK : BLOCK + PAGE])
                os.read(reader, PAGE)
    except KeyboardInterrupt:
        say("interrupted")
    say("right", bytes(memory) == PatternStore(2 * BLOCK).expected(0, 2 * BLOCK))


if __name__ == "__main__":
    begin(globals())
