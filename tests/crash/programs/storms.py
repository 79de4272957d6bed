"""Victims that fork while everything else goes on: threads open, touch, evict and close, and somebody kills workers."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import random
import signal
import subprocess
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Self

import numpy as np
from tests.crash.programs.common import BLOCK, begin, listen, say
from tests.crash.programs.forks import STORE, in_child, right

import userfault
from userfault.testing import PatternStore, touch

SIZE = 8 * BLOCK
OURS = ("userfault", "socket:")


def holdings() -> list[str]:
    """What this process holds that looks like a pager's."""
    held = []
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own
            held.append(os.readlink(f"/proc/self/fd/{entry}"))
    with open("/proc/self/maps", encoding="utf-8") as maps:
        return [line.strip() for line in (*held, *maps) if any(word in line for word in OURS)]


def kill_worker(region: userfault.Region) -> None:
    """Kill a worker, and wait until the next one has done something: five that have not would be too many."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(region.pager.worker_pid, signal.SIGKILL)
    region.ensure(0, 1)


class Bustle:
    """Threads that open, touch, evict and close regions, and one that kills workers; `wrong` bytes are counted."""

    def __init__(self, openers: int, kill_every: float = 0.0, *, pagers: bool = False) -> None:
        self.base = userfault.Region(PatternStore(SIZE, seed=99), "r", BLOCK)
        self.over = threading.Event()
        self.wrong = self.opened = self.killed = 0
        self.threads = [threading.Thread(target=self._open, args=(seed,)) for seed in range(openers)]
        if kill_every:
            self.threads.append(threading.Thread(target=self._kill, args=(kill_every,)))
        if pagers:
            self.threads.append(threading.Thread(target=self._start))

    def __enter__(self) -> Self:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join()
        self.base.close()

    def _open(self, seed: int) -> None:
        store = PatternStore(SIZE, seed)
        expected = store.expected(0, SIZE)
        while not self.over.is_set():
            with userfault.Region(store, random.choice("rc"), BLOCK) as region:
                self.wrong += touch(region.address, SIZE) != expected
                region.evict()
                self.wrong += touch(region.address, SIZE) != expected
            self.opened += 1

    def _start(self) -> None:
        """Start pagers and end them; every other one is only forgotten."""
        while not self.over.is_set():
            pager = userfault.Pager()
            if random.random() < 0.5:
                pager.close()

    def _kill(self, period: float) -> None:
        while not self.over.wait(period):
            kill_worker(self.base)
            self.killed += 1


def _live_in_child(number: int, bustle: Bustle) -> None:
    """What a child of the storm does: look what it has, let go of everything, have a region of its own."""
    held = holdings()
    assert not held, held
    assert bustle.base.closed
    gc.collect()
    if number % 2:
        bustle.base.close()
        bustle.base.pager.close()
        del bustle
        gc.collect()
    if number % 4 == 0:
        store = PatternStore(SIZE, seed=number)
        with userfault.Region(store, "r", BLOCK) as region, region.memory as memory:
            assert bytes(memory) == store.expected(0, SIZE)


def forks(number: int, kill_every: float) -> None:
    """Fork while regions are opened, evicted and closed, and workers are killed."""
    with Bustle(3, kill_every) as bustle:
        statuses = [in_child(lambda n=n: _live_in_child(n, bustle)) for n in range(number)]  # type: ignore[misc]  # bound
    say("storm", sum(map(bool, statuses)), bustle.wrong, bustle.opened > 0, bustle.killed > 0 or not kill_every)


def forks_in_threads(number: int) -> None:
    """Fork in two threads at once, neither of them the main one, while others open regions and start pagers."""
    statuses: list[int] = []

    def fork_often() -> None:
        statuses.extend(in_child(lambda n=n: _live_in_child(n, bustle)) for n in range(number))  # type: ignore[misc]

    with Bustle(1, pagers=True) as bustle:
        threads = [threading.Thread(target=fork_often) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    say("storm", sum(map(bool, statuses)), bustle.wrong, len(statuses))


def programs(number: int) -> None:
    """Start other programs while regions are opened; they inherit nothing."""
    look = ["/bin/sh", "-c", "ls -l /proc/self/fd"]
    ways: list[dict[str, Any]] = [{"close_fds": False}, {"preexec_fn": os.getpid, "close_fds": False}, {}]
    seen = []
    with Bustle(3) as bustle:
        for n in range(number):
            result = subprocess.run(look, stdout=subprocess.PIPE, text=True, check=True, **ways[n % 3])
            seen += [line for line in result.stdout.splitlines() if any(word in line for word in OURS)]
    say("programs", bustle.wrong, len(seen))


def behind_pythons_back() -> None:
    """Fork by the C library, so that nothing of ours hears of it; the child stays, and holds all descriptors."""
    region = userfault.Region(STORE, "r", BLOCK)
    assert right(region)
    pid = ctypes.PyDLL(None).fork()
    if not pid:
        try:
            region.ensure()
        except userfault.RegionClosedError:
            say("stays", os.getpid())
            signal.pause()
        os._exit(1)
    listen()
    say("parent", right(region))


# -- families ------------------------------------------------------------------------------------------------


def family(generation: int = 0) -> None:
    """Three generations, each with a region and a pager of its own; asked by SIGUSR1, each looks at its region."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    store = PatternStore(SIZE, seed=generation)
    region = userfault.Region(store, "r", BLOCK)
    assert bytes(region.memory) == store.expected(0, SIZE)
    say("ready", generation, os.getpid(), region.pager.pid, region.pager.worker_pid)
    if generation < 2 and not os.fork():
        try:
            family(generation + 1)
        finally:
            os._exit(0)
    while True:
        signal.sigwait({signal.SIGUSR1})
        region.evict()
        say("right", generation, bytes(region.memory) == store.expected(0, SIZE))


