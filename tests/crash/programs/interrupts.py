"""Victims of Ctrl-C, and of signal handlers that raise wherever they find their program."""

from __future__ import annotations

import collections
import contextlib
import gc
import os
import random
import signal
import sys
import threading
import time
import warnings
from typing import TYPE_CHECKING, Any

from tests.crash.programs.common import BLOCK, PAGE, begin, introduce, listen, say, write_all
from tests.crash.programs.signals import Bystander
from tests.crash.programs.stores import SlowlyMadeStore

import userfault
from userfault.testing import PatternStore, SlowStore, StallingStore, touch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NEVER = "/nonexistent/path that never appears"
BLOCKS = 256
SIZE = BLOCKS * PAGE


# -- a second Ctrl-C -----------------------------------------------------------------------------------------


@userfault.interruptible()
def hang(way: str) -> None:
    """Stop at a page that never comes, where a second Ctrl-C is to end it."""
    region = userfault.Region(StallingStore(PatternStore(BLOCK), NEVER), "r", BLOCK)
    memory = region.memory

    def act() -> object:
        return write_all(memory) if "write" in way else memory[0]

    introduce(region)
    if "thread" in way:
        thread = threading.Thread(target=act)
        thread.start()
        thread.join()
    else:
        act()


def interrupted_twice(way: str) -> None:
    """Be interrupted twice, each time in a fault that takes a while; then the handler is the old one."""
    region = userfault.Region(SlowStore(PatternStore(2 * BLOCK), 0.5), "r", BLOCK)
    memory = region.memory
    assert memory[0]
    introduce(region)
    with userfault.interruptible():
        for _ in range(2):
            listen()
            try:
                for _ in range(1000):
                    region.evict(BLOCK)
                    _ = memory[BLOCK] if way == "touch" else write_all(memory[BLOCK : BLOCK + PAGE])
            except KeyboardInterrupt:
                say("interrupted")
    say("restored", signal.getsignal(signal.SIGINT) is signal.default_int_handler)


def wait_in_vain(way: str) -> None:
    """Be interrupted while waiting for an answer; that needs no fault to be over."""
    region = userfault.Region(StallingStore(PatternStore(4 * BLOCK), NEVER), "r", BLOCK)
    ways: dict[str, Callable[[], object]] = {
        "ensure": region.ensure,
        "pinned": lambda: region.pinned(0, BLOCK).__enter__(),
        "prefetch": lambda: region.prefetch(wait=True),
        "retry": region.retry,
        "opening": lambda: userfault.Region(SlowlyMadeStore(BLOCK, 0, 60.0)),
    }
    introduce(region)
    listen()
    try:
        ways[way]()
    except KeyboardInterrupt:
        say("interrupted")
    gc.collect()
    with userfault.Region(PatternStore(BLOCK), "r", BLOCK) as other, other.memory as memory:
        say("right", bytes(memory) == PatternStore(BLOCK).expected(0, BLOCK), region.stats().pinned_bytes)
    region.close()
    region.pager.close()


