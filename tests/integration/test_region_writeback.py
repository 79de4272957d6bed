"""Mode `r+`: what is written to memory is in the store, when it says so, and errors lose nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.integration.regions import await_true

from userfault import BlockState, FileStore, Pager, Region, RetryPolicy, StoreError
from userfault.testing import RefusingStore, SlowStore, run_child

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK = 65536
SIZE = 40 * BLOCK + 100
ONCE = RetryPolicy(attempts=1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of bytes that tell where they are."""
    path = tmp_path / "data"
    path.write_bytes(bytes(range(251)) * (SIZE // 251 + 1))
    os.truncate(path, SIZE)
    return path


def open_file(path: Path, **options: object) -> Region:
    return Region(FileStore(path, writable=True), "r+", **options)  # type: ignore[arg-type]  # a test's


def put(region: Region, at: int, data: bytes) -> None:
    with region.memory as memory:
        memory[at : at + len(data)] = data


def states(region: Region) -> dict[BlockState, int]:
    residency = region.residency()
    return {state: residency.count(state) for state in BlockState if state in residency and state}


# -- writing ------------------------------------------------------------------------------------------------------


def test_a_change_is_in_the_file_when_flush_returns(path: Path) -> None:
    before = path.read_bytes()
    with open_file(path) as region:
        put(region, BLOCK - 1, b"ab")
        put(region, SIZE - 1, b"z")
        assert path.read_bytes() == before
        assert states(region) == {BlockState.DIRTY: 3}
        region.flush()
        assert path.read_bytes() == before[: BLOCK - 1] + b"ab" + before[BLOCK + 1 : -1] + b"z"
        assert states(region) == {BlockState.CLEAN: 3}
        stats = region.stats()
        assert (stats.bytes_written, stats.dirty_bytes) == (2 * BLOCK + 100, 0)


def test_a_write_is_one_fault_for_a_block(path: Path) -> None:
    with open_file(path) as region:
        region.ensure()
        before = region.stats().faults
        for at in range(0, 4 * BLOCK, 4096):
            put(region, at, b"x")
        stats = region.stats()
        assert 3 <= stats.faults - before <= 4  # the last may not be counted yet
        assert stats.dirty_bytes == 4 * BLOCK


def test_closing_writes_back(path: Path) -> None:
    with open_file(path) as region:
        put(region, 5, b"hello")
    assert path.read_bytes()[5:10] == b"hello"


def test_a_region_that_is_forgotten_is_written_back(path: Path) -> None:
    region = open_file(path)
    region.owned_by_views()
    put(region, 5, b"hello")
    pager = region.pager
    del region
    pager.close()  # which waits for that
    assert path.read_bytes()[5:10] == b"hello"


def test_evicted_changes_come_back(path: Path) -> None:
    with open_file(path) as region:
        put(region, 3 * BLOCK, b"mine")
        assert region.evict() == BLOCK
        assert bytes(region.memory[3 * BLOCK : 3 * BLOCK + 4]) == b"mine"
        assert path.read_bytes()[3 * BLOCK :][:4] == b"mine"


def test_what_was_not_changed_is_not_written(path: Path) -> None:
    stamp = path.stat().st_mtime_ns
    with open_file(path) as region:
        region.ensure()
        assert bytes(region.memory) == path.read_bytes()
    assert path.stat().st_mtime_ns == stamp


def test_changes_are_written_back_in_the_background(path: Path) -> None:
    with open_file(path, sync_interval=0.5) as region:
        put(region, 7, b"later")
        for _ in range(2000):
            if path.read_bytes()[7:12] == b"later":
                break
            threading.Event().wait(0.005)
        assert path.read_bytes()[7:12] == b"later"


def test_a_budget_holds_where_everything_is_changed(path: Path) -> None:
    with open_file(path, budget=8 * BLOCK) as region:
        for round_ in range(3):
            for at in range(0, SIZE - 100, 1000):
                put(region, at, bytes((round_ + 1,)))
                assert region.residency().count(BlockState.DIRTY) <= 8
        stats = region.stats()
        assert stats.resident_bytes <= 8 * BLOCK
        assert stats.evictions >= 3 * 32
    assert path.read_bytes()[: SIZE - 100 : 1000] == b"\3" * len(range(0, SIZE - 100, 1000))


def test_two_blocks_are_not_enough_for_a_slow_store_to_stop_at(path: Path) -> None:
    """Every block that a fault could have is dirty, and the store is slow: it goes on all the same."""
    with Region(SlowStore(RefusingStore(path), 0.001), "r+", budget=4 * BLOCK) as region:
        for at in range(0, SIZE, BLOCK):
            put(region, at, b"slow")
    assert all(path.read_bytes()[at : at + 4] == b"slow"[: SIZE - at] for at in range(0, SIZE, BLOCK))


# -- the wrong way -------------------------------------------------------------------------------------------------


def test_a_store_must_be_writable(path: Path) -> None:
    with pytest.raises(ValueError, match=r"not writable; for a file pass FileStore\(path, writable=True\)"):
        Region(FileStore(path), "r+")


@pytest.mark.parametrize(
    ("value", "mode", "kind", "text"),
    [
        ("1", "r+", TypeError, "sync_interval must be a number of seconds or None, not '1'"),
        (True, "r+", TypeError, "not True"),
        (0.1, "r+", ValueError, "from 0.5 to"),
        (1, "r", ValueError, "is for mode='r\\+'"),
    ],
)
def test_an_interval_that_is_none(path: Path, value: object, mode: str, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        Region(FileStore(path, writable=True), mode, sync_interval=value)  # type: ignore[arg-type]  # wrong


# -- errors --------------------------------------------------------------------------------------------------------


@pytest.fixture
def refuse(tmp_path: Path) -> Path:
    """While it exists, nothing can be written."""
    return tmp_path / "refuse"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_what_cannot_be_written_stays(path: Path, refuse: Path, number: int) -> None:
    with Region(RefusingStore(path, refuse), "r+", retry_policy=ONCE) as region:
        put(region, 9, b"keep me")
        refuse.write_text(str(number))
        with pytest.raises(StoreError, match="could not be written to") as caught:
            region.flush()
        assert os.strerror(number) in caught.value.cause
        assert (caught.value.offset, caught.value.length) == (0, BLOCK)
        assert states(region) == {BlockState.DIRTY: 1}
        with pytest.raises(StoreError):
            region.close()
        assert not region.closed
        assert bytes(region.memory[9:16]) == b"keep me"
        assert region.evict() == 0
        refuse.unlink()
        with pytest.raises(StoreError):
            region.flush()  # what evict met is told once
        region.flush()
        assert path.read_bytes()[9:16] == b"keep me"


def test_what_cannot_be_written_can_be_saved_elsewhere(path: Path, refuse: Path, tmp_path: Path) -> None:
    with Region(RefusingStore(path, refuse), "r+", retry_policy=ONCE, budget=4 * BLOCK) as region:
        model = bytearray(path.read_bytes())
        refuse.touch()
        for at in range(0, SIZE, BLOCK):
            put(region, at, b"!")
            model[at] = ord("!")
        region.save(tmp_path / "elsewhere")
        assert (tmp_path / "elsewhere").read_bytes() == model
        refuse.unlink()
        with pytest.raises(StoreError):
            region.flush()
    assert path.read_bytes() == model


def test_a_region_whose_budget_is_full_of_pins_can_be_saved(path: Path, tmp_path: Path) -> None:
    with open_file(path, budget=4 * BLOCK) as region, region.pinned(0, 4 * BLOCK):
        region.save(tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere").read_bytes() == path.read_bytes()


def test_a_file_that_cannot_be_saved_to_is_named(path: Path, tmp_path: Path) -> None:
    child = run_child(
        """
import resource, userfault
path, elsewhere = args
with userfault.Region(userfault.FileStore(path), budget=1 << 20) as region:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        region.save(elsewhere)
    except OSError as error:
        print(error.filename, error.strerror)
""",
        str(path),
        str(tmp_path / "elsewhere"),
        timeout=30,
    )
    assert child.check().stdout == f"{tmp_path / 'elsewhere'} File too large\n"


def test_a_region_is_not_saved_over_its_own_file(path: Path) -> None:
    before = path.read_bytes()
    os.link(path, path.with_name("other name"))
    with open_file(path) as region, pytest.raises(ValueError, match="the region's own file"):
        region.save(path.with_name("other name"))
    assert path.read_bytes() == before


def test_a_write_is_tried_again(path: Path, refuse: Path) -> None:
    with Region(RefusingStore(path, refuse), "r+", retry_policy=RetryPolicy(attempts=100, backoff=0.01)) as region:
        put(region, 0, b"patience")
        refuse.touch()
        thread = threading.Thread(target=region.flush)
        thread.start()
        while not region.stats().retries:
            pass
        refuse.unlink()
        thread.join()
        assert path.read_bytes()[:8] == b"patience"


def test_bytes_that_were_not_made_durable_are_dirty_again(path: Path, tmp_path: Path) -> None:
    lose = tmp_path / "lose"
    with Region(RefusingStore(path, lose=lose), "r+") as region:
        put(region, 0, b"once")
        lose.touch()
        with pytest.raises(StoreError, match="could not make its bytes durable"):
            region.flush()
        assert states(region) == {BlockState.DIRTY: 1}
        lose.unlink()
        region.flush()
        assert states(region) == {BlockState.CLEAN: 1}
        assert region.stats().bytes_written == 2 * BLOCK


def test_bytes_that_a_dead_worker_wrote_and_nobody_made_durable(path: Path, tmp_path: Path) -> None:
    """Its successor does not know which those are: when they may be lost, whatever is there is dirty again."""
    lose = tmp_path / "lose"
    with Pager() as pager, Region(RefusingStore(path, lose=lose), "r+", pager=pager) as region:
        for at in range(0, 6 * BLOCK, BLOCK):
            put(region, at, b"once")
        region.evict(6 * BLOCK, BLOCK)  # the store takes everything, and nothing is dropped
        assert states(region) == {BlockState.CLEAN: 6}
        os.kill(pager.worker_pid, signal.SIGKILL)
        lose.touch()
        with pytest.raises(StoreError, match="could not make its bytes durable"):
            region.flush()
        # Not for good: who was asked twice, by message to the dead one and anew, is at it once more.
        await_true(lambda: states(region) == {BlockState.DIRTY: 6})
        lose.unlink()
        with contextlib.suppress(StoreError):
            region.flush()
        region.flush()
        assert states(region) == {BlockState.CLEAN: 6}


@pytest.mark.parametrize("how", ["crash", "stall"])
def test_a_write_that_ends_the_worker_or_never_returns(path: Path, tmp_path: Path, how: str) -> None:
    sign = tmp_path / "sign"
    store = RefusingStore(path, **{how: sign})
    with Region(store, "r+", retry_policy=RetryPolicy(timeout=0.3)) as region:
        put(region, 0, b"in danger")
        sign.touch()
        with pytest.raises(StoreError, match="its write does not return"):
            region.flush()
        assert bytes(region.memory[:9]) == b"in danger"
        sign.unlink()
        region.flush()
    assert path.read_bytes()[:9] == b"in danger"


def test_a_write_meets_a_flush(path: Path, tmp_path: Path) -> None:
    """The block is being written: the write does not wait for that, and is written in its turn."""
    stall = tmp_path / "stall"
    with Region(RefusingStore(path, stall=stall), "r+") as region:
        put(region, 0, b"first")
        stall.touch()
        thread = threading.Thread(target=region.flush)
        thread.start()
        while BlockState.FLUSHING not in region.residency():
            pass
        while BlockState.FLUSHING in region.residency():  # at first its pages may not be protected yet
            put(region, 0, b"again")
        stall.unlink()
        thread.join()
        assert states(region) == {BlockState.DIRTY: 1}
        region.flush()
        assert path.read_bytes()[:5] == b"again"


# -- real disks ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for half of the file."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE // 2}", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # the pager may have the file open still


def test_a_disk_that_is_full(small_disk: Path) -> None:
    path = small_disk / "sparse"
    path.touch()
    os.truncate(path, SIZE)
    with open_file(path, retry_policy=ONCE) as region:
        for at in range(0, SIZE, BLOCK):
            put(region, at, b"full")
        with pytest.raises(StoreError, match="No space left on device"):
            region.flush()
        assert BlockState.DIRTY in region.residency()
        assert all(region.memory[at : at + 4] == b"full"[: SIZE - at] for at in range(0, SIZE, BLOCK))
        subprocess.run(["mount", "-o", f"remount,size={2 * SIZE}", str(small_disk)], check=True)
    assert all(path.read_bytes()[at : at + 4] == b"full"[: SIZE - at] for at in range(0, SIZE, BLOCK))


def test_a_file_that_was_cut_off_does_not_grow_again(path: Path, tmp_path: Path) -> None:
    with open_file(path, retry_policy=ONCE) as region:
        put(region, SIZE - 10, b"the end")
        os.truncate(path, BLOCK)
        with pytest.raises(StoreError, match=r"it had .* bytes and has 65536 now"):
            region.flush()
        assert path.stat().st_size == BLOCK
        assert bytes(region.memory[SIZE - 10 : SIZE - 3]) == b"the end"
        with pytest.raises(StoreError):
            region.save(tmp_path / "saved")
        assert (tmp_path / "saved").read_bytes()[-10:-3] == b"the end"
        os.truncate(path, SIZE)
    assert path.read_bytes()[-10:-3] == b"the end"


# -- pins ----------------------------------------------------------------------------------------------------------


def test_pinned_blocks_stay_dirty(path: Path) -> None:
    """A device might write to their pages, unseen."""
    with open_file(path) as region:
        region.pin(0, BLOCK, write=True)
        put(region, 0, b"device")
        region.flush()
        assert path.read_bytes()[:6] == b"device"
        assert states(region) == {BlockState.DIRTY: 1}
        assert region.evict() == 0
        region.unpin(0, BLOCK)
        with pytest.raises(ValueError, match="not pinned"):
            region.unpin(0, BLOCK)
        region.flush()
        assert states(region) == {BlockState.CLEAN: 1}
        assert region.stats().pinned_bytes == 0


def read_beside_pins(path: str) -> None:
    """Read all of a file through a budget that is full of pinned changes."""
    with open_file(Path(path), budget=8 * BLOCK) as region:
        region.pin(0, 8 * BLOCK, write=True)
        for at in range(0, 8 * BLOCK, BLOCK):
            put(region, at, b"pinned")
        for _ in range(2):
            with region.memory as memory:
                assert bytes(memory[8 * BLOCK :]) == Path(path).read_bytes()[8 * BLOCK :]
        assert region.stats().bytes_written == 0, "what stays dirty was written, though nobody asked"
        region.unpin(0, 8 * BLOCK)
    assert all(Path(path).read_bytes()[at : at + 6] == b"pinned" for at in range(0, 8 * BLOCK, BLOCK))


def test_pinned_changes_are_not_written_for_room_that_they_cannot_make(path: Path) -> None:
    """Writing them leaves them dirty: whoever waited for room would wait for ever, and the disk would never rest."""
    run_child(read_beside_pins, str(path)).check()


def test_advice(path: Path) -> None:
    with open_file(path) as region:
        region.advise("willneed", 0, 2 * BLOCK)
        region.ensure(0, 2 * BLOCK)
        region.advise("dontneed")
        assert not states(region)
        with pytest.raises(ValueError, match=r"advice must be .* got 'sometimes'"):
            region.advise("sometimes")