def inherit_and_close(how: str) -> None:
    """A child closes, in whichever way, what it has inherited."""
    regions = [userfault.Region(STORE, mode, BLOCK) for mode in "rrc"]
    views = [regions[1].memory]
    pager = userfault.Pager()
    own = userfault.Region(STORE, "r", BLOCK, pager=pager)
    array = userfault.open_array(STORE, dtype="u1")

    def close_all() -> None:
        if how == "drop":
            views.clear()
            regions.clear()
            gc.collect()
            return
        for region in (*regions, own):
            region.close()
            region.revoke()
        array.close()
        pager.close()
        userfault.default_pager().close()

    status = in_child(close_all)
    say("child", status)
    say("parent", all(map(right, (*regions, own))), array[5] == STORE.expected(5, 1)[0], regions[0].pager.restarts)
    views[0].release()
    for region in (*regions, own):
        region.close()
    pager.close()


# -- loaders and pools ---------------------------------------------------------------------------------------

ROWS = np.arange(64 * 4096.0).reshape(64, 4096)


class Rows:
    """A data set as loaders like it: one object, used in each process that gets or inherits it."""

    def __init__(self, array: Any) -> None:
        self.recipe = array.recipe()
        self.owner = 0

    def __getitem__(self, index: int) -> Any:
        if self.owner != os.getpid():
            self.array, self.owner = self.recipe.open(), os.getpid()
            kill_worker(self.array.region)
            threading.Thread(target=self._kill, daemon=True).start()
        return self.array[index].copy()

    def _kill(self) -> None:
        """Kill the worker of this process's pager, again and again."""
        while True:
            time.sleep(random.uniform(0.05, 0.3))  # a random moment
            kill_worker(self.array.region)


def _load(rows: Rows, indices: Any, batches: Any) -> None:
    while (wanted := indices.get()) is not None:
        batches.put((wanted, np.stack([rows[index] for index in wanted])))


def loader(path: str, method: str, epochs: int) -> None:
    """Load in four processes, as torch's DataLoader does; all workers are killed now and then, and one process is."""
    context: Any = multiprocessing.get_context(method)
    np.save(path, ROWS)
    rows = Rows(userfault.open_array(path, block_size=4096, budget="64KiB"))
    assert np.array_equal(rows[7], ROWS[7])
    indices, batches = context.Queue(), context.Queue()
    workers = [context.Process(target=_load, args=(rows, indices, batches), daemon=True) for _ in range(4)]
    for worker in workers:
        worker.start()
    wrong = 0
    for epoch in range(epochs):
        order = random.sample(range(64), 64)
        for start in range(0, 64, 4):
            indices.put(order[start : start + 4])
        for _ in range(16):
            wanted, batch = batches.get()
            wrong += not np.array_equal(batch, ROWS[wanted])
            wrong += not np.array_equal(rows[wanted[0]], ROWS[wanted[0]])
        if epoch == 0:
            _lose(workers, indices, batches)
    say("loader", wrong, rows.array.region.pager.restarts > 0)


def _lose(workers: list[Any], indices: Any, batches: Any) -> None:
    """End one process of a loader in good order, the rest goes on."""
    indices.put(None)
    while all(worker.is_alive() for worker in workers):
        time.sleep(0.001)
    assert batches.empty()


def _sum_of(rows: Any) -> float:
    """Run in a pool; the rows come by recipe. A row of zeros in front means: die."""
    return float(rows.sum())


def _die(rows: Any) -> float:
    rows.sum()
    os.kill(os.getpid(), signal.SIGKILL)
    return 0.0


def executors(path: str, method: str) -> None:
    """Send parts of arrays to executors whose processes die, while workers are killed."""
    np.save(path, ROWS)
    array = userfault.open_array(path)
    context = multiprocessing.get_context(method)
    expected, sums, broken = [float(row.sum()) for row in ROWS], [], 0
    with Bustle(1, 0.2) as bustle:
        for _ in range(2):
            with ProcessPoolExecutor(2, context) as processes:
                sums.append(list(processes.map(_sum_of, list(array), timeout=60)))
                try:
                    processes.submit(_die, array[:5]).result(60)
                except BrokenProcessPool:
                    broken += 1
    say("executors", sums == [expected] * 2, broken, bustle.wrong, bool(np.array_equal(array, ROWS)))


if __name__ == "__main__":
    begin(globals())
