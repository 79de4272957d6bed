"""FileStore beyond the conformance kit: parts, identity, what is hot, descriptors."""

from __future__ import annotations

import errno
import gc
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from userfault.errors import KernelError, StoreError
from userfault.kernel import memory
from userfault.kernel.abi import RegisterMode
from userfault.kernel.userfaultfd import Userfaultfd
from userfault.stores import FileStore, descriptors, page_cache
from userfault.stores import file as file_module
from userfault.stores.belief import CHUNK
from userfault.testing import no_leaks, run_child, touch
from userfault.testing.reading import read_bytes

PAGE = memory.PAGE_SIZE
BLOCK = 65536
DATA = random.Random(7).randbytes(CHUNK + 5 * BLOCK + 777)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def store(path: Path) -> Iterator[FileStore]:
    store = FileStore(path)
    yield store
    store.close()


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(file_module, "monotonic", clock)
    return clock


def located(store: FileStore, offset: int = 0) -> int:
    """Make a block hot and have it located; 0 only where it cannot be told what is hot."""
    for _ in range(50):
        for start in range(0, store.size, 1 << 20):
            read_bytes(store, start, min(1 << 20, store.size - start))
        if address := store.locate(offset, BLOCK):
            return address
    return 0


def reading(store: FileStore) -> bytes:
    """Read a byte: a store knows nothing about its file before."""
    return read_bytes(store, 0, 1)


@pytest.fixture
def can_locate(store: FileStore) -> None:
    with open(store._path, "rb") as file:
        if page_cache.reading_mode(file.fileno()) < 0 or page_cache.cached(file.fileno(), 0, 1) is None:
            pytest.skip("needs Linux 6.5 and a file system with RWF_NOWAIT: pass --basetemp on one")