def spin(seconds: float) -> None:
    """Have a thread that spins in a system call, since a signal waits for it; say what that costs the others."""
    signal.signal(signal.SIGALRM, lambda *_: None)
    region = userfault.Region(StallingStore(PatternStore(BLOCK), NEVER), "r", BLOCK)
    bystander = Bystander()
    thread = threading.Thread(target=write_all, args=(region.memory,), daemon=True)
    thread.start()
    while not region.stats().duplicates:  # until it spins
        signal.pthread_kill(thread.ident or 0, signal.SIGALRM)
    bystander.start()
    begun, before = time.monotonic(), _cpu_seconds(region.pager.worker_pid)
    time.sleep(seconds)  # the time that is measured
    used = (_cpu_seconds(region.pager.worker_pid) - before) / (time.monotonic() - begun)
    bystander.stop()
    median = sorted(bystander.taken)[len(bystander.taken) // 2]
    say("quiet", round(100 * used), round(1000 * median), len(bystander.taken), bystander.wrong)
    os._exit(0)


def _cpu_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# -- handlers that raise -------------------------------------------------------------------------------------


class AlarmError(BaseException):
    """What the handler raises."""


class Hammer:
    """Does something again and again in the main thread, where a handler raises at a random moment."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.region = userfault.Region(PatternStore(SIZE), "r", PAGE)
        self.over = threading.Event()
        self.wrong = 0
        self.bystander = threading.Thread(target=self._use)

    def _use(self) -> None:
        """Use the same region meanwhile."""
        expected = PatternStore(SIZE).expected(0, SIZE)
        rng = random.Random(1)
        while not self.over.is_set():
            at = rng.randrange(BLOCKS) * PAGE
            self.wrong += touch(self.region.address + at, PAGE) != expected[at : at + PAGE]
            if at < 8 * PAGE:
                self.region.evict()
                self.region.ensure(0, 4 * PAGE)

    def ensure(self) -> None:
        self.region.ensure(self.rng.randrange(200) * PAGE, 16 * PAGE)
        self.region.evict(self.rng.randrange(200) * PAGE, 16 * PAGE)

    def pinned(self) -> None:
        with self.region.pinned(self.rng.randrange(200) * PAGE, 16 * PAGE) as view:
            bytes(view[:1])

    def prefetch(self) -> None:
        self.region.prefetch(wait=True)
        self.region.stats()
        self.region.evict()

    def open(self) -> None:
        with userfault.Region(PatternStore(SIZE), "r", PAGE) as region:
            region.ensure(0, PAGE)

    def forget(self) -> None:
        region = userfault.Region(PatternStore(SIZE), "c", PAGE)
        region.owned_by_views()
        region.ensure(0, PAGE, write=True)

    def pager(self) -> None:
        with userfault.Pager() as pager, userfault.Region(PatternStore(SIZE), "r", PAGE, pager=pager) as region:
            region.ensure(0, PAGE)

    def strike(self, action: Callable[[], None], within: float) -> bool:
        """Do it once; return whether it came through."""
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, self.rng.random() * within + 1e-6)
                action()
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except AlarmError:
            return False
        except (BufferError, userfault.Error) as error:  # a view, or a region, is still held by what was raised
            if not isinstance(error.__context__, AlarmError):
                raise
            return False
        return True


def hammer(what: str, seconds: float, raises: bool, seed: int) -> None:
    """Interrupt something for a while; afterwards everything must work, and nothing may be left."""
    self = Hammer(seed)
    held = _held()
    with _alarms(raises):
        self.bystander.start()
        done: collections.Counter[bool] = collections.Counter()
        end = time.monotonic() + seconds
        while time.monotonic() < end or not done[True] + done[False]:
            done[self.strike(getattr(self, what), 0.4 if what == "pager" else 0.003)] += 1
    self.over.set()
    self.bystander.join()
    link = self.region.pager.link
    deadline = time.monotonic() + 10
    while (link.open_regions > 1 or _held() != held) and time.monotonic() < deadline:
        gc.collect()  # what an exception held goes now, and its region after that
        time.sleep(0.01)
    say("after", self.wrong, link.open_regions, _held() == held or _held() - held, sum(self.region._map.ledger.pins))
    self.region.ensure()
    say("works", self.region.evict() == SIZE, self.region.stats().pinned_bytes)
    self.region.close()
    self.region.pager.close()
    say("came", done[False] if raises else done[True])


@contextlib.contextmanager
def _alarms(raises: bool) -> Iterator[None]:
    def handle(*_: object) -> None:
        if raises:
            raise AlarmError

    warnings.simplefilter("ignore", ResourceWarning)
    sys.unraisablehook = lambda _: None  # what a handler raises in a finalizer is lost, as ever
    signal.signal(signal.SIGALRM, handle)
    yield
    signal.signal(signal.SIGALRM, signal.SIG_IGN)


def _held() -> collections.Counter[str]:
    """Descriptors and mappings of ours, by name."""
    names = []
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            names.append(os.readlink(f"/proc/self/fd/{entry}").partition(":")[0])
    with open("/proc/self/maps", encoding="utf-8") as maps:
        names.extend(line.split()[-1] for line in maps if "memfd:userfault" in line)
    return collections.Counter(name for name in names if not name.startswith("/proc"))


def raise_in_the_end_of(how: str) -> None:
    """Have a handler raise at the first step of a region's `__del__`; the pager must hear of its end all the same."""
    regions = [userfault.Region(PatternStore(SIZE), "r", PAGE) for _ in range(2)]
    for region in regions:
        region.owned_by_views()
    pager = regions[0].pager
    del region
    raised: list[str] = []

    def profile(frame: Any, event: str, _: object) -> None:
        if event == "call" and "/pager/mapping.py" in frame.f_code.co_filename and not raised:
            raised.append(frame.f_code.co_name)
            raise AlarmError

    sys.unraisablehook = lambda _: None
    sys.setprofile(profile)
    del regions[0]
    sys.setprofile(None)
    say("raised", *raised, pager.regions)
    if how == "another comes":
        regions.append(userfault.Region(PatternStore(SIZE, seed=1), "r", PAGE))
        say("regions", pager.regions, bytes(regions[1].memory) == PatternStore(SIZE, seed=1).expected(0, SIZE))
    regions[0].close()
    del regions[:]
    while pager.regions > (how != "another comes"):
        time.sleep(0.001)
    pager.close()
    say("closed", pager.closed)


if __name__ == "__main__":
    begin(globals())
