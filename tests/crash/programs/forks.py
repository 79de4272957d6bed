"""Victims that fork with regions open."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import mmap
import multiprocessing
import os
import sys
import threading
from typing import TYPE_CHECKING, Any

from tests.crash.programs.common import BLOCK, PAGE, begin, introduce, listen, say

import userfault
from userfault.kernel import memory
from userfault.testing import PatternStore, poke, touch

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 16 * BLOCK
STORE = PatternStore(SIZE)
RESERVED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
MAP_FIXED_NOREPLACE = 0x100000


def right(region: userfault.Region) -> bool:
    return bytes(region.memory) == STORE.expected(0, SIZE)


def in_child(action: Callable[[], object]) -> int:
    """Fork; return the child's wait status. A child that comes through exits with 0."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            action()
            status = 0
        except BaseException:  # noqa: BLE001  # the child must not go on as the parent
            sys.excepthook(*sys.exc_info())
        os._exit(status)
    return os.waitpid(pid, 0)[1]


# -- touching ------------------------------------------------------------------------------------------------


def touch_in_child(how: str, resident: bool) -> None:
    """Touch inherited memory in a child; say how that ended."""
    with open_array_or_region(how) as (region, read):
        if resident:
            region.ensure()
        status = in_child(lambda: say("VALUE", read()))
        say("child", -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))
        say("parent", right(region))


@contextlib.contextmanager
def open_array_or_region(how: str) -> Any:
    if how == "array":
        import numpy as np

        array = userfault.open_array(STORE, dtype=np.uint8)
        yield array.region, lambda: array[5]
        return
    with userfault.Region(STORE, "c", BLOCK) as region:
        view = region.memory
        reads: dict[str, Callable[[], object]] = {
            "memoryview": lambda: view[5],
            "bytes": lambda: bytes(view[:PAGE]),
            "write": lambda: view.__setitem__(5, 1),
            "address": lambda: touch(region_address),
        }
        region_address = region.address
        yield region, reads[how]
        view.release()


def call_in_child() -> None:
    """Call every method in a child; say what each raised."""
    region = userfault.Region(STORE, "c", BLOCK)
    calls: dict[str, Callable[[], object]] = {
        "memory": lambda: region.memory,
        "address": lambda: region.address,
        "ensure": region.ensure,
        "pinned": lambda: region.pinned().__enter__(),
        "prefetch": region.prefetch,
        "evict": region.evict,
        "retry": region.retry,
        "flush": region.flush,
        "stats": region.stats,
        "residency": region.residency,
    }

    def call_all() -> None:
        for name, call in calls.items():
            try:
                call()
            except userfault.Error as error:
                say(name, type(error).__name__)
            else:
                say(name, "nothing")
        say("closed", region.closed, repr(region).endswith("closed>"), region.size == SIZE)
        region.close()
        region.close()

    introduce(region)
    say("child", in_child(call_all))
    say("parent", right(region))


# -- living on -----------------------------------------------------------------------------------------------


def open_in_child() -> None:
    """Open regions in a child, and in its child; each has its own pager, the parent keeps its own."""
    region = userfault.Region(STORE, "r", BLOCK)

    def open_one(depth: int) -> None:
        own = userfault.Region(PatternStore(SIZE, seed=depth), "r", BLOCK)
        assert own.pager.pid not in pids
        pids.add(own.pager.pid)
        if depth < 3:
            assert in_child(lambda: open_one(depth + 1)) == 0
        assert bytes(own.memory) == PatternStore(SIZE, seed=depth).expected(0, SIZE)
        own.evict()
        assert bytes(own.memory) == PatternStore(SIZE, seed=depth).expected(0, SIZE)
        own.close()

    pids = {region.pager.pid}
    say("child", in_child(lambda: open_one(1)))
    say("parent", right(region))


