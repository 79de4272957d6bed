"""Pagers: the default one, one's own, two at once, and their end."""

from __future__ import annotations

from pathlib import Path

import pytest

import userfault
from userfault import Error, MemoryStore, Pager, PagerLostError, Region, default_pager, open_array
from userfault.testing import PatternStore, run_child

STORE = PatternStore(200_000)
EXPECTED = STORE.expected(0, 200_000)


def right(region: Region) -> bool:
    with region.memory as memory:
        return bytes(memory) == EXPECTED


def test_regions_share_the_default_pager() -> None:
    with Region(STORE) as one, Region(STORE) as other, open_array(STORE) as array:
        assert one.pager is other.pager is array.region.pager is default_pager()
        assert default_pager().regions == 3
    assert default_pager().regions == 0


def test_a_pager_is_two_other_processes() -> None:
    with Pager() as pager:
        assert not pager.closed
        assert pager.restarts == 0
        assert f"supervisor={pager.pid} worker={pager.worker_pid} 0 regions" in repr(pager)
        names = [Path(f"/proc/{pid}/comm").read_text() for pid in (pager.pid, pager.worker_pid)]
        assert all(name.startswith("userfault") for name in names)
        assert names[0] != names[1]
    is_closed: bool = pager.closed
    assert is_closed
    assert "closed" in repr(pager)


def test_two_pagers_serve_at_once() -> None:
    with Pager() as one, Pager() as other:
        assert len({one.pid, one.worker_pid, other.pid, other.worker_pid}) == 4
        with Region(STORE, pager=one) as left, Region(STORE, "c", pager=other) as right_, Region(STORE) as third:
            assert right(left)
            assert right(right_)
            assert right(third)
            with right_.memory as memory:
                memory[5] = 7
            assert (left.pager, right_.pager, third.pager) == (one, other, default_pager())
            assert (one.regions, other.regions, default_pager().regions) == (1, 1, 1)
            assert right(left)
        assert default_pager() not in (one, other)


def test_closing_a_pager_with_regions_is_refused() -> None:
    pager = Pager()
    region = Region(STORE, pager=pager)
    with pytest.raises(Error, match="1 regions are open on this pager; close them first"):
        pager.close()
    assert not pager.closed
    assert right(region)
    region.close()
    pager.close()
    pager.close()


def test_a_with_block_does_not_close_a_pager_under_its_regions() -> None:
    region = None
    with pytest.raises(Error, match="regions are open"), Pager() as pager:
        region = Region(STORE, pager=pager)
    assert region is not None
    assert right(region)
    region.close()
    pager.close()


def test_a_closed_pager_serves_no_more() -> None:
    with Pager() as pager:
        pass
    with pytest.raises(PagerLostError, match="the pager was closed"):
        Region(STORE, pager=pager)


def test_the_default_pager_starts_again() -> None:
    first = default_pager()
    assert default_pager() is first
    first.close()
    with Region(STORE) as region:
        assert region.pager is default_pager()
        assert region.pager is not first
        assert right(region)


def test_a_region_holds_its_pager() -> None:
    region = Region(STORE, pager=Pager())
    assert right(region)
    pager = region.pager
    region.close()
    pager.close()


def test_a_pager_that_is_forgotten_ends() -> None:
    run_child("""
import gc, os, select, userfault
pager = userfault.Pager()
watched = [os.pidfd_open(pid) for pid in (pager.pid, pager.worker_pid)]
del pager
gc.collect()
for fd in watched:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(10_000), "it lives"
""").check()


def test_threads_start_one_default_pager_between_them() -> None:
    run_child("""
import threading, userfault
from concurrent.futures import ThreadPoolExecutor
from userfault.testing import PatternStore
start = threading.Barrier(8)
def work(seed):
    start.wait()
    with userfault.Region(PatternStore(100_000, seed)) as region:
        assert region.memory[77] == PatternStore(100_000, seed).expected(77, 1)[0]
        return region.pager.pid
with ThreadPoolExecutor(8) as threads:
    assert len(set(threads.map(work, range(8)))) == 1
""").check()


def test_an_asyncio_program_goes_on_while_a_thread_waits_in_a_region(tmp_path: object) -> None:
    """ensure() waits without the GIL; what it has brought in is then touched without a fault."""
    run_child("""
import asyncio, time, userfault
from userfault.testing import PatternStore, SlowStore
store = SlowStore(PatternStore(40 * 65536), 0.02)
async def main():
    ticks, over = 0, False
    async def tick():
        nonlocal ticks
        while not over:
            ticks += 1
            await asyncio.sleep(0.005)
    ticker = asyncio.create_task(tick())
    with userfault.Region(store, "c") as region, region.memory as memory:
        parts = range(0, store.size, 10 * 65536)
        await asyncio.gather(*(asyncio.to_thread(region.ensure, at, 10 * 65536, True) for at in parts))
        assert region.stats().faults == 0
        over = True
        await ticker
        assert ticks >= 5, ticks
        for at in parts:
            assert bytes(memory[at : at + 100]) == store.inner.expected(at, 100)
        memory[5] ^= 1
        assert await asyncio.to_thread(lambda: bytes(memory[:6])) != store.inner.expected(0, 6)
asyncio.run(main(), debug=True)
""").check()


