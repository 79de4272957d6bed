"""The end of a region, whoever else is busy with it. In children: what goes wrong here is a signal."""

from __future__ import annotations

from pathlib import Path

import pytest

from userfault.testing import run_child

PRELUDE = """
import gc, os, threading, time, warnings
from concurrent.futures import ThreadPoolExecutor
import userfault
from userfault import FileStore, MemoryStore, Region, RegionClosedError, StoreError
from userfault.testing import PatternStore, StallingStore, SlowStore
SIZE = 3_000_000
STORE = PatternStore(SIZE, concurrency=0)
def await_true(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never became true"
        time.sleep(0.002)
"""


def run(source: str, *args: object, timeout: float = 40.0) -> str:
    return run_child(PRELUDE + source, *args, timeout=timeout).check().stdout


def test_a_waiting_ensure_ends_when_the_region_closes(tmp_path: Path) -> None:
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        run(
            """
folder, = args
store = StallingStore(PatternStore(SIZE), folder + "/never", folder + "/entered")
region = Region(store)
with ThreadPoolExecutor(8) as threads:
    waiting = [threads.submit(region.ensure, at) for at in range(0, SIZE, SIZE // 8)]
    await_true(lambda: os.path.exists(folder + "/entered"))
    region.close()
    for wait in waiting:
        error = wait.exception(20)
        assert isinstance(error, (StoreError, RegionClosedError)), error
        assert "closed" in str(error)
assert region.pager.regions == 0
open(folder + "/never", "w").close()
""",
            str(folder),
        )


def test_closing_races_with_every_other_method() -> None:
    """Each method does what it should, or says that the region is closed; never anything else, never a signal."""
    run(
        """
def use(region, verb):
    while True:
        try:
            verb(region)
        except RegionClosedError:
            return
        except StoreError as error:
            assert "closed" in str(error), error

def pin(region):
    with region.pinned(500_000, 5) as view:
        assert view == STORE.expected(500_000, 5)

verbs = [
    lambda r: r.stats(), lambda r: r.residency(), lambda r: r.ensure(100_000, 200_000), lambda r: r.prefetch(),
    lambda r: r.evict(), lambda r: r.retry(0, 10), pin,
]
with ThreadPoolExecutor(len(verbs)) as threads:
    for _ in range(40):
        region = Region(PatternStore(SIZE), block_size=4096)
        users = [threads.submit(use, region, verb) for verb in verbs]
        region.residency()
        while True:
            try:
                region.close()
                break
            except BufferError:  # somebody's ensure holds a view at this moment
                pass
        for user in users:
            user.result(20)
assert userfault.default_pager().regions == 0
""",
        timeout=60,
    )


def test_two_threads_close_at_once() -> None:
    run(
        """
with ThreadPoolExecutor(4) as threads:
    for _ in range(50):
        region = Region(STORE)
        for closing in [threads.submit(region.close) for _ in range(4)]:
            closing.result(20)
        assert region.closed
assert userfault.default_pager().regions == 0
"""
    )


def test_a_fault_in_flight_holds_the_region_open_by_its_view(tmp_path: Path) -> None:
    run(
        """
folder, = args
store = StallingStore(PatternStore(SIZE), folder + "/go", folder + "/entered")
region = Region(store)
from userfault.testing import touch
def read():
    with region.memory:
        return touch(region.address + 5)  # without the GIL
with ThreadPoolExecutor(1) as threads:
    reader = threads.submit(read)
    await_true(lambda: os.path.exists(folder + "/entered"))
    try:
        region.close()
        raise SystemExit("closed under a reader")
    except BufferError:
        pass
    open(folder + "/go", "w").close()
    assert reader.result(20) == store.inner.expected(5, 1)
region.close()
""",
        str(tmp_path),
    )


def test_del_in_any_order_ends_the_region() -> None:
    run(
        """
warnings.simplefilter("ignore", ResourceWarning)
pager = userfault.default_pager()
expected = STORE.expected(0, SIZE)
for order in ("region first", "view first", "cycle", "thread"):
    region = Region(STORE, "c")
    view = region.memory
    view[0] = 7
    if order == "region first":
        del region
        assert pager.regions == 1
        assert view[1:] == expected[1:] and view[0] == 7
        del view
    elif order == "view first":
        del view
        assert pager.regions == 1
        del region
    elif order == "cycle":
        cycle = [region, view]
        cycle.append(cycle)
        del region, view, cycle
        gc.collect()
    else:
        box = [region, view]
        del region, view
        thread = threading.Thread(target=box.clear)
        thread.start()
        thread.join()
    await_true(lambda: pager.regions == 0)
"""
    )


