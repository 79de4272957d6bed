"""Victims that end, each in its own way, with regions open and reads under way."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
import weakref
import zlib
from typing import TYPE_CHECKING, Any

from tests.crash.programs.common import BLOCK, begin, introduce, listen, say, write_all
from tests.crash.programs.stores import GilStallingStore, SlowlyMadeStore

import userfault
from userfault.errors import Error, PagerLostError
from userfault.testing import PatternStore, SlowStore, StallingStore, touch

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 16 * BLOCK
NEVER = "/nonexistent/path that never appears"
_SLEEPER = [sys.executable, "-c", "import sys; print('settled', flush=True); sys.stdin.read()"]


def leave(how: str, stalled: bool) -> None:
    """End, while the pager reads blocks that never come, if `stalled`."""
    regions = [userfault.Region(PatternStore(SIZE), mode, BLOCK) for mode in ("r", "c")]
    regions[1].ensure(write=True)
    assert regions[0].memory[0]
    if stalled:
        regions.append(userfault.Region(StallingStore(PatternStore(SIZE), NEVER), "r", BLOCK))
        regions[2].prefetch()
        threading.Thread(target=zlib.crc32, args=(regions[2].memory,), daemon=True).start()
    introduce(regions[0])
    listen()
    WAYS[how]()


def leave_with_a_deaf_worker() -> None:
    """Be killed while no Python runs in the worker: its store keeps the GIL and does not return."""
    region = userfault.Region(GilStallingStore(SIZE), "r", BLOCK)
    introduce(region)
    region.prefetch()
    listen()


# -- ways to end ---------------------------------------------------------------------------------------------


def _fork_and_exec(who: str) -> None:
    pid = os.fork()
    stays = pid == 0 if who == "child" else pid != 0
    if not stays:
        os._exit(0)
    say("stays", os.getpid())
    os.execv(sys.executable, _SLEEPER)


def _fork_and_stay() -> None:
    if os.fork():
        os._exit(0)
    say("stays", os.getpid())
    say("settled")
    listen()


def _daemonise() -> None:
    """Become a daemon: a grandchild with a session of its own and no standard input, which has a region of its own."""
    if os.fork():
        os._exit(0)
    os.setsid()
    if os.fork():
        os._exit(0)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 2)
    with userfault.Region(PatternStore(SIZE, seed=3), "r", BLOCK) as region, region.memory as memory:
        assert bytes(memory) == PatternStore(SIZE, seed=3).expected(0, SIZE)
    userfault.default_pager().close()
    say("stays", os.getpid())
    say("settled")
    listen()


def _exec() -> None:
    say("stays", os.getpid())
    os.execv(sys.executable, _SLEEPER)


def _raise() -> None:
    raise ArithmeticError("on purpose")


def _killed(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(60)


def _detach_and_return() -> None:
    """Close every descriptor, as programs do that become daemons."""
    os.closerange(3, 1000)


def _in_thread(action: Callable[[], object]) -> None:
    thread = threading.Thread(target=action)
    thread.start()
    thread.join()


WAYS: dict[str, Callable[[], object]] = {
    "return": lambda: None,
    "exception": _raise,
    "exception in a thread": lambda: _in_thread(_raise),
    "sys.exit": lambda: sys.exit(0),
    "sys.exit in a thread": lambda: _in_thread(lambda: sys.exit(1)),
    "os._exit": lambda: os._exit(0),
    "os._exit in a thread": lambda: _in_thread(lambda: os._exit(3)),
    "abort": os.abort,
    "SIGINT": lambda: _killed(signal.SIGINT),
    "SIGKILL": lambda: _killed(signal.SIGKILL),
    "SIGTERM": lambda: _killed(signal.SIGTERM),
    "SIGSEGV": lambda: _killed(signal.SIGSEGV),
    "closerange": _detach_and_return,
    "exec": _exec,
    "exec in a thread": lambda: _in_thread(_exec),
    "fork, child execs": lambda: _fork_and_exec("child"),
    "fork, parent execs": lambda: _fork_and_exec("parent"),
    "fork, child stays": _fork_and_stay,
    "daemon": _daemonise,
}


# -- ends while something is under way -----------------------------------------------------------------------


def leave_amid(what: str, how: str) -> None:
    """End while something waits: for a store that takes a minute, or one that never answers."""
    slow = SlowStore(PatternStore(SIZE), 60.0, 0 if what == "fault loop" else 8)
    region = userfault.Region(StallingStore(PatternStore(SIZE), NEVER) if what == "hung fault" else slow, "r", BLOCK)
    works: dict[str, Callable[[], object]] = {
        "slow fault": lambda: touch(region.address),
        "hung fault": lambda: touch(region.address),
        "fault loop": lambda: touch(region.address),
        "system call": lambda: write_all(region.memory),
        "ensure": region.ensure,
        "prefetch": lambda: region.prefetch(wait=True),
        "opening": lambda: userfault.Region(SlowlyMadeStore(SIZE, 0, 60.0), "r", BLOCK),
    }
    introduce(region)
    threading.Thread(target=works[what], daemon=True).start()
    listen()
    WAYS[how]()


def hang_with_the_gil(way: str) -> None:
    """Stop in a fault, in the main thread, of a store that hangs; whatever ends that comes from outside."""
    region = userfault.Region(StallingStore(PatternStore(SIZE), NEVER), "r", BLOCK)
    with region.memory as memory:
        introduce(region)
        _ = memory[0] if way == "touch" else write_all(memory)


# -- while a pager starts ------------------------------------------------------------------------------------


def start_pagers(how: str, after_ms: float) -> None:
    """Start one pager after another; end in the midst of it."""

    def end() -> None:
        time.sleep(after_ms / 1000)  # a random moment
        WAYS[how]()

    say("ready")
    listen()
    threading.Thread(target=end, daemon=True).start()
    while True:
        with userfault.Pager() as pager, userfault.Region(PatternStore(BLOCK), "r", BLOCK, pager=pager) as region:
            region.ensure()


# -- the end of the interpreter ------------------------------------------------------------------------------


class Keeper:
    """Does something with a region in its `__del__`, which the interpreter's end calls."""

    def __init__(self, action: Callable[[], object]) -> None:
        self.action = action

    def __del__(self) -> None:
        self.action()


