"""Victims that end, each in its own way, with regions open and reads under way."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import zlib

from tests.crash.programs.common import BLOCK, begin, introduce, listen, say
from tests.crash.programs.stores import GilStallingStore

import userfault
from userfault.testing import PatternStore, StallingStore

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


WAYS = {
    "return": lambda: None,
    "exception": _raise,
    "sys.exit": lambda: sys.exit(0),
    "os._exit": lambda: os._exit(0),
    "abort": os.abort,
    "SIGKILL": lambda: _killed(signal.SIGKILL),
    "SIGTERM": lambda: _killed(signal.SIGTERM),
    "SIGSEGV": lambda: _killed(signal.SIGSEGV),
    "closerange": _detach_and_return,
    "exec": _exec,
    "fork, child execs": lambda: _fork_and_exec("child"),
    "fork, parent execs": lambda: _fork_and_exec("parent"),
    "fork, child stays": _fork_and_stay,
}


if __name__ == "__main__":
    begin(globals())
