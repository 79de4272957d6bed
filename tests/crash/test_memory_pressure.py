"""Where memory ends: never a wrong byte, never a hang; an error, a SIGBUS with its reason, or the kernel's SIGKILL.

Memory is made scarce by memory cgroups (version 1 or 2) and by limits on address space, which refuse what
`vm.overcommit_memory=2` refuses to all.  Pages of a region are counted in the *application's* cgroup, wherever its
pager runs; beyond its limit the kernel ends whom it likes, or, where it may end nobody, refuses.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from userfault.kernel import process

if TYPE_CHECKING:
    from tests.crash.conftest import Start, Victim

    from userfault.testing import ChildResult

MIB = 1 << 20
LIMIT = 64 * MIB
FAR_BEYOND = 160
"""MiB of a region, several times what the limit leaves."""
KILLED, ABORTED, FAILED = -signal.SIGKILL, -signal.SIGABRT, -signal.SIGBUS


class Cgroup:
    """A memory cgroup of a test's own."""

    def __init__(self, parent: str, version: int) -> None:
        self.folder = Path(parent) / f"userfault-test-{uuid.uuid4().hex}"
        self.version = version
        self.folder.mkdir()

    def __str__(self) -> str:
        return str(self.folder)

    def limit(self, limit: int) -> None:
        """Allow so much, and no swap beyond it. May be raised later."""
        if self.version == 2:
            self._write("memory.max", limit)
            self._write("memory.swap.max", 0)
            return
        for name in ("memory.memsw.limit_in_bytes", "memory.limit_in_bytes", "memory.memsw.limit_in_bytes"):
            with contextlib.suppress(OSError):  # the first when it is lowered: never below the other
                self._write(name, limit)
        assert self._read("memory.limit_in_bytes") == limit

    def refuse(self) -> None:
        """End nobody: refuse instead. Version 1 only."""
        self._write("memory.oom_control", 1)

    def go_on(self) -> None:
        """Allow a little more if somebody is stopped: who meets the limit in a fault is not refused, but waits."""
        if "under_oom 1" in (self.folder / "memory.oom_control").read_text("ascii"):
            self.limit(self._read("memory.limit_in_bytes") + MIB)

    def most(self) -> int:
        """The most bytes that were ever in use."""
        return self._read("memory.peak" if self.version == 2 else "memory.max_usage_in_bytes")

    def _write(self, name: str, value: int) -> None:
        if (self.folder / name).exists():
            (self.folder / name).write_text(str(value), encoding="ascii")

    def _read(self, name: str) -> int:
        return int((self.folder / name).read_text(encoding="ascii"))

    def usage(self) -> int:
        """Bytes in use."""
        return self._read("memory.current" if self.version == 2 else "memory.usage_in_bytes")

    def kills(self) -> int:
        """How many processes the kernel has ended here for want of memory."""
        text = (self.folder / ("memory.events" if self.version == 2 else "memory.oom_control")).read_text("ascii")
        return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill "))

    def remove(self) -> None:
        """Remove it; processes take a moment to leave."""
        deadline = time.monotonic() + 10
        while self.folder.exists():
            try:
                self.folder.rmdir()
            except OSError:
                assert time.monotonic() < deadline, (self.folder / "cgroup.procs").read_text("ascii")
                time.sleep(0.01)


def new_cgroup() -> Cgroup:
    """Make one, or skip."""
    why = []
    tops = {version: folder for folder, version in process.memory_cgroups()}  # the last of each is the mount
    for version, folder in tops.items():
        try:
            made = Cgroup(folder, version)
        except OSError as error:
            why.append(f"{folder}: {error.strerror}; run the tests as root of the machine")
            continue
        if (made.folder / ("memory.max" if version == 2 else "memory.limit_in_bytes")).exists():
            return made
        made.folder.rmdir()
        why.append(f"{folder}: no memory controller; echo +memory >cgroup.subtree_control there")
    pytest.skip("no memory cgroup can be made: " + ("; or ".join(why) or "none is mounted"))


@pytest.fixture
def cgroups() -> Iterator[Callable[[], Cgroup]]:
    """Make cgroups; they are removed when all that ran in them has ended."""
    with contextlib.ExitStack() as stack:

        def make() -> Cgroup:
            made = new_cgroup()
            stack.callback(made.remove)
            return made

        yield make


def end(victim: Victim) -> ChildResult:
    """Let it end; nothing of its pager is left, but its last words."""
    status = victim.end().status
    victim.assert_no_pager()
    result = victim._result(status)
    print(status, result.stdout.split("\n"), result.stderr)
    return result


