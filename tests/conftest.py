"""Rules for every test: nothing is left behind, and long tests run only when asked for.

After each test no process, thread, descriptor or mapping of a memfd may be left that was not there before. What
fixtures of a wider scope hold belongs to the state before. The default pager is long-lived on purpose: a test that
started it has it closed here, before the check, so that its processes and descriptors count too.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Protocol, cast

import numpy as np  # noqa: F401  # its library starts threads when imported: not in the middle of a test
import pytest

from userfault.testing.leaks import holdings

_SETTLE_S = 10.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="run the long tests too, and repeat crashes often")


def pytest_configure() -> None:
    """Have Ctrl-C back where a shell took it away from what it runs in the background, and so from our children."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the soak tests out, unless asked for: not skipped, since nothing is missing that they need."""
    if config.getoption("--soak"):
        return
    long = [item for item in items if "soak" in item.keywords]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if "soak" not in item.keywords]


def pytest_collection_finish() -> None:
    """Keep what has been collected out of the garbage collector's way: an array that is closed asks it for its holders.

    With four thousand tests in memory that took a tenth of a second each time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def soak(request: pytest.FixtureRequest) -> bool:
    """Whether this is a soak run: a crash test then repeats its scenario many more times."""
    return bool(request.config.getoption("--soak"))


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Fail a test that leaves a process, a thread, a descriptor or a mapping."""
    pager_before, held_before, pagers_before = _default_pager(), holdings(), _pagers()
    yield
    pager = _default_pager()
    if pager is not None and pager is not pager_before:
        pager.close()

    def left() -> list[str]:
        pagers = [f"pager {pid}: {name}" for pid, name in _pagers().items() if pid not in pagers_before]
        return holdings().beyond(held_before) + pagers

    if not left():
        return
    gc.collect()  # what only a cycle kept alive is not left behind
    deadline = time.monotonic() + _SETTLE_S
    while left() and time.monotonic() < deadline:
        time.sleep(0.005)  # what was told to end takes a moment
    remaining = left()
    assert not remaining, "left behind: " + "; ".join(remaining)


class _Closable(Protocol):
    def close(self) -> None: ...


def _default_pager() -> _Closable | None:
    """The default pager if one was started; looking must not start it."""
    client = sys.modules.get("userfault.pager.client")
    return cast("_Closable | None", getattr(client, "_default", None))


def _pagers() -> dict[int, str]:
    """Processes that are no children of ours but watch us through a pidfd, as pagers do."""
    mine = os.getpid()
    others = (int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != mine)
    return {pid: _command(pid) for pid in others if any(_watches(pid, fd, mine) for fd in _pidfds(pid))}


def _pidfds(pid: int) -> Iterator[str]:
    folder = f"/proc/{pid}/fd"
    try:
        numbers = os.listdir(folder)
    except OSError:  # gone, or another user's
        return
    for number in numbers:
        try:
            if "pidfd" in os.readlink(f"{folder}/{number}"):
                yield number
        except OSError:
            continue


def _watches(pid: int, fd: str, target: int) -> bool:
    try:
        with open(f"/proc/{pid}/fdinfo/{fd}", encoding="ascii") as info:
            return any(line.split() == ["Pid:", str(target)] for line in info)
    except OSError:
        return False


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as cmdline:
            return cmdline.read().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return "(gone)"
