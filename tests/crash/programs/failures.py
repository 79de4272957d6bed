"""Victims of stores that fail, and of workers that cannot live."""

from __future__ import annotations

import errno
import gc
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING

from tests.crash.programs.common import BLOCK, PAGE, begin, introduce, listen, ones, say
from tests.crash.programs.stores import LateCrashingStore, MadeOnceStore, MinedStore, SlowlyMadeStore

import userfault
from userfault.stores import FileStore
from userfault.testing import CrashingStore, FailingStore, PatternStore, touch

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from userfault.stores import Store

SIZE = 8 * BLOCK
BAD = 3 * BLOCK
GOOD = PatternStore(SIZE)


def _write(region: userfault.Region) -> object:
    _, writer = os.pipe()
    return os.write(writer, region.memory[BAD : BAD + PAGE])


def _preadv(region: userfault.Region) -> object:
    return os.preadv(ones(PAGE), [region.memory[BAD : BAD + PAGE]], 0)


WAYS: dict[str, Callable[[userfault.Region], object]] = {
    "touch": lambda region: region.memory[BAD],
    "thread": lambda region: _in_thread(lambda: touch(region.address + BAD)),
    "write": _write,
    "preadv": _preadv,
    "ensure": lambda region: region.ensure(BAD, 1),
    "prefetch": lambda region: region.prefetch(wait=True),
    "retry": lambda region: region.retry(BAD, 1),
    "pinned": lambda region: region.pinned(BAD - 1, 2).__enter__(),
}


def _in_thread(action: Callable[[], object]) -> None:
    thread = threading.Thread(target=action)
    thread.start()
    thread.join()


def use_failing(way: str, again: bool) -> None:
    """Meet a block that the store cannot give; once more, if `again`, when that is known already."""
    region = userfault.Region(FailingStore(SIZE, "out of tape", (BAD,)), "c", BLOCK)
    assert region.memory[0] == GOOD.expected(0, 1)[0]
    if again:
        try:
            region.ensure(BAD, 1)
        except userfault.StoreError:
            say("known")
        os.kill(region.pager.worker_pid, signal.SIGKILL)  # neither the failure nor the reason is lost with it
    _meet(region, way)
    _others_right(region, BAD)


def _meet(region: userfault.Region, way: str) -> None:
    introduce(region)
    listen()
    try:
        WAYS[way](region)
    except userfault.StoreError as error:
        say("StoreError", error.offset, error.length, "out of tape" in str(error), "FailingStore" in str(error))
    except userfault.PagerLostError:
        say("PagerLostError")
    except OSError as error:
        say(errno.errorcode[error.errno or 0])
    else:
        say("nothing")


def _others_right(region: userfault.Region, bad: int) -> None:
    """Every byte outside the failed block is what it should be."""
    memory = region.memory
    blocks = [start for start in range(0, SIZE, BLOCK) if start != bad]
    say("others", all(bytes(memory[at : at + BLOCK]) == GOOD.expected(at, BLOCK) for at in blocks))