KEPT: list[Any] = []
"""Alive when the interpreter ends."""


def _right(region: userfault.Region) -> None:
    memory, expected = region.memory, PatternStore(SIZE).expected(BLOCK, SIZE - BLOCK)
    os.write(1, b"right\n" if bytes(memory[BLOCK:]) == expected else b"wrong\n")


def _try_to_open() -> None:
    try:
        region = userfault.Region(PatternStore(SIZE), "r", BLOCK)
    except Error:
        os.write(1, b"refused\n")
    else:
        _right(region)
        with contextlib.suppress(Error):
            region.close()


def _try_to_ask(region: userfault.Region) -> None:
    try:
        region.ensure()
    except PagerLostError:
        os.write(1, b"refused\n")
    else:
        _right(region)


def finalize(how: str) -> None:
    """Return with regions alive, which are used while the interpreter ends."""
    region = userfault.Region(PatternStore(SIZE), "r", BLOCK)
    region.owned_by_views()
    region.ensure(0, 1)
    array = userfault.open_array(PatternStore(SIZE), dtype="u1")
    KEPT.extend([region, region.memory, array[5:], array])
    kept: dict[str, Callable[[], object]] = {
        "touch": lambda: _right(region),
        "ask": lambda: _try_to_ask(region),
        "open": _try_to_open,
        "close": region.close,
    }
    action, _, where = how.partition(" in ")
    if action == "close":
        KEPT.clear()
    if where == "__del__":
        KEPT.append(Keeper(kept[action]))
    elif where == "atexit":
        atexit.register(kept[action])
    elif where == "a finalizer":
        weakref.finalize(array, kept[action])
    elif how == "cycle":
        KEPT.append(KEPT)
    say("ready")
    listen()


def without_streams(closed: str) -> None:
    """Close standard streams before the first region opens."""
    talk = os.dup(1)
    for digit in closed:
        os.close(int(digit))
    region = userfault.Region(PatternStore(SIZE), "r", BLOCK)
    right = bytes(region.memory) == PatternStore(SIZE).expected(0, SIZE)
    os.kill(region.pager.worker_pid, signal.SIGKILL)
    region.evict()
    right = right and bytes(region.memory) == PatternStore(SIZE).expected(0, SIZE)
    os.write(talk, f"right {right}\n".encode())


if __name__ == "__main__":
    begin(globals())