# -- what it takes --------------------------------------------------------------------------------------------


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none"):
        FileStore(tmp_path / "none")


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        FileStore(tmp_path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()

    with pytest.raises(ValueError, match=r"'.*empty' is empty: a region needs at least one byte"):
        FileStore(tmp_path / "empty")


def test_a_pipe_is_refused_without_waiting_for_its_other_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    with pytest.raises(ValueError, match="is not a regular file"):
        FileStore(tmp_path / "pipe")


def test_a_device_is_refused() -> None:
    with pytest.raises(ValueError, match="'/dev/zero' is not a regular file"):
        FileStore("/dev/zero")


def open_without_permission(path: str) -> str:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    try:
        FileStore(path)
    except PermissionError as error:
        return str(error)
    return "opened"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_a_file_that_may_not_be_read_is_refused(path: Path) -> None:
    path.chmod(0o600)

    text = run_child(open_without_permission, str(path)).check().value

    assert text.startswith("[Errno 13] Permission denied: ")


def open_to_write(path: str) -> str:
    os.setuid(65534)
    try:
        FileStore(path, writable=True)
    except PermissionError as error:
        return str(error)
    return "opened"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_a_file_that_may_not_be_written_to_is_refused(path: Path) -> None:
    path.chmod(0o644)
    for folder in list(path.parents)[:3]:
        folder.chmod(0o755)

    assert run_child(open_to_write, str(path)).check().value.startswith("[Errno 13] Permission denied: ")


def test_what_is_written_is_read_and_no_change_by_somebody_else(path: Path) -> None:
    store, other = FileStore(path, 100, 5000, writable=True), FileStore(path)
    before = path.read_bytes()

    assert read_bytes(store, 0, 10) == before[100:110]
    store.write(4990, memoryview(b"0123456789"))
    store.flush()

    assert read_bytes(store, 4985, 15) == before[5085:5090] + b"0123456789"
    assert path.read_bytes() == before[:5090] + b"0123456789" + before[5100:]
    with pytest.raises(StoreError, match="it has been written to"):
        read_bytes(other, 0, 1)
    with pytest.raises(ValueError, match="outside its 5000 bytes"):
        store.write(4991, memoryview(b"0123456789"))
    store.close()
    other.close()


@pytest.mark.parametrize("call", ["fsync", "pwrite", "preadv"])
def test_another_store_of_the_file_is_closed_in_the_middle(
    path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """They share one open file: its descriptor must outlast the call, or it may be somebody else's by then."""
    store, other = FileStore(path, writable=True), FileStore(path, writable=True)
    real = getattr(os, call)

    def close_first(*arguments: Any) -> Any:
        other.close()
        return real(*arguments)

    monkeypatch.setattr(os, call, close_first)
    store.write(0, memoryview(b"abc"))
    store.flush()
    assert read_bytes(store, 0, 3) == b"abc"
    store.close()


@pytest.mark.parametrize("change", ["cut off", "replaced", "removed"])
def test_a_file_that_is_no_longer_the_same_is_not_written_to(path: Path, change: str) -> None:
    store = FileStore(path, writable=True)
    store.write(0, memoryview(b"before"))
    if change == "cut off":
        os.truncate(path, 10)
    else:
        path.unlink()
    if change == "replaced":
        path.write_bytes(bytes(store.size))

    with pytest.raises(StoreError, match=r"changed beneath us|cannot be written to"):
        store.write(0, memoryview(b"after"))

    assert not path.exists() or b"after" not in path.read_bytes()
    store.close()


@pytest.mark.parametrize(
    ("offset", "size", "text"),
    [
        (-1, None, r"offset -1 is not in '.*data', which has 2425609 bytes: use 0 to 2425608"),
        (len(DATA), None, f"offset {len(DATA)} is not in "),
        (1 << 60, None, f"offset {1 << 60} is not in "),
        (0, 0, "size 0 is not positive: leave it out for everything from the offset on"),
        (0, -5, "size -5 is not positive"),
        (
            0,
            len(DATA) + 1,
            f"size {len(DATA) + 1} at offset 0 ends after the end of .*: use at most {len(DATA)}",
        ),
        (1, len(DATA), f"size {len(DATA)} at offset 1 ends after the end of .*: use at most {len(DATA) - 1}"),
    ],
)
def test_a_part_outside_the_file_is_refused(path: Path, offset: int, size: int | None, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        FileStore(path, offset, size)


@pytest.mark.parametrize(("offset", "size"), [(1.0, None), ("0", None), (0, 1.5), (0, "10")])
def test_a_part_that_is_not_in_integers_is_refused(path: Path, offset: Any, size: Any) -> None:
    with pytest.raises(TypeError, match="integer"):
        FileStore(path, offset, size)


@pytest.mark.parametrize("thing", [None, 7, ["data"]])
def test_what_is_no_path_is_refused(thing: Any) -> None:
    with pytest.raises(TypeError):
        FileStore(thing)


def test_a_refused_file_leaves_nothing_behind(tmp_path: Path, path: Path) -> None:
    (tmp_path / "empty").touch()
    with no_leaks():
        for wrong in (tmp_path, tmp_path / "none", tmp_path / "empty", "/dev/zero"):
            with pytest.raises((OSError, ValueError)):
                FileStore(wrong)
        with pytest.raises(ValueError, match="offset"):
            FileStore(path, -1)


def test_any_spelling_of_a_path_will_do(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)

    same: list[Any] = ["data", path, str(path), os.fsencode(path), "./data"]
    assert len({FileStore(spelling) for spelling in same}) == 1


def test_a_name_that_is_not_utf8_will_do(tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe")
    Path(name).write_bytes(b"odd")

    store = pickle.loads(pickle.dumps(FileStore(name)))

    assert read_bytes(store, 0, 3) == b"odd"
    store.describe().encode()


# -- parts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1, 128, PAGE - 1, PAGE, PAGE + 1, CHUNK + 3])
def test_a_part_reads_and_locates_its_own_bytes(path: Path, offset: int) -> None:
    store = FileStore(path, offset, 4 * BLOCK + 11)

    assert read_bytes(store, 0, store.size) == DATA[offset : offset + store.size]
    for start in range(0, store.size, BLOCK):
        length = min(BLOCK, store.size - start)
        if address := located(store, start):
            assert touch(address, length) == DATA[offset + start : offset + start + length]
    store.close()


def test_a_part_ends_where_it_ends(path: Path) -> None:
    store = FileStore(path, 10, 100)

    with pytest.raises(ValueError, match="offset 99, length 2 is outside its 100 bytes"):
        read_bytes(store, 99, 2)


def test_parts_differ(path: Path) -> None:
    whole, part = FileStore(path), FileStore(path, 10, 100)

    assert whole != part
    assert whole.identity() != part.identity()
    assert whole.describe() == f"FileStore({str(path)!r})"
    assert part.describe() == f"FileStore({str(path)!r}, offset=10, size=100)"
    assert len({whole, part, FileStore(path)}) == 2


def test_a_terabyte_of_nothing_opens_and_reads(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        try:
            file.truncate(1 << 40)
        except OSError as error:
            pytest.skip(f"this file system has no files of 1 TiB: {error}")
    store = FileStore(path)

    for offset in (0, 1 << 39, (1 << 40) - PAGE):
        assert store.locate(offset, PAGE) == 0 or touch(store.locate(offset, PAGE)) == b"\0"
        assert read_bytes(store, offset, PAGE) == bytes(PAGE)
    store.close()


# -- changed beneath us ---------------------------------------------------------------------------------------


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(DATA)
    shutil.copystat(path, other)
    other.rename(path)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"new")
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))  # the kernel's clock may not have ticked since


def shorten(path: Path) -> None:
    os.truncate(path, len(DATA) // 2)


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def remove(path: Path) -> None:
    path.unlink()


CHANGES: dict[Callable[[Path], None], str] = {
    replace: "the file has changed beneath us .*: another file has taken its name",
    overwrite: "the file has changed beneath us .*: it has been written to",
    shorten: "the file has changed beneath us .*: it had 2425609 bytes and has 1212804 now",
    lengthen: "the file has changed beneath us .*: it had 2425609 bytes and has 2425613 now",
    remove: "the file cannot be read .*: .*No such file or directory",
}


@pytest.fixture(params=CHANGES, ids=lambda change: change.__name__)
def change(request: pytest.FixtureRequest) -> Callable[[Path], None]:
    result: Callable[[Path], None] = request.param
    return result


def assert_refuses(store: FileStore, change: Callable[[Path], None]) -> None:
    with pytest.raises(StoreError, match=CHANGES[change]) as caught:
        read_bytes(store, BLOCK, 10)
    assert (caught.value.store, caught.value.offset, caught.value.length) == (store.describe(), BLOCK, 10)
    assert caught.value.cause


def test_a_change_before_the_first_read_is_an_error(
    store: FileStore, path: Path, change: Callable[[Path], None]
) -> None:
    change(path)

    assert_refuses(store, change)


def test_a_change_between_reads_is_an_error(store: FileStore, path: Path, change: Callable[[Path], None]) -> None:
    read_bytes(store, BLOCK, 10)
    change(path)

    assert_refuses(store, change)
    assert_refuses(store, change)


def test_a_change_during_a_read_is_an_error(
    store: FileStore, path: Path, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv

    def preadv(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        got = real(fd, [memoryview(buffers[0])[:5]], offset, flags)
        monkeypatch.setattr(os, "preadv", real)
        change(path)
        return got

    monkeypatch.setattr(os, "preadv", preadv)

    assert_refuses(store, change)


def test_a_change_is_an_error_in_another_process_too(
    store: FileStore, path: Path, change: Callable[[Path], None]
) -> None:
    travelling = pickle.dumps(store)
    change(path)

    assert_refuses(pickle.loads(travelling), change)


def test_a_change_is_noticed_where_nothing_waits(
    store: FileStore, path: Path, clock: Clock, change: Callable[[Path], None]
) -> None:
    located(store, BLOCK)
    store.read_now(BLOCK, memoryview(bytearray(10)))

    change(path)
    clock.now += file_module.CHECK_S

    for _ in range(10):
        assert store.locate(BLOCK, BLOCK) == 0
        assert store.read_now(BLOCK, memoryview(bytearray(10))) is False
    assert_refuses(store, change)


def test_a_link_that_points_elsewhere_now_is_an_error(path: Path, tmp_path: Path) -> None:
    link, other = tmp_path / "link", tmp_path / "other"
    other.write_bytes(DATA)
    link.symlink_to(path)
    store = FileStore(link)
    link.unlink()
    link.symlink_to(other)

    with pytest.raises(StoreError, match="another file has taken its name"):
        read_bytes(store, 0, 1)


def test_another_name_or_mode_is_no_change(store: FileStore, path: Path, tmp_path: Path) -> None:
    path.chmod(0o444)
    os.link(path, tmp_path / "another")

    assert read_bytes(store, 0, 10) == DATA[:10]


def test_a_failing_disk_is_an_error(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def preadv(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", preadv)

    with pytest.raises(StoreError, match=r"the file cannot be read \(offset 7, length 10\): .*Input/output error"):
        read_bytes(store, 7, 10)


def test_a_read_in_pieces_is_put_together(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset, *rest: real(fd, [buffers[0][:7]], offset, *rest))

    assert read_bytes(store, 3, 100) == DATA[3:103]


def test_reading_a_shortened_mapping_by_the_kernel_is_an_error_not_a_signal(
    store: FileStore, path: Path, can_locate: None
) -> None:
    address = located(store, CHUNK)
    destination = memory.map_memory(PAGE)
    with Userfaultfd.open(user_mode_only=True) as uffd:
        uffd.register(destination, PAGE, RegisterMode.MISSING)
        os.truncate(path, 10)

        assert uffd.copy(destination, address, PAGE) == (0, errno.EFAULT)
    memory.unmap(destination, PAGE)


# -- hot or cold ----------------------------------------------------------------------------------------------


def test_a_hot_file_is_located(store: FileStore, can_locate: None) -> None:
    address = located(store, BLOCK)

    assert touch(address, BLOCK) == DATA[BLOCK : 2 * BLOCK]


def test_a_hot_file_is_read_now(store: FileStore, can_locate: None) -> None:
    buffer = bytearray(BLOCK)

    for _ in range(50):
        read_bytes(store, 0, BLOCK)
        if store.read_now(0, memoryview(buffer)):
            break

    assert buffer == DATA[:BLOCK]


def test_a_cold_file_is_neither(store: FileStore, path: Path, can_locate: None) -> None:
    reading(store)
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    if page_cache.reading_mode(fd) == page_cache.PLAIN:
        pytest.skip("this file system is memory: nothing in it is ever cold")

    for offset in range(BLOCK, 20 * BLOCK, BLOCK):
        assert store.locate(offset, BLOCK) == 0
        assert store.read_now(offset, memoryview(bytearray(BLOCK))) is False
    assert not page_cache.cached(fd, 10 * BLOCK, PAGE)
    os.close(fd)


def test_what_is_believed_is_not_asked_for(
    store: FileStore, clock: Clock, can_locate: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(10):
        located(store)
    monkeypatch.setattr(page_cache, "cached", lambda *_: pytest.fail("asked"))

    assert store.locate(BLOCK, BLOCK) == store.locate(0, BLOCK) + BLOCK
    clock.now += 0.004
    assert store.locate(2 * BLOCK, BLOCK)


def test_what_was_believed_is_asked_for_again_in_time(
    store: FileStore, clock: Clock, can_locate: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(10):
        located(store)
    clock.now += 1.0
    monkeypatch.setattr(page_cache, "cached", lambda *_: False)

    assert store.locate(0, BLOCK) == 0


def test_a_kernel_that_does_not_say_makes_nothing_hot_and_reads_now(
    store: FileStore, can_locate: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_cache, "cached", lambda *_: None)
    monkeypatch.setattr(page_cache, "reading_mode", lambda _: page_cache.NOWAIT)
    monkeypatch.setattr(page_cache, "try_read", lambda fd, buffer, offset, _: os.preadv(fd, [buffer], offset))
    buffer = bytearray(BLOCK)

    reading(store)
    assert [store.locate(0, BLOCK) for _ in range(10)] == [0] * 10
    assert store.read_now(0, memoryview(buffer)) is True
    assert buffer == DATA[:BLOCK]


def test_a_file_system_that_cannot_makes_nothing_hot(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache, "reading_mode", lambda _: page_cache.CANNOT)

    assert [store.locate(0, BLOCK) for _ in range(10)] == [0] * 10
    assert store.read_now(0, memoryview(bytearray(10))) is False
    assert read_bytes(store, 0, 10) == DATA[:10]


def test_plain_reading_needs_the_kernels_word(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache, "reading_mode", lambda _: page_cache.PLAIN)
    monkeypatch.setattr(page_cache, "cached", lambda *_: None)

    reading(store)
    assert store.locate(0, BLOCK) == 0
    assert store.read_now(0, memoryview(bytearray(10))) is False


def test_a_block_still_on_its_way_is_not_hot(
    store: FileStore, can_locate: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_cache, "cached", lambda *_: True)
    monkeypatch.setattr(page_cache, "reading_mode", lambda _: page_cache.NOWAIT)
    monkeypatch.setattr(page_cache, "try_read", lambda *_: 0)

    reading(store)
    assert [store.locate(0, BLOCK) for _ in range(10)] == [0] * 10
    assert store.read_now(0, memoryview(bytearray(10))) is False


def test_a_file_that_cannot_be_mapped_is_never_located(
    store: FileStore, can_locate: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def map_memory(*_: Any, **__: Any) -> int:
        raise KernelError(errno.ENODEV, "mmap")

    monkeypatch.setattr(memory, "map_memory", map_memory)

    assert located(store) == 0
    assert read_bytes(store, 0, 10) == DATA[:10]


def test_a_file_on_a_memory_file_system_works(tmp_path: Path) -> None:
    fd = os.memfd_create("data")
    os.write(fd, DATA)
    store = FileStore(f"/proc/{os.getpid()}/fd/{fd}")

    address = located(store, BLOCK)

    assert not address or touch(address, BLOCK) == DATA[BLOCK : 2 * BLOCK]
    assert read_bytes(store, 1, 10) == DATA[1:11]
    store.close()
    os.close(fd)


# -- what it holds --------------------------------------------------------------------------------------------


def test_closing_gives_everything_back_and_reading_opens_anew(store: FileStore, can_locate: None) -> None:
    with no_leaks():
        for _ in range(3):
            assert touch(located(store), 10) == DATA[:10]
            store.close()


def test_a_forgotten_store_holds_nothing(path: Path) -> None:
    with no_leaks():
        store = FileStore(path)
        located(store)
        del store
        gc.collect()


def mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


def test_closing_unmaps(store: FileStore, path: Path, can_locate: None) -> None:
    located(store)
    assert mapped(path)

    store.close()

    assert not mapped(path)


def open_thousands(folder: str) -> list[int]:
    import resource

    paths = [f"{folder}/file-{number}" for number in range(2000)]
    for number, path in enumerate(paths):
        with open(path, "wb") as file:
            file.write(b"%04d" % number * 2000)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))
    stores = [FileStore(path) for path in paths]
    order = [*range(2000)] * 2
    random.Random(1).shuffle(order)
    for number in order:
        assert read_bytes(stores[number], 4, 8) == b"%04d" % number * 2
        address = stores[number].locate(0, PAGE)
        assert not address or touch(address, 4) == b"%04d" % number
    open_files = len(os.listdir("/proc/self/fd"))
    located_ones = sum(bool(store.locate(0, PAGE)) for store in stores)
    for store in stores:
        store.close()
    return [open_files, located_ones, len(os.listdir("/proc/self/fd"))]


def test_two_thousand_stores_live_under_a_low_limit(tmp_path: Path) -> None:
    open_files, _, after = run_child(open_thousands, str(tmp_path), timeout=60).check().value

    assert open_files <= descriptors.LIMIT + 20
    assert after < 20


def read_in_forked_child(path: str) -> int:
    store = FileStore(path)
    located(store)
    pid = os.fork()
    if not pid:
        right = read_bytes(store, 5, 10) == DATA[5:15]
        address = store.locate(0, BLOCK)
        right = right and (not address or touch(address, 10) == DATA[:10])
        store.close()
        os._exit(0 if right else 1)
    status = os.waitpid(pid, 0)[1]
    assert read_bytes(store, 5, 10) == DATA[5:15]
    store.close()
    return os.waitstatus_to_exitcode(status)


def test_both_sides_of_a_fork_may_go_on(path: Path) -> None:
    assert run_child(read_in_forked_child, str(path)).check().value == 0


def test_a_store_that_is_alive_at_exit_ends_quietly(path: Path) -> None:
    source = """
from userfault.stores import FileStore
from userfault.testing import read_bytes
store = FileStore(args[0])
for _ in range(10):
    read_bytes(store, 0, 65536)
    store.locate(0, 65536)
import sys
sys.keep = store
"""

    assert run_child(source, str(path)).check().stderr == ""


def test_nothing_is_known_before_the_first_read(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_module, "open_file", lambda *_: pytest.fail("opened in the fault loop"))

    assert [store.locate(0, BLOCK) for _ in range(10)] == [0] * 10
    assert store.read_now(0, memoryview(bytearray(10))) is False