def heal(path: str) -> None:
    """Fail, be healed, go on."""
    region = userfault.Region(FailingStore(SIZE, healed_by=path), "c", BLOCK)
    for _ in range(2):
        try:
            region.ensure(BAD, 1)
        except userfault.StoreError:
            say("failed", region.residency()[BAD // BLOCK])
    with open(path, "w", encoding="ascii"):
        pass
    region.retry(BAD, 1)
    say("healed", bytes(region.memory[BAD : BAD + BLOCK]) == GOOD.expected(BAD, BLOCK))
    region.retry()
    say("whole", bytes(region.memory) == GOOD.expected(0, SIZE))


# -- workers that cannot live --------------------------------------------------------------------------------


def crash(way: str, how: str) -> None:
    """Have a store that ends whichever process reads one of its blocks."""
    beside = userfault.Region(GOOD, "r", BLOCK)
    region = userfault.Region(CrashingStore(SIZE, how, (BAD,)), "c", BLOCK)
    assert bytes(beside.memory[:BLOCK]) == GOOD.expected(0, BLOCK)
    _meet(region, way)
    try:
        region.retry(BAD, 1)
    except userfault.StoreError as error:
        say("again", error.attempts, error.cause.split()[-1])
    _others_right(region, BAD)
    say("beside", bytes(beside.memory) == GOOD.expected(0, SIZE), beside.pager.restarts)
    say("known", [(error.offset, error.attempts) for error in region.stats().errors] == [(BAD, 3)] * 2)


def lost(way: str) -> None:
    """Meet a block while somebody kills every worker before it has filled anything."""
    region = userfault.Region(GOOD, "c", BLOCK)
    _meet(region, way)
    pager = region.pager
    say("state", pager.closed, pager.restarts)
    begun = time.monotonic()
    region.close()
    pager.close()
    say("closed", round(1000 * (time.monotonic() - begun)))
    say("left", *(pid for pid in (pager.pid, pager.worker_pid) if _is_alive(pid)))
    with userfault.Region(GOOD, "r", BLOCK) as other:
        say("anew", bytes(other.memory) == GOOD.expected(0, SIZE))


def crash_late(seconds: float) -> None:
    """Have a store that ends its worker after so long that it could pass for healthy."""
    region = userfault.Region(LateCrashingStore(SIZE, seconds), "r", BLOCK)
    _meet(region, "touch")


def crash_beside(seconds: float) -> None:
    """Have one store that ends the worker, and another that is healthy and busy all the time."""
    bad = userfault.Region(CrashingStore(SIZE, "kill", (BAD,)), "r", BLOCK)
    good = userfault.Region(GOOD, "r", BLOCK)
    over = threading.Event()

    def keep_busy() -> None:
        while not over.is_set():
            for start in range(0, SIZE, BLOCK):
                if touch(good.address + start, 8) != GOOD.expected(start, 8):
                    say("WRONG", start)
            good.evict()

    thread = threading.Thread(target=keep_busy, daemon=True)
    thread.start()
    introduce(bad)
    begun = time.monotonic()
    touched = threading.Thread(target=touch, args=(bad.address + BAD,), daemon=True)
    touched.start()
    touched.join(seconds)
    say("hung", bad.pager.restarts, round(time.monotonic() - begun, 1))
    os._exit(0)


def made_once(path: str) -> None:
    """Have a store that no second worker can make; regions of other stores must not suffer."""
    good = userfault.Region(GOOD, "r", BLOCK)
    bad = userfault.Region(MadeOnceStore(SIZE, path), "r", BLOCK)
    assert bytes(good.memory[:BLOCK]) == GOOD.expected(0, BLOCK) == bytes(bad.memory[:BLOCK])
    os.kill(good.pager.worker_pid, signal.SIGKILL)
    say("good", bytes(good.memory) == GOOD.expected(0, SIZE))
    say("resident", bytes(bad.memory[:BLOCK]) == GOOD.expected(0, BLOCK))
    try:
        bad.ensure(BLOCK, 1)
    except userfault.StoreError as error:
        say("StoreError", "the data base is down" in str(error))
    introduce(bad)
    listen()
    say("VALUE", bad.memory[BAD])


def made_slowly() -> None:
    """Lose the worker while a region opens whose store takes its time; then use the addresses for others."""
    first = userfault.Region(GOOD, "r", BLOCK)
    pager = first.pager
    os.kill(pager.worker_pid, signal.SIGKILL)
    store: Store = SlowlyMadeStore(1 << 20, 1, 0.3)
    region = userfault.Region(store, "r", BLOCK)
    address = region.address
    say("slow", bytes(region.memory) == PatternStore(1 << 20, 1).expected(0, 1 << 20))
    region.close()
    deadline = time.monotonic() + 1.0
    while _memfds(pager.pid) > 1 and time.monotonic() < deadline:  # the supervisor hears of it a little later
        time.sleep(0.001)
    say("memfds", *(_memfds(pid) for pid in (pager.pid, pager.worker_pid)))
    other = PatternStore(3 << 19, 2)
    regions: list[userfault.Region] = []
    while len(regions) < 40:
        regions.append(userfault.Region(other, "r", BLOCK))
        if regions[-1].address < address < regions[-1].address + other.size:
            break
    say("others", all(bytes(region.memory) == other.expected(0, other.size) for region in regions), len(regions))


def abandoned_opening() -> None:
    """Give up the opening of a region; its addresses go to another one."""
    first = userfault.Region(GOOD, "r", BLOCK)
    signal.signal(signal.SIGALRM, _interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        userfault.Region(SlowlyMadeStore(1 << 20, 1, 0.8), "r", BLOCK)
    except KeyboardInterrupt:
        say("interrupted")
    other = PatternStore(1 << 20, 2)
    regions = [userfault.Region(other, "r", BLOCK) for _ in range(4)]
    time.sleep(1.0)  # by now the store has been made
    say("others", all(bytes(region.memory) == other.expected(0, other.size) for region in regions), len(regions))
    say("memfds", *(_memfds(pid) - len(regions) for pid in (first.pager.pid, first.pager.worker_pid)))


def made_slowly_again(seconds: float) -> None:
    """Lose the worker beside a store that takes its time to be made; the others must not wait for it."""
    good = userfault.Region(GOOD, "r", BLOCK)
    slow = userfault.Region(SlowlyMadeStore(SIZE, 1, seconds), "r", BLOCK)
    assert good.memory[0] == GOOD.expected(0, 1)[0]
    assert slow.memory[0] == PatternStore(SIZE, 1).expected(0, 1)[0]
    os.kill(good.pager.worker_pid, signal.SIGKILL)
    begun = time.monotonic()
    right = bytes(good.memory) == GOOD.expected(0, SIZE)
    say("good", right, time.monotonic() - begun < seconds / 2)
    say("slow", bytes(slow.memory) == PatternStore(SIZE, 1).expected(0, SIZE))


def goodbye(moment: str, folder: str) -> None:
    """Close a pager whose worker dies as it says goodbye."""
    pager = userfault.Pager()
    mine = ("userfault.pager.wire.send", moment, f"{folder}/mine", 1)
    with userfault.Region(MinedStore(SIZE, mine, "pool", SIZE, ""), "r", BLOCK, pager=pager) as region:
        assert bytes(region.memory) == GOOD.expected(0, SIZE)
    begun = time.monotonic()
    pager.close()
    say("closed", round(1000 * (time.monotonic() - begun)))
    listen()


def many(regions: int, folder: str) -> None:
    """Have as many regions as the limit of descriptors allows, each of a file of its own."""
    data = os.urandom(4 * BLOCK)
    for number in range(regions):
        with open(f"{folder}/{number}", "wb") as file:
            file.write(data)
    opened = [userfault.Region(FileStore(f"{folder}/{number}"), "r", BLOCK) for number in range(regions)]
    pager = opened[0].pager
    say("opened", pager.restarts)
    killed = -1
    for number in range(3):
        at = number * BLOCK
        right = all(bytes(region.memory[at : at + BLOCK]) == data[at : at + BLOCK] for region in opened)
        say("right", right, pager.restarts)
        while killed in (pager.worker_pid, pager.pid):  # with both dead at once this process would be ended
            time.sleep(0.001)
        killed = (pager.worker_pid, pager.pid)[number % 2]
        os.kill(killed, signal.SIGKILL)
    for region in opened:
        region.ensure()
        region.evict()
    say("right", all(bytes(region.memory) == data for region in opened))
    for region in opened:
        region.close()


def abandoned_start() -> None:
    """Give up the start of a pager, again and again, at every moment of it; then have one all the same."""
    signal.signal(signal.SIGALRM, _interrupt)
    given_up = 0
    for number in range(40):
        signal.setitimer(signal.ITIMER_REAL, 0.002 + 0.004 * number)
        try:
            with userfault.Pager():
                signal.setitimer(signal.ITIMER_REAL, 0)
                break
        except KeyboardInterrupt:
            given_up += 1
    say("interrupted", given_up, _threads_left())
    listen()
    with userfault.Region(GOOD, "r", BLOCK) as region:
        say("works", bytes(region.memory) == GOOD.expected(0, SIZE))
        say("descriptors", len(os.listdir("/proc/self/fd")))


def start_given_up_at_each_line() -> None:
    """Interrupt the start of a pager at every line that the main thread executes for it, each time a later one."""
    userfault.Pager().close()  # imports are made here
    total = _count_lines()
    before = len(os.listdir("/proc/self/fd"))
    given_up = 0
    for number in range(1, total):
        sys.settrace(_Interrupter(number))
        try:
            pager = userfault.Pager()
        except KeyboardInterrupt:
            given_up += 1
        else:  # threads differ in how often they wait: a late line may not have come
            sys.settrace(None)
            pager.close()
        finally:
            sys.settrace(None)
    say("interrupted", given_up, _threads_left(), len(os.listdir("/proc/self/fd")) - before, total)
    listen()


def _threads_left() -> int:
    """How many threads a pager that is given up has left, once they had the time to end."""
    gc.collect()
    deadline = time.monotonic() + 1
    while threading.active_count() > 1 and time.monotonic() < deadline:
        time.sleep(0.001)
    return threading.active_count() - 1


class _Interrupter:
    """A trace function that raises KeyboardInterrupt at a line, counted over the files that start a pager."""

    def __init__(self, number: int) -> None:
        self.left = number
        self.seen = 0

    def __call__(self, frame: FrameType, event: str, _: object) -> _Interrupter | None:
        name = frame.f_code.co_filename
        if "userfault/pager" not in name:  # Python's own locks do not survive it
            return None
        if event == "line":
            self.seen += 1
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self


def _count_lines() -> int:
    counter = _Interrupter(-1)
    sys.settrace(counter)
    pager = userfault.Pager()
    sys.settrace(None)
    pager.close()
    return counter.seen


def starts(number: int) -> None:
    """Start pagers one after another, while somebody kills their processes."""
    lost = 0
    for generation in range(number):
        os.environ["GENERATION"] = str(generation)  # so that the killer knows who belongs together
        try:
            pager = userfault.Pager()
        except userfault.PagerLostError:
            lost += 1
            continue
        try:
            with userfault.Region(GOOD, "r", BLOCK, pager=pager) as region:
                region.ensure(0, 1)
        except userfault.PagerLostError:
            lost += 1
        pager.close()
    say("started", number - lost, lost, threading.active_count() - 1)
    listen()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _memfds(pid: int) -> int:
    links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    return sum("userfault-region" in link for link in links)


def _is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def idle() -> None:
    """Have a region, and do what the test says."""
    region = userfault.Region(PatternStore(64 * BLOCK), "r", BLOCK)
    assert region.memory[0]
    introduce(region)
    while word := listen():
        begun = time.perf_counter()
        at = int(word) * BLOCK
        value = region.memory[at]
        assert value == PatternStore(64 * BLOCK).expected(at, 1)[0]
        say("touched", at, round(1000 * (time.perf_counter() - begun)))


def orphan(python: str) -> None:
    """As `idle`, with pagers that are started with another interpreter."""
    sys.executable = python
    idle()


if __name__ == "__main__":
    begin(globals())