def test_multiprocessing_opens_its_own(tmp_path: object) -> None:
    """A forked worker of multiprocessing has lost its parent's regions, and opens others."""
    run_child("""
import multiprocessing, os, userfault
from userfault.testing import PatternStore
store = PatternStore(300_000)
region = userfault.Region(store)
region.ensure()
def work(at):
    assert region.closed
    try:
        region.ensure()
        raise SystemExit("used the parent's region")
    except userfault.RegionClosedError as error:
        assert str(os.getppid()) in str(error), error
    with userfault.Region(store) as own, own.memory as memory:
        assert memory[at : at + 1000] == store.expected(at, 1000)
        result = own.pager.pid
    own.pager.close()
    pids.put(result)
context = multiprocessing.get_context("fork")
pids = context.SimpleQueue()
children = [context.Process(target=work, args=(at,)) for at in range(0, 90_000, 30_000)]
for child in children:
    child.start()
for child in children:
    child.join()
    assert child.exitcode == 0
assert len({region.pager.pid, *(pids.get() for _ in children)}) == 4
with region.memory as memory:
    assert memory == store.expected(0, 300_000)
region.close()
""").check()


@pytest.mark.parametrize("closed", ["0", "1", "2", "01", "02", "12", "012"])
def test_a_daemon_without_standard_descriptors(closed: str) -> None:
    """0, 1 and 2 are then the first numbers that the pager's sockets would get."""
    result = run_child(
        """
import os, sys
import userfault
from userfault.testing import FailingStore, PatternStore, touch
os.dup2(1, 100), os.dup2(2, 101)
for digit in args[0]:
    os.close(int(digit))
def complain(*what):
    import traceback
    os.write(101, "".join(traceback.format_exception(*what)).encode())
    os._exit(1)
sys.excepthook = complain
store = PatternStore(500_000)
region = userfault.Region(store)
assert region.memory[300_000] == store.expected(300_000, 1)[0]
os.kill(region.pager.worker_pid, 9)
assert region.memory[400_000] == store.expected(400_000, 1)[0]
failing = userfault.Region(FailingStore(500_000))
try:
    failing.ensure()
    raise SystemExit("no error")
except userfault.StoreError as error:
    assert "on fire" in str(error)
assert region.memory[5] == store.expected(5, 1)[0]
for digit in args[0]:
    try:
        os.fstat(int(digit))
        raise SystemExit(f"{digit} is in use: {os.readlink('/proc/self/fd/' + digit)}")
    except OSError:
        pass
failing.close()
region.close()
region.pager.close()
os.write(100, b"through")
""",
        closed,
        timeout=20,
    )
    assert (result.status, result.stdout) == (0, "through"), result.stderr


def test_a_store_may_fail_when_nobody_reads_standard_error() -> None:
    """A pipe that is full, and one that is broken: the fault loop must neither wait for it nor die of it."""
    run_child(
        """
import fcntl, os, userfault
from userfault.testing import FailingStore, PatternStore
real = os.dup(2)
for broken in (False, True):
    reader, writer = os.pipe()
    if broken:
        os.close(reader)
    else:
        os.set_blocking(writer, False)
        try:
            while True:
                os.write(writer, bytes(4096))
        except BlockingIOError:
            os.set_blocking(writer, True)
    os.dup2(writer, 2)
    pager = userfault.Pager()
    os.dup2(real, 2)
    for concurrency in (0, 4):
        store = FailingStore(500_000)
        store.concurrency = concurrency
        with userfault.Region(store, pager=pager) as failing:
            try:
                failing.ensure()
                raise SystemExit("no error")
            except userfault.StoreError as error:
                assert "on fire" in str(error)
            with userfault.Region(PatternStore(1000), pager=pager) as other:
                assert other.memory[5] == PatternStore(1000).expected(5, 1)[0]
    assert pager.restarts == 0
    pager.close()
""",
        timeout=20,
    ).check()


def test_the_environment_of_the_application_does_not_reach_into_the_pager(tmp_path_factory: object) -> None:
    run_child(
        """
import os, tempfile
folder = tempfile.mkdtemp()
for name in ("socket", "select", "struct", "sitecustomize", "userfault"):
    with open(f"{folder}/{name}.py", "w") as file:
        file.write("raise SystemExit('shadowed')")
import userfault, socket, select
os.environ.update(PYTHONPATH=folder, PYTHONHOME="/nowhere", PYTHONINSPECT="1", PYTHONWARNINGS="error")
os.chdir(folder)
with userfault.Region(userfault.MemoryStore(b"x" * 9000)) as region:
    assert region.memory[8999] == 120
    os.kill(region.pager.worker_pid, 9)
    region.evict()
    assert region.memory[8998] == 120
region.pager.close()
import shutil; shutil.rmtree(folder)
"""
    ).check()


def test_what_the_module_offers() -> None:
    assert set(userfault.__all__) <= set(dir(userfault))
    assert all(getattr(userfault, name) is not None for name in userfault.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        userfault.nonsense  # noqa: B018  # a name that is not there
    assert callable(userfault.capabilities)
    assert MemoryStore(b"x").size == 1
