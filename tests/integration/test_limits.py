"""Far and many: a tebibyte, a thousand regions, fifty threads, thousands of openings, little memory.

In children, which print what they measured; the figures are shown with `pytest -s`.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from userfault.kernel import process
from userfault.testing import ChildResult, run_child

PRELUDE = """
import gc, os, random, resource, sys, threading, time, warnings
from concurrent.futures import ThreadPoolExecutor
import userfault
from userfault import FileStore, MemoryStore, Region
from userfault.kernel import process
from userfault.testing import PatternStore, SlowStore

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
pager = userfault.default_pager()

def pids():
    return [os.getpid(), pager.pid, pager.worker_pid]

def pss():
    return [process.pss(pid) for pid in pids()]

def fds():
    return [len(os.listdir(f"/proc/{pid}/fd")) for pid in pids()]

def maps():
    return [open(f"/proc/{pid}/maps").read().count("\\n") for pid in pids()]

def tasks():
    return [len(os.listdir(f"/proc/{pid}/task")) for pid in pids()]

def await_true(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never became true"
        time.sleep(0.005)
"""


def run(source: str, *args: object, timeout: float = 60.0) -> ChildResult:
    result = run_child(PRELUDE + source, *args, timeout=timeout).check()
    print(result.stdout, end="")
    return result


# -- a tebibyte -----------------------------------------------------------------------------------------------------


def test_a_tebibyte_opens_at_once_costs_nothing_and_works(tmp_path: Path) -> None:
    """Under 50 ms (the best of three, with the pager running), and under 20 MiB in all processes together."""
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
        for number in range(1000):
            os.pwrite(file.fileno(), number.to_bytes(8, "little"), number * (1 << 30) + 8 * number)
    run(
        """
path, = args
userfault.capabilities
with Region(MemoryStore(b"warm")) as region:
    region.ensure()
before = sum(pss())
best = 1e9
for round in range(3):
    began = time.perf_counter()
    region = Region(FileStore(path))
    best = min(best, time.perf_counter() - began)
    added = sum(pss()) - before
    if round < 2:
        region.close()
print(f"1 TiB opens in {best * 1e3:.1f} ms and adds {added / MIB:.2f} MiB to {[f'{p / MIB:.1f}' for p in pss()]}")
assert best < 0.050, best
assert added < 20 * MIB, added
memory = region.memory
order = list(range(1000))
random.Random(1).shuffle(order)
began = time.perf_counter()
for number in order:
    at = number * GIB + 8 * number
    assert int.from_bytes(memory[at : at + 8], "little") == number
took = time.perf_counter() - began
added = sum(pss()) - before
print(f"1000 scattered touches take {took * 1e3:.0f} ms, and then {added / MIB:.1f} MiB more are in use")
assert added < 200 * MIB, added
assert memory[TIB - 1] == 0
memory.release()
began = time.perf_counter()
region.close()
print(f"closed in {(time.perf_counter() - began) * 1e3:.1f} ms")
""",
        str(path),
    )


def test_a_tebibyte_array_of_4_kib_blocks(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
        os.pwrite(file.fileno(), b"*", (1 << 40) - 1)
    run(
        """
import numpy as np
path, = args
before = sum(pss())
a = userfault.open_array(path, block_size=4096, shape=(1 << 20, 1 << 20))
assert sum(pss()) - before < 20 * MIB
assert a[-1, -1] == 42 and a[12345, 67890] == 0
assert a[:, 5][::50_000].sum() == 0
assert a.region.evict() > 0
a.close()
""",
        str(path),
    )


# -- many -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_a_thousand_regions_under_the_usual_limit_of_descriptors(kind: str, tmp_path: Path) -> None:
    """Soft and hard limit are 1024, in the pager too. A worker that is killed meanwhile changes nothing."""
    run(
        """
folder, kind = args
pager.close()
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
pager = userfault.default_pager()
size = 3 * 65536 + 6
contents = [number.to_bytes(2, "little") * (size // 2) for number in range(1000)]
stores = []
for number, content in enumerate(contents):
    if kind == "files":
        with open(f"{folder}/{number}", "wb") as file:
            file.write(content)
        stores.append(FileStore(f"{folder}/{number}"))
    else:
        stores.append(MemoryStore(content))
began = time.perf_counter()
regions = [Region(store, "c" if number % 2 else "r") for number, store in enumerate(stores)]
print(f"1000 regions over {kind} open in {time.perf_counter() - began:.2f} s; descriptors {fds()}, mappings {maps()}")
assert fds()[0] < 30

def check(number):
    with regions[number].memory as memory:
        for at in (0, 65536 + 7, size - 3):
            assert memory[at : at + 3] == contents[number][at : at + 3], number

with ThreadPoolExecutor(8) as threads:
    list(threads.map(check, range(1000)))
worker = pager.worker_pid
os.kill(worker, 9)
for region in regions[::7]:
    region.evict()
assert pager.worker_pid != worker
with ThreadPoolExecutor(8) as threads:
    list(threads.map(check, range(1000)))
for region in regions:
    region.close()
assert pager.regions == 0
assert max(fds()) < 300, fds()
pager.close()
""",
        str(tmp_path),
        kind,
        timeout=100,
    )


def test_fifty_threads_use_regions_at_once() -> None:
    run(
        """
size = 2_000_000
shared_store = PatternStore(size, 99)
expected = shared_store.expected(0, size)
shared = Region(shared_store, budget="512KiB")
start = threading.Barrier(50)

def work(number):
    start.wait()
    rng = random.Random(number)
    store = PatternStore(size, number, concurrency=number % 2 * 4)
    with Region(store, "c" if number % 3 else "r") as own, own.memory as memory, shared.memory as common:
        for _ in range(20):
            at = rng.randrange(size - 5000)
            assert memory[at : at + 100] == store.expected(at, 100)
            assert common[at : at + 100] == expected[at : at + 100]
            if number % 3:
                memory[at] ^= 255
                assert memory[at] == store.expected(at, 1)[0] ^ 255
                memory[at] ^= 255
        own.ensure(0, 300_000)
        own.evict()
        assert memory[:1000] == store.expected(0, 1000)

with ThreadPoolExecutor(50) as threads:
    for job in [threads.submit(work, number) for number in range(50)]:
        job.result(60)
assert pager.regions == 1
shared.close()
""",
        timeout=90,
    )


def test_two_thousand_openings_leak_nothing(tmp_path: Path) -> None:
    """No descriptor, mapping, thread or memory in the application, the supervisor or the worker."""
    (tmp_path / "file").write_bytes(os.urandom(1 << 20))
    run(
        """
path, = args
warnings.simplefilter("error")
stores = FileStore(path), PatternStore(500_000), MemoryStore(bytes(300_000))

def use(number):
    region = Region(stores[number % 3], "rc"[number % 2], 4096 << number % 4)
    with region.memory as memory:
        memory[number * 77 % 300_000]
        if number % 2:
            memory[number % 300_000] = 1
    if number % 5 == 0:
        region.ensure(0, 100_000)
        region.evict()
    if number % 3:
        region.close()
        return
    region.owned_by_views()  # as an array that is forgotten
    del region

for number in range(200):
    use(number)
await_true(lambda: pager.regions == 0)
gc.collect()
before = fds(), maps(), pss()
began = time.perf_counter()
for number in range(2000):
    use(number)
took = time.perf_counter() - began
await_true(lambda: pager.regions == 0)
gc.collect()
await_true(lambda: max(a - b for a, b in zip(fds(), before[0])) <= 0)
await_true(lambda: tasks()[1] == 1 and tasks()[2] <= 3, 30)
after = fds(), maps(), pss()
print(f"2000 regions opened and closed in {took:.2f} s; descriptors {before[0]} to {after[0]}, mappings {before[1]} to "
      f"{after[1]}, KiB {[p >> 10 for p in before[2]]} to {[p >> 10 for p in after[2]]}, threads {tasks()}")
assert pager.restarts == 0
for grown, limit in ((1, 20), (2, 2 * MIB)):
    for what, a, b in zip(("application", "supervisor", "worker"), before[grown], after[grown]):
        assert b - a <= limit, (what, a, b)
""",
        str(tmp_path / "file"),
        timeout=100,
    )


def test_pagers_come_and_go_without_a_trace() -> None:
    run(
        """
from userfault import Pager
pager.close()
def use():
    with Pager() as own, Region(PatternStore(100_000), pager=own) as region:
        assert region.memory[5] == PatternStore(100_000).expected(5, 1)[0]
        return [own.pid, own.worker_pid]
use()
before = len(os.listdir("/proc/self/fd")), open("/proc/self/maps").read().count("\\n"), threading.active_count()
gone = [pid for _ in range(12) for pid in use()]
after = len(os.listdir("/proc/self/fd")), open("/proc/self/maps").read().count("\\n"), threading.active_count()
assert after[0] == before[0] and after[2] == before[2] and after[1] - before[1] < 10, (before, after)
def alive(pid):
    try:
        name, _, rest = open(f"/proc/{pid}/stat").read().rpartition(")")
    except OSError:
        return False
    return "userfault" in name and "Z" not in rest
await_true(lambda: not any(map(alive, gone)), 5)
"""
    )


def test_the_pager_is_small() -> None:
    result = run(
        """
with Region(PatternStore(1 << 20)) as region:
    region.ensure()
    print(f"supervisor {process.pss(pager.pid) / MIB:.1f} MiB, worker {process.pss(pager.worker_pid) / MIB:.1f} MiB")
    assert process.pss(pager.pid) + process.pss(pager.worker_pid) < 20 * MIB
"""
    )
    assert "MiB" in result.stdout


# -- little memory --------------------------------------------------------------------------------------------------

ROOT = Path("/sys/fs/cgroup/memory")
LIMIT = 96 << 20


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A memory cgroup of 96 MiB; its file takes the processes that are to be limited."""
    if os.path.exists("/sys/fs/cgroup/cgroup.controllers"):
        folder, limit = Path("/sys/fs/cgroup") / f"userfault-test-{uuid.uuid4().hex}", "memory.max"
    else:
        folder, limit = ROOT / f"userfault-test-{uuid.uuid4().hex}", "memory.limit_in_bytes"
    try:
        folder.mkdir()
        (folder / limit).write_text(str(LIMIT))
    except OSError as error:
        if folder.exists():
            folder.rmdir()
        pytest.skip(f"no memory cgroup can be made here: {error}")
    yield folder
    deadline = time.monotonic() + 10
    while folder.exists():  # processes take a moment to leave
        try:
            folder.rmdir()
        except OSError:
            assert time.monotonic() < deadline, (folder / "cgroup.procs").read_text()
            time.sleep(0.01)


IN_CGROUP = """
folder, path = args
with open(folder + "/cgroup.procs", "w") as procs:
    procs.write(str(os.getpid()))
pager.close()
pager = userfault.default_pager()  # its processes are born in the cgroup
v2 = os.path.exists(folder + "/memory.max")
def highest():
    with open(f"{folder}/memory.{'peak' if v2 else 'max_usage_in_bytes'}") as file:
        return int(file.read())
def killed():
    with open(folder + ("/memory.events" if v2 else "/memory.oom_control")) as file:
        return next(int(line.split()[1]) for line in file if line.startswith("oom_kill "))
available = process.memory_available()
assert available <= 96 * MIB, available
"""


@pytest.fixture
def big_file(tmp_path: Path) -> Path:
    """512 MiB: several times the limit, and more than ten times the automatic budget."""
    path = tmp_path / "big"
    with open(path, "wb") as file:
        file.writelines(number.to_bytes(2, "little") * (1 << 19) for number in range(512))
    return path


@pytest.mark.parametrize("mode", ["r", "c"])
def test_reading_far_more_than_there_is_memory(mode: str, cgroup: Path, big_file: Path) -> None:
    run(
        IN_CGROUP
        + f"""
region = Region(FileStore(path), {mode!r})
assert region.budget is not None and region.budget <= 48 * MIB
with region.memory as memory:
    numbers = memory.cast("H")
    for round in range(2):
        for step in range(0, 512 * MIB, 65536):
            assert numbers[step // 2] == numbers[step // 2 + 32767] == step // MIB, step
    numbers.release()
stats = region.stats()
print(f"budget {{region.budget / MIB:.0f}} MiB, resident {{stats.resident_bytes / MIB:.0f}} MiB,"
      f" highest use {{highest() / MIB:.0f}} of 96 MiB, {{stats.evictions}} evictions, oom kills {{killed()}}")
assert stats.resident_bytes <= region.budget
assert stats.evictions > 10_000
assert killed() == 0 and pager.restarts == 0
region.close()
pager.close()
""",
        str(cgroup),
        str(big_file),
        timeout=100,
    )


def test_private_and_pinned_blocks_outlast_a_lack_of_memory(cgroup: Path, big_file: Path) -> None:
    run(
        IN_CGROUP
        + """
region = Region(FileStore(path), "c")
changed = {step: step // 65536 % 250 + 1 for step in range(0, 512 * MIB, 4 * MIB)}  # 128 blocks, 8 MiB
with region.memory as memory, region.pinned(100 * MIB, 2 * MIB) as pinned:
    for step, value in changed.items():
        memory[step + 5 : step + 8] = bytes([value]) * 3
    for step in range(0, 512 * MIB, 65536):
        memory[step + 60_000]
    assert all(memory[step + 5 : step + 8] == bytes([value]) * 3 for step, value in changed.items())
    assert set(region.residency()[100 * 16 : 102 * 16]) <= {2, 5}
    stats = region.stats()
    assert stats.private_bytes == len(changed) * 65536
    assert stats.pinned_bytes == 2 * MIB
    assert bytes(pinned[:2]) == (100).to_bytes(2, "little") and pinned[2 * MIB - 1] == 0
    assert region.stats().resident_bytes <= region.budget
print(f"highest use {highest() / MIB:.0f} of 96 MiB")
assert killed() == 0 and pager.restarts == 0
region.close()
pager.close()
""",
        str(cgroup),
        str(big_file),
        timeout=100,
    )


def test_many_automatic_budgets_share_what_there_is(cgroup: Path, big_file: Path) -> None:
    """Together they have half of what was available when their pager started."""
    run(
        IN_CGROUP
        + """
regions = []
for number in range(4):
    region = Region(FileStore(path, number * 128 * MIB, 128 * MIB))
    with region.memory as memory:
        for step in range(0, 128 * MIB, 65536):
            memory[step]
    regions.append(region)
print(f"budgets {[r.budget // MIB for r in regions]} MiB, highest use {highest() / MIB:.0f} of 96 MiB")
assert sum(r.stats().resident_bytes for r in regions) <= pager.budget < 48 * MIB
assert killed() == 0 and pager.restarts == 0
for region in regions:
    region.close()
pager.close()
""",
        str(cgroup),
        str(big_file),
        timeout=100,
    )


def test_memory_that_is_available_is_what_the_budget_is_half_of() -> None:
    run(
        """
available = process.memory_available()
with Region(PatternStore(1 << 30)) as region:
    assert 0.3 * available < region.budget <= 0.6 * available
"""
    )
    assert process.memory_available() > 0
