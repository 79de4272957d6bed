"""Victims that run out of memory: of their cgroup's, of their pager's cgroup's, of address space."""

from __future__ import annotations

import math
import os
import resource
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tests.crash.programs.common import BLOCK, PAGE, begin, introduce, listen, say

import userfault
from userfault.kernel import process
from userfault.testing import PatternStore

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
LIMITS = {"as": (resource.RLIMIT_AS, "VmSize"), "data": (resource.RLIMIT_DATA, "VmData")}
REFUSALS = "Errno 12]", "Errno 105]"  # ENOMEM, ENOBUFS
BUDGETS = {"none": None, "unlimited": math.inf}


class HungryStore(PatternStore):
    """Takes much memory to read one block; once only, if there is a file to note that in."""

    def __init__(self, size: int, bad: int, megabytes: int, note: str) -> None:
        super().__init__(size)
        self.bad, self.megabytes, self.note = bad, megabytes, note

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if offset == self.bad and not (self.note and os.path.exists(self.note)):
            if self.note:
                with open(self.note, "wb"):
                    pass
            taken = bytearray(self.megabytes * MIB)
            taken[::PAGE] = b"\1" * (len(taken) // PAGE)
        super().read_into(offset, buffer)


class LonelyStore(PatternStore):
    """Waits for a thread of its own, which has no memory and ends; once only."""

    def __init__(self, size: int, note: str) -> None:
        super().__init__(size, concurrency=1)
        self.note = note

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if not os.path.exists(self.note):
            with open(self.note, "wb"):
                pass
            threading.Thread(target=self._fail).start()
            threading.Event().wait()
        super().read_into(offset, buffer)

    def _fail(self) -> None:
        raise MemoryError


def enter(folder: str, *pids: int) -> None:
    """Put processes into a cgroup; memory that they have already stays where it was counted."""
    for pid in pids or (os.getpid(),):
        with open(f"{folder}/cgroup.procs", "w", encoding="ascii") as procs:
            procs.write(str(pid))


def is_right(region: userfault.Region, at: int) -> bool:
    """Touch the first page of a block and its last one."""
    last = at + BLOCK - 16
    store = region.store
    assert isinstance(store, PatternStore)
    found = region.memory[at : at + 16].tobytes() + region.memory[last : last + 16].tobytes()
    return found == store.expected(at, 16) + store.expected(last, 16)


def scan(region: userfault.Region, *, write: bool = False) -> None:
    """Read all of it, writing into each page too, and say how many blocks are wrong."""
    wrong = 0
    for at in range(0, region.size, BLOCK):
        wrong += not is_right(region, at)
        for page in range(at + 100, at + BLOCK, PAGE) if write else ():
            region.memory[page] = 7
    say("wrong", wrong)


def charge(mine: str, pagers: str, megabytes: int) -> None:
    """Have application and pager in cgroups of their own, and read a region."""
    enter(mine)
    pager = userfault.default_pager()
    enter(pagers, pager.pid, pager.worker_pid)
    region = userfault.Region(PatternStore(megabytes * MIB), "r", BLOCK, budget=math.inf)
    assert is_right(region, 0)
    say("before")
    listen()
    scan(region)
    say("after")
    listen()


def exceed(folder: str, megabytes: int, budget: str, mode: str, preferred: tuple[str, ...]) -> None:
    """Read more than there is memory, in one cgroup with the pager; the kernel would rather end those `preferred`."""
    enter(folder)
    pager = userfault.default_pager()
    for role, pid in (("application", os.getpid()), ("supervisor", pager.pid), ("worker", pager.worker_pid)):
        if role in preferred:
            with open(f"/proc/{pid}/oom_score_adj", "w", encoding="ascii") as score:
                score.write("1000")
    store = PatternStore(megabytes * MIB, concurrency=4)
    region = userfault.Region(store, mode, BLOCK, budget=BUDGETS.get(budget, budget))
    introduce(region)
    scan(region, write=mode == "c")


def feed(pagers: str, megabytes: int, note: str) -> None:
    """Have a pager in a small cgroup, and a store that takes more memory than there is in it."""
    from tests.crash.programs.pressure import HungryStore as Importable  # and not of __main__

    bad = 3 * BLOCK
    pager = userfault.default_pager()
    enter(pagers, pager.pid, pager.worker_pid)
    region = userfault.Region(Importable(64 * BLOCK, bad, megabytes, note), "r", BLOCK)
    introduce(region)
    try:
        region.ensure(bad, 1)
    except (userfault.StoreError, userfault.PagerLostError) as error:
        say(type(error).__name__)
    else:
        say("read")
    if not pager.closed:
        blocks = (at for at in range(0, region.size, BLOCK) if note or at != bad)
        say("wrong", sum(not is_right(region, at) for at in blocks))
    say("restarts", pager.restarts)


def wait_in_vain(note: str) -> None:
    """Have a thread of the worker end for want of memory, while another waits for what it was to do."""
    from tests.crash.programs.pressure import LonelyStore as Importable  # and not of __main__

    region = userfault.Region(Importable(16 * BLOCK, note), "r", BLOCK)
    introduce(region)
    scan(region)
    say("restarts", region.pager.restarts)


def starve(mine: str, pagers: str, megabytes: int, mode: str) -> None:
    """Meet ENOMEM: nobody is killed in this cgroup, and what cannot be had is refused to the pager, which is elsewhere.

    A thread of ours that met the limit itself would be stopped by the kernel.  So what it needs it has from before: the
    page tables of the region, and its heap.
    """
    enter(mine)
    pager = userfault.default_pager()
    enter(pagers, pager.pid, pager.worker_pid)
    store, once = PatternStore(megabytes * MIB), userfault.RetryPolicy(attempts=1)
    region = userfault.Region(store, mode, BLOCK, budget=math.inf, retry_policy=once)
    for _ in range(2):
        for at in range(0, region.size, 2 * MIB):
            assert is_right(region, at)
            region.evict()
    introduce(region)
    if mode == "r":
        scan(region)
    else:
        make_private(region)


def make_private(region: userfault.Region) -> None:
    """Take write access to all of it, which nothing can drop again; when it is refused, say so, wait and go on."""
    refused = wrong = 0
    store = region.store
    assert isinstance(store, PatternStore)
    for at in range(0, region.size, BLOCK):
        try:
            region.ensure(at, BLOCK, write=True)
        except userfault.Error as error:  # for the block, or already for the message that asks for it
            refused += 1
            say("refused", any(number in str(error) for number in REFUSALS), at // MIB)
            listen()
            region.retry(at, BLOCK)
            region.ensure(at, BLOCK, write=True)
        region.memory[at] = 1
    for at in range(0, region.size, BLOCK):
        wrong += region.memory[at] != 1
        wrong += region.memory[at + 1 : at + 100].tobytes() != store.expected(at + 1, 99)
    say("wrong", wrong)
    say("refusals", refused)


# -- address space -------------------------------------------------------------------------------------------------


@contextmanager
def limit(kind: str, extra: int) -> Iterator[None]:
    """Leave this process so many bytes more than it has."""
    number, field = LIMITS[kind]
    before = resource.getrlimit(number)
    used = int(process.status()[field].split()[0]) << 10
    resource.setrlimit(number, (used + extra, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(number, before)


def use(size: int = MIB, block_size: int = BLOCK) -> str:
    """Start a pager, open a region, read it; say how that ended."""
    try:
        with userfault.Pager() as pager, userfault.Region(PatternStore(size), "r", block_size, pager=pager) as region:
            region.ensure(0, BLOCK)
            return "right" if is_right(region, 0) else "WRONG"
    except (userfault.Error, MemoryError) as error:
        return type(error).__name__


def use_with(kind: str, extras: tuple[int, ...]) -> None:
    """Do that with less and less to spare, then with all there is."""
    userfault.default_pager().close()  # all is imported now
    use()
    before = len(os.listdir("/proc/self/fd"))
    for extra in extras:
        with limit(kind, extra):
            outcome = use()
        say("outcome", extra, outcome, len(os.listdir("/proc/self/fd")) - before)
    say("unlimited", use())


def use_with_small_pagers(wrapper: str) -> None:
    """Do that with an interpreter for the pager that has a limit."""
    sys.executable = wrapper
    say("outcome", use())


def open_too_much() -> None:
    """Open a region for which there are no addresses, then one for which there are."""
    with userfault.Pager() as pager:
        before = len(os.listdir("/proc/self/fd"))
        with limit("as", 64 * MIB):
            try:
                userfault.Region(PatternStore(1 << 30), pager=pager)
            except userfault.KernelError as error:
                say(type(error).__name__, error.errno, error.syscall)
            with userfault.Region(PatternStore(MIB), "c", pager=pager) as region:
                say("right", is_right(region, 0))
        say("left", pager.regions, len(os.listdir("/proc/self/fd")) - before)


def squeeze_worker(extra: int, touch: bool) -> None:
    """Leave the worker so little that it has no buffer for a block of 2 MiB; its successor has."""
    region = userfault.Region(PatternStore(16 * MIB), "r", 2 * MIB)
    pager = region.pager
    used = int(process.status(pager.worker_pid)["VmSize"].split()[0]) << 10
    resource.prlimit(pager.worker_pid, resource.RLIMIT_AS, (used + extra, used + extra))
    introduce(region)
    if touch:
        scan(region)
        return
    try:
        region.ensure()
    except (userfault.StoreError, userfault.PagerLostError) as error:
        say("raised", type(error).__name__)
    else:
        scan(region)


if __name__ == "__main__":
    begin(globals())
