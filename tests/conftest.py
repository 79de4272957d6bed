"""Rules for every test: nothing is left behind, and long tests run only when asked for.

After each test no process, no descriptor and no mapping of a memfd may be left that was not there before.
What fixtures of a wider scope hold belongs to the state before. The default pager is long-lived on purpose:
a test that started it has it closed here, before the check, so that its processes and descriptors count too.
"""

from __future__ import annotations

import gc
import os
import select
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol, cast

import pytest

_EXIT_TIMEOUT_S = 10.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="run the long tests too, and repeat crashes often")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--soak"):
        return
    skip = pytest.mark.skip(reason="takes minutes: make soak")
    for item in items:
        if "soak" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def soak(request: pytest.FixtureRequest) -> bool:
    """Whether this is a soak run: a crash test then repeats its scenario many more times."""
    return bool(request.config.getoption("--soak"))


class _Closable(Protocol):
    def close(self) -> None: ...


@dataclass(frozen=True)
class Held:
    """What this process holds: each resource by a key that stays the same while it lives."""

    descriptors: dict[int, str] = field(default_factory=dict)
    mappings: dict[str, str] = field(default_factory=dict)
    processes: dict[int, str] = field(default_factory=dict)

    @classmethod
    def now(cls) -> Held:
        return cls(_descriptors(os.getpid()), _memfd_mappings(), _children() | _pagers())

    def beyond(self, before: Held) -> list[str]:
        """Name everything held now that was not held before."""
        return [
            *(
                f"descriptor {fd}: {link}"
                for fd, link in self.descriptors.items()
                if before.descriptors.get(fd) != link
            ),
            *(
                f"mapping {where}: {what}"
                for where, what in self.mappings.items()
                if where not in before.mappings
            ),
            *(
                f"process {pid}: {name}"
                for pid, name in self.processes.items()
                if pid not in before.processes
            ),
        ]


def _descriptors(pid: int) -> dict[int, str]:
    """The descriptors of a process by number, without the one that this listing itself needs."""
    found = {}
    try:
        numbers = [int(name) for name in os.listdir(f"/proc/{pid}/fd")]
    except OSError:
        return {}
    for number in numbers:
        try:
            found[number] = os.readlink(f"/proc/{pid}/fd/{number}")
        except OSError:
            continue
    return found


def _memfd_mappings() -> dict[str, str]:
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        lines = [line.split(maxsplit=5) for line in maps if "/memfd:" in line]
    return {words[0]: words[5].strip() for words in lines}


def _children() -> dict[int, str]:
    """Our children, those included that have ended and were not waited for."""
    found: dict[int, str] = {}
    for thread in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{thread}/children", encoding="ascii") as children:
                found |= {int(pid): _name(int(pid)) for pid in children.read().split()}
        except OSError:
            continue
    return found


def _pagers() -> dict[int, str]:
    """Processes that are no children of ours but watch us through a pidfd, as pagers do."""
    mine = os.getpid()
    return {
        pid: _name(pid)
        for pid in (int(name) for name in os.listdir("/proc") if name.isdigit())
        if pid != mine
        and any(_watches(pid, fd, mine) for fd, link in _descriptors(pid).items() if "pidfd" in link)
    }


def _watches(pid: int, fd: int, target: int) -> bool:
    try:
        with open(f"/proc/{pid}/fdinfo/{fd}", encoding="ascii") as info:
            return any(line.split() == ["Pid:", str(target)] for line in info)
    except OSError:
        return False


def _name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as cmdline:
            return (
                cmdline.read().replace(b"\0", b" ").decode(errors="replace").strip()
                or "(ended, not waited for)"
            )
    except OSError:
        return "(gone)"


def _default_pager() -> _Closable | None:
    """The default pager if one was started; looking must not start it."""
    client = sys.modules.get("userfault.pager.client")
    return cast("_Closable | None", getattr(client, "_default", None))


def _await_exit(pids: set[int]) -> None:
    """Wait until these processes have ended: a pager that was closed takes a moment to leave."""
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            poll.poll(_EXIT_TIMEOUT_S * 1000)
        finally:
            os.close(descriptor)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Fail a test that leaves a process, a descriptor or a mapping."""
    pager_before, before = _default_pager(), Held.now()
    yield
    pager = _default_pager()
    if pager is not None and pager is not pager_before:
        pager.close()
    after = Held.now()
    if not after.beyond(before):
        return
    gc.collect()  # what only a cycle kept alive is not left behind
    _await_exit(_pagers().keys() - before.processes.keys())
    left = Held.now().beyond(before)
    assert not left, "left behind: " + "; ".join(left)