def end_without_wrong_bytes(victim: Victim) -> ChildResult:
    """Let it end, in whatever way is allowed."""
    result = end(victim)
    assert result.status in (0, KILLED, ABORTED, FAILED), result
    assert "WRONG" not in result.stdout
    assert "wrong 0" in result.stdout or result.status, "it ended well, but has not read everything"
    if result.status == FAILED:
        assert "userfault: " in result.stderr, "a SIGBUS without a reason"
    return result


# -- the cgroup of the application ----------------------------------------------------------------------------------


def test_a_region_is_counted_where_its_application_is(start: Start, cgroups: Callable[[], Cgroup]) -> None:
    mine, pagers = cgroups(), cgroups()
    with start("pressure.charge", str(mine), str(pagers), 48) as victim:
        victim.expect("before")
        before = mine.usage(), pagers.usage()
        victim.say()
        assert victim.expect("wrong") == [0]
        victim.expect("after")
        grown = mine.usage() - before[0], pagers.usage() - before[1]
        victim.say()
        victim.end().check()
    print(f"the application's has grown by {grown[0] / MIB:.1f} MiB, the pager's by {grown[1] / MIB:.1f}")
    assert grown[0] > 46 * MIB
    assert grown[1] < 8 * MIB


PREFERRED = {
    "application": (("application",), "r", {KILLED}),
    "worker": (("worker",), "r", {KILLED, FAILED, ABORTED}),
    "supervisor": (("supervisor",), "c", {KILLED, FAILED, ABORTED}),
    "both": (("supervisor", "worker"), "c", {FAILED, ABORTED}),
}


@pytest.mark.parametrize("whom", PREFERRED)
def test_without_a_budget_the_kernel_ends_somebody(start: Start, cgroups: Callable[[], Cgroup], whom: str) -> None:
    """The application, sooner or later; unless it takes one worker after another, until the pager gives up."""
    preferred, mode, ends = PREFERRED[whom]
    cgroup = cgroups()
    cgroup.limit(LIMIT)
    with start("pressure.exceed", str(cgroup), FAR_BEYOND, "unlimited", mode, preferred) as victim:
        supervisor, worker, _ = victim.expect("ready")
        assert end_without_wrong_bytes(victim).status in ends
        assert cgroup.kills() >= 1
        assert not {supervisor, worker} & set(victim.alive())


@pytest.mark.parametrize("budget", ["none", "4MiB"])
def test_with_a_budget_nobody_is_ended(start: Start, cgroups: Callable[[], Cgroup], budget: str) -> None:
    """The automatic one has seen the limit."""
    cgroup = cgroups()
    cgroup.limit(LIMIT)
    with start("pressure.exceed", str(cgroup), FAR_BEYOND, budget, "r", ()) as victim:
        victim.expect("ready")
        assert end_without_wrong_bytes(victim).status == 0
    assert cgroup.kills() == 0


def test_private_blocks_are_beyond_any_budget(start: Start, cgroups: Callable[[], Cgroup]) -> None:
    """What was written has no other copy, and is not dropped."""
    cgroup = cgroups()
    cgroup.limit(LIMIT)
    with start("pressure.exceed", str(cgroup), FAR_BEYOND, "4MiB", "c", ("application",)) as victim:
        victim.expect("ready")
        assert end_without_wrong_bytes(victim).status == KILLED


# -- refusals instead of kills --------------------------------------------------------------------------------------


@pytest.fixture
def refusing(cgroups: Callable[[], Cgroup]) -> Cgroup:
    """A cgroup in which memory is refused: COPY fails with ENOMEM, as where `vm.overcommit_memory` is 2."""
    cgroup = cgroups()
    if cgroup.version == 2:
        pytest.skip("only version 1 of memory cgroups refuses (memory.oom_control); boot with it to see this")
    cgroup.limit(LIMIT)
    cgroup.refuse()
    return cgroup


def await_with(cgroup: Cgroup, victim: Victim, condition: Callable[[], bool]) -> None:
    """Wait for something; meanwhile let the victim go on that the kernel stops."""

    def happened() -> bool:
        cgroup.go_on()
        return condition()

    victim.wait_until(happened, "it never happened")


def test_what_is_refused_makes_room(start: Start, cgroups: Callable[[], Cgroup], refusing: Cgroup) -> None:
    """Also without a budget: a clean block gives way."""
    with start("pressure.starve", str(refusing), str(cgroups()), FAR_BEYOND, "r") as victim:
        await_with(refusing, victim, victim.has_spoken)
        victim.expect("ready")
        await_with(refusing, victim, lambda: victim.process.poll() is not None)  # its end takes memory, too
        assert end_without_wrong_bytes(victim).status == 0
    assert refusing.most() < LIMIT + 8 * MIB