def use_their_addresses(drop: bool) -> None:
    """In a child, let go of inherited regions and put memory of its own where they were; nothing may take it away."""
    regions = [userfault.Region(STORE, "r", BLOCK) for _ in range(8)]
    views = [region.memory for region in regions]
    addresses = [region.address for region in regions]

    def live_there() -> None:
        if drop:
            views.clear()
            regions.clear()
            gc.collect()
            flags = RESERVED | MAP_FIXED_NOREPLACE
            mapped = [memory.map_memory(SIZE, flags=flags, address=address) for address in addresses]
        else:  # the addresses must not be given to anybody else while the objects live
            mapped = [memory.map_memory(SIZE, flags=RESERVED) for _ in range(64)]
            assert not set(mapped) & set(addresses)
        for address in mapped:
            poke(address, b"\xaa" * SIZE)
        views.clear()
        regions.clear()
        gc.collect()
        heap = [bytearray(os.urandom(SIZE)) for _ in range(16)]
        for address in mapped:
            assert touch(address, SIZE) == b"\xaa" * SIZE
        del heap
        say("intact")

    say("child", in_child(live_there))
    say("parent", all(map(right, regions)))
    views.clear()
    for region in regions:
        region.close()


def exit_the_long_way() -> None:
    """Go through all of the interpreter's end in a child."""
    faulthandler.cancel_dump_traceback_later()  # a forked child would wait for its thread at the end
    regions = [userfault.Region(STORE, mode, BLOCK) for mode in "rrcc"]
    views = [region.memory for region in regions[::2]]
    regions[3].ensure(write=True)
    array = userfault.open_array(STORE, dtype="u1")
    pid = os.fork()
    if not pid:
        sys.exit(0)
    say("exit", os.waitpid(pid, 0)[1])
    say("parent", all(map(right, regions)), len(views), regions[0].evict() == SIZE, array[7] == STORE.expected(7, 1)[0])


def fork_in_pinned() -> None:
    """Leave a `with pinned` in the child; the parent's pin must hold."""
    region = userfault.Region(STORE, "r", BLOCK)
    pinned = region.pinned(0, BLOCK)
    with pinned:
        pid = os.fork()
        if pid:
            say("child", os.waitpid(pid, 0)[1])
            say("pinned", region.stats().pinned_bytes == BLOCK, region.evict(0, BLOCK))
    if not pid:
        os._exit(0)
    say("parent", region.stats().pinned_bytes, right(region))


def outlive_parent() -> None:
    """A child that stays when its parent has closed its region: it keeps none of the memory."""
    region = userfault.Region(STORE, "r", BLOCK)
    region.ensure()
    pid = os.fork()
    if not pid:
        say("stays", os.getpid())
        listen()
        os._exit(0)
    region.close()
    say("closed")
    os.waitpid(pid, 0)


def storm(forks: int) -> None:
    """Fork again and again while threads fault."""
    regions = [userfault.Region(PatternStore(SIZE, seed=n), "r", BLOCK) for n in range(3)]
    expected = [PatternStore(SIZE, seed=n).expected(0, SIZE) for n in range(3)]
    over, wrong = threading.Event(), []

    def scan(number: int) -> None:
        region = regions[number]
        while not over.is_set():
            got = [touch(region.address + start, BLOCK) for start in range(0, SIZE, BLOCK)]
            if b"".join(got) != expected[number]:
                wrong.append(number)
            region.evict()

    threads = [threading.Thread(target=scan, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()

    def check() -> None:
        assert all(region.closed for region in regions)
        if os.getpid() % 2:
            regions.clear()
            gc.collect()

    statuses = [in_child(check) for _ in range(forks)]
    over.set()
    for thread in threads:
        thread.join()
    say("storm", sum(map(bool, statuses)), len(wrong), regions[0].pager.restarts)


# -- multiprocessing -----------------------------------------------------------------------------------------


def _work(seed: int) -> bool:
    """Open a region in a process of a pool."""
    store = PatternStore(SIZE, seed)
    with userfault.Region(store, "r", BLOCK) as region:
        return bytes(region.memory) == store.expected(0, SIZE)


def pool(method: str) -> None:
    """Work in a pool whose parent has regions too."""
    region = userfault.Region(STORE, "r", BLOCK)
    assert region.memory[0]
    context = multiprocessing.get_context(method)
    with context.Pool(2) as processes:
        say("pool", all(processes.map(_work, range(6), 1)))
    say("parent", right(region), region.pager.restarts)
    region.close()


if __name__ == "__main__":
    begin(globals())
