"""Victims of stores that must be asked more than once, and of reads that never return."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from itertools import pairwise
from pathlib import Path

from tests.crash.programs.common import BLOCK, begin, introduce, listen, say
from tests.crash.programs.stores import FailsThenStallsStore, TimedStore

import userfault
from userfault import RetryPolicy
from userfault.stores import FileStore
from userfault.testing import FailingStore, PatternStore, ShortStore, StallingStore, touch

SIZE = 8 * BLOCK
BAD = 3 * BLOCK
GOOD = PatternStore(SIZE)
QUICK = RetryPolicy(attempts=3, backoff=0.01, timeout=0.5)
ONCE = RetryPolicy(attempts=1, timeout=0.5)


def _refused(region: userfault.Region, offset: int = BAD, retry: bool = False) -> userfault.StoreError:
    try:
        (region.retry if retry else region.ensure)(offset, 1)
    except userfault.StoreError as error:
        return error
    raise AssertionError("the block was given")


def heals(times: int) -> None:
    """Be asked `times` times in vain, and then not."""
    with userfault.Region(FailingStore(SIZE, "busy", (BAD,), times=times), retry_policy=QUICK) as region:
        right = bytes(region.memory[BAD : BAD + BLOCK]) == GOOD.expected(BAD, BLOCK)
        stats = region.stats()
        say("right", right, stats.retries, stats.failures, len(stats.errors))


def exhausted() -> None:
    """Be asked as often as the policy says, and fail."""
    with userfault.Region(FailingStore(SIZE, "busy", (BAD,)), retry_policy=QUICK) as region:
        error = _refused(region)
        say(
            "error", error.offset, error.length, error.attempts, "busy" in error.cause, "after 3 attempts" in str(error)
        )
        (known,) = region.stats().errors
        say("known", str(known) == str(error), region.stats().retries, region.stats().failures)
        introduce(region)
        listen()
        say("VALUE", region.memory[BAD])


def hopeless(path: str) -> None:
    """Have a file replaced beneath us: to ask again would be of no use."""
    Path(path).write_bytes(GOOD.expected(0, SIZE))
    with userfault.Region(FileStore(path), retry_policy=QUICK) as region:
        Path(f"{path}.new").write_bytes(bytes(SIZE))
        os.replace(f"{path}.new", path)
        error = _refused(region)
        say("error", error.attempts, error.permanent)


def pauses(path: str) -> None:
    """Note when the store is asked."""
    policy = RetryPolicy(attempts=5, backoff=0.05, longest=0.15, jitter=0)
    with userfault.Region(TimedStore(SIZE, path), retry_policy=policy) as region:
        _refused(region)
    times = [float(line) for line in Path(path).read_text(encoding="ascii").split()]
    say("gaps", *(round(1000 * (after - before)) for before, after in pairwise(times)))


def hangs(way: str, release: str, concurrency: int) -> None:
    """Read a block whose read never returns; everything else goes on."""
    stalls = StallingStore(PatternStore(SIZE, 0, concurrency), release, None, (BAD,))
    stalls.concurrency = concurrency
    beside = userfault.Region(GOOD, "r", BLOCK)
    region = userfault.Region(stalls, "c", BLOCK, retry_policy=ONCE)
    introduce(region)
    if way == "touch":
        threading.Thread(target=_check_others, args=(region, beside)).start()
        say("VALUE", touch(region.address + BAD))
        return
    error = _refused(region)
    say("error", error.offset, error.attempts, "in time" in str(error))
    _check_others(region, beside)
    say("state", region.residency()[BAD // BLOCK])
    Path(release).touch()
    region.retry(BAD, 1)
    say("healed", bytes(region.memory) == GOOD.expected(0, SIZE))


def _check_others(region: userfault.Region, beside: userfault.Region) -> None:
    others = [at for at in range(0, SIZE, BLOCK) if at != BAD]
    right = all(touch(region.address + at, BLOCK) == GOOD.expected(at, BLOCK) for at in others)
    say("others", right and bytes(beside.memory) == GOOD.expected(0, SIZE))


def hangs_once(release: str, entered: str) -> None:
    """Have a read abandoned, and the second attempt succeed; the first returns long after."""
    store = StallingStore(GOOD, release, entered, (BAD,))
    store.concurrency = 2
    policy = RetryPolicy(attempts=2, backoff=3.0, jitter=0, timeout=0.2)
    region = userfault.Region(store, "r", BLOCK, retry_policy=policy)
    threading.Thread(target=_release_after_retry, args=(region, release)).start()
    say("right", touch(region.address + BAD, BLOCK) == GOOD.expected(BAD, BLOCK), region.stats().retries)
    region.evict()
    say("again", bytes(region.memory) == GOOD.expected(0, SIZE))


def _release_after_retry(region: userfault.Region, release: str) -> None:
    while not region.stats().retries:
        time.sleep(0.01)
    Path(release).touch()


def all_hang(blocks: int) -> None:
    """Have every read hang: all of them fail in the end, with no more threads than are good."""
    store = StallingStore(PatternStore(blocks * 4096), "/nonexistent/never")
    region = userfault.Region(store, "r", 4096, retry_policy=RetryPolicy(attempts=1, timeout=0.001))
    introduce(region)
    try:
        region.ensure()
    except userfault.StoreError as error:
        say("error", error.offset // 4096 < blocks)
    say("failed", region.residency().count(7))
    # those that were abandoned are settled beside those that fail at once: which of them is last is chance
    say("told", any("abandoned" in str(error) for error in region.stats().errors))
    listen()


def short(missing: int) -> None:
    """Have a store that fills too little and does not say so."""
    with userfault.Region(ShortStore(GOOD, missing), "r", BLOCK, retry_policy=QUICK) as region:
        error = _refused(region)
        say("error", error.attempts, "did not fill the buffer" in str(error))


def retry_that_is_lost(stalled: str) -> None:
    """Fail a block; ask again, give that up, and lose the worker: the block has failed, and is not absent."""
    region = userfault.Region(
        FailsThenStallsStore(SIZE, stalled), "r", BLOCK, retry_policy=RetryPolicy(1, timeout=None)
    )
    _refused(region, 0)
    signal.signal(signal.SIGUSR1, _raise)
    threading.Thread(target=_interrupt_when, args=(stalled,)).start()
    with contextlib.suppress(KeyboardInterrupt):
        region.retry(0, 1)
    os.kill(region.pager.worker_pid, signal.SIGKILL)
    region.stats()
    say("state", region.residency()[0], _refused(region, 0).cause)
    introduce(region)
    listen()
    say("VALUE", region.memory[0])


def _raise(*_: object) -> None:
    raise KeyboardInterrupt


def _interrupt_when(path: str) -> None:
    while not os.path.exists(path):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGUSR1)


def logs() -> None:
    """Log what happens; a handler that uses a region, and so asks the thread that brings the news, hangs nobody."""
    other = userfault.Region(GOOD, "r", BLOCK)
    handler = _Asking(other)
    logging.basicConfig(level=logging.INFO, handlers=[handler], format="%(name)s %(levelname)s %(message)s")
    region = userfault.Region(FailingStore(SIZE, "busy", (BAD,)), "r", BLOCK, retry_policy=QUICK)
    _refused(region)
    worker = region.pager.worker_pid
    os.kill(worker, signal.SIGKILL)
    region.ensure(0, 1)
    while len(handler.lines) < 4:
        time.sleep(0.001)
    for line in handler.lines:
        say("log", line.replace(str(worker), "N"))


class _Asking(logging.Handler):
    """Asks the pager for something before it notes a line."""

    def __init__(self, region: userfault.Region) -> None:
        super().__init__()
        self.region = region
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.region.evict()
        self.region.ensure()
        self.lines.append(self.format(record))


def stopped() -> None:
    """Go on touching while somebody stops processes of the pager."""
    region = userfault.Region(GOOD, "r", BLOCK)
    introduce(region)
    while (word := listen()) != "end":
        region.evict() if word == "evict" else None
        say("right", touch(region.address, SIZE) == GOOD.expected(0, SIZE), *_pagers(region))


def _pagers(region: userfault.Region) -> tuple[int, int]:
    return region.pager.pid, region.pager.worker_pid


if __name__ == "__main__":
    begin(globals())