def test_what_is_refused_for_good_is_an_error_and_may_be_tried_again(
    start: Start, cgroups: Callable[[], Cgroup], refusing: Cgroup
) -> None:
    with start("pressure.starve", str(refusing), str(cgroups()), FAR_BEYOND, "c") as victim:
        await_with(refusing, victim, victim.has_spoken)
        victim.expect("ready")
        await_with(refusing, victim, lambda: victim.has_spoken() or "Errno 12]" in victim._result(0).stderr)
        refusing.limit(4 * LIMIT)
        assert victim.expect("refused")[0] == "True"
        victim.say()
        assert end_without_wrong_bytes(victim).status == 0


# -- the cgroup of the pager ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("once", [True, False], ids=["once", "always"])
def test_a_store_that_takes_all_memory(start: Start, cgroups: Callable[[], Cgroup], tmp_path: Path, once: bool) -> None:
    """It ends its worker; once is nothing, always is an error."""
    pagers = cgroups()
    pagers.limit(LIMIT)
    with start("pressure.feed", str(pagers), 2 * LIMIT // MIB, str(tmp_path / "note") if once else "") as victim:
        victim.expect("ready")
        (outcome,) = victim.line()
        assert outcome == "read" if once else outcome in ("StoreError", "PagerLostError")
        if outcome != "PagerLostError":
            assert victim.expect("wrong") == [0]
        assert victim.expect("restarts")[0] >= 1
        victim.end().check()
        assert pagers.kills() >= 1


def test_a_thread_that_ends_for_want_of_memory_ends_its_worker(start: Start, tmp_path: Path) -> None:
    """Somebody may wait for it. The successor begins with fresh memory."""
    with start("pressure.wait_in_vain", str(tmp_path / "note")) as victim:
        victim.expect("ready")
        assert victim.expect("wrong") == [0]
        assert victim.expect("restarts") == [1]
        assert "MemoryError" in victim.end().check().stderr


# -- address space --------------------------------------------------------------------------------------------------

KIB = 1 << 10
EXTRAS = 0, 300 * KIB, MIB, 2 * MIB, 9 * MIB, 12 * MIB, 40 * MIB


@pytest.mark.parametrize("kind", ["as", "data"])
def test_an_application_with_little_to_spare(start: Start, kind: str) -> None:
    """Each step of a start may be the one for which nothing is left; nothing stays behind."""
    with start("pressure.use_with", kind, EXTRAS) as victim:
        outcomes = []
        for extra in EXTRAS:
            tried, outcome, left = victim.expect("outcome")
            assert (tried, left) == (extra, 0)
            assert outcome in ("right", "KernelError", "PagerLostError", "StoreError", "MemoryError")
            outcomes.append(outcome)
        print(outcomes)
        assert outcomes[0] != "right"
        assert victim.expect("unlimited") == ["right"]
        victim.end().check()


@pytest.mark.parametrize(("option", "megabytes"), [("v", 8), ("v", 34), ("d", 12), ("d", 24)])
def test_a_pager_with_little_to_spare(start: Start, tmp_path: Path, option: str, megabytes: int) -> None:
    """Its interpreter does not start; a module does not load; a thread does not start."""
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nulimit -{option} {megabytes << 10}\nexec {sys.executable} "$@"\n', encoding="utf-8")
    wrapper.chmod(0o755)
    with start("pressure.use_with_small_pagers", str(wrapper)) as victim:
        (outcome,) = victim.expect("outcome")
        print(outcome)
        assert outcome in ("right", "KernelError", "PagerLostError", "StoreError")
        victim.end().check()


def test_a_region_for_which_there_are_no_addresses(start: Start) -> None:
    with start("pressure.open_too_much") as victim:
        assert victim.line() == ["KernelError", 12, "mmap"]
        assert victim.expect("right") == ["True"]
        assert victim.expect("left") == [0, 0]
        victim.end().check()


@pytest.mark.parametrize(("extra", "touch"), [(0, True), (16 * KIB, False), (MIB, True), (MIB, False)])
def test_a_worker_without_memory_for_a_buffer(start: Start, extra: int, touch: bool) -> None:
    """It fails the block, or makes way for a successor, which has memory."""
    with start("pressure.squeeze_worker", extra, touch) as victim:
        victim.expect("ready")
        result = end(victim)
        if "raised" in result.stdout:
            assert not touch
        elif result.status == FAILED:
            assert touch
            assert "userfault: " in result.stderr
        else:
            assert "wrong 0" in result.check().stdout