def test_addresses_are_used_again_without_a_stray_byte() -> None:
    """A block of a region that has just gone must never land in the one that follows at the same addresses."""
    run(
        """
stores = [PatternStore(SIZE, seed) for seed in range(2)]
expected = [store.expected(0, SIZE) for store in stores]
addresses = set()
for step in range(60):
    region = Region(stores[step % 2])
    addresses.add(region.address)
    region.prefetch()
    with region.memory as memory:
        at = step * 40_000
        assert memory[at : at + 100_000] == expected[step % 2][at : at + 100_000]
    region.close()
print(len(addresses))
""",
        timeout=60,
    )


def test_the_program_ends_with_regions_open() -> None:
    result = run_child(PRELUDE + "r = Region(STORE); m = r.memory; print(m[5] == STORE.expected(5, 1)[0])").check()
    assert result.stdout == "True\n"
    assert "Error" not in result.stderr


@pytest.mark.parametrize("ending", ["sys.exit(3)", "os._exit(3)", "raise SystemExit(3)"])
def test_the_program_may_end_as_it_likes(ending: str) -> None:
    result = run_child(PRELUDE + f"import sys; r = Region(STORE, 'c'); r.memory[0] = 1; {ending}")
    assert result.status == 3, result.stderr


def test_a_program_that_goes_wrong_in_the_middle_shows_its_own_error() -> None:
    result = run_child(PRELUDE + "r = Region(STORE); m = r.memory; m[0]; 1 / 0")
    assert result.status == 1
    assert "ZeroDivisionError" in result.stderr


def test_a_region_that_could_not_open_leaves_nothing() -> None:
    run(
        """
from userfault.testing import UnpicklableStore, LyingSizeStore, no_leaks
pager = userfault.default_pager()
with no_leaks():
    for _ in range(20):
        for store, options in (
            (UnpicklableStore(SIZE), {}),
            (STORE, {"block_size": 1000}),
            (STORE, {"mode": "w"}),
            (STORE, {"budget": 5}),
            (PatternStore(1 << 60), {}),
            ("no store", {}),
            (STORE, {"pager": "none"}),
        ):
            try:
                Region(store, **options)
            except (TypeError, ValueError, userfault.Error) as error:
                del error
            else:
                raise SystemExit(f"{store} {options} was accepted")
assert pager.regions == 0
""",
        timeout=60,
    )


def test_a_store_that_cannot_be_made_in_the_pager_says_why_and_leaves_nothing() -> None:
    output = run(
        """
from userfault.testing import no_leaks
from userfault.stores import Store
import tempfile, sys
folder = tempfile.mkdtemp()
with open(folder + "/troubled.py", "w") as file:
    file.write('''
from userfault.stores import Store
class Troubled(Store):
    size = 100
    def __setstate__(self, state): raise RuntimeError("no tape in the drive")
    def __getstate__(self): return (1,)
    def read_into(self, offset, buffer): pass
class Growing(Store):
    def __init__(self, size): self.size = size
    def __reduce__(self): return Growing, (self.size * 2,)
    def read_into(self, offset, buffer): buffer[:] = bytes(len(buffer))
class Exiting(Troubled):
    def __setstate__(self, state): raise SystemExit(5)
''')
sys.path.append(folder)
import troubled
userfault.default_pager()
with no_leaks():
    for store in (troubled.Troubled(), troubled.Growing(100), troubled.Exiting()):
        try:
            Region(store)
        except StoreError as error:
            print(error)
            del error
with Region(STORE) as region:
    assert region.memory[7] == STORE.expected(7, 1)[0]
assert region.pager.restarts == 0
import shutil; shutil.rmtree(folder)
"""
    ).splitlines()
    assert len(output) == 3
    assert "RuntimeError: no tape in the drive" in output[0]
    assert "200 bytes, but had 100" in output[1]
    assert "SystemExit: 5" in output[2]
