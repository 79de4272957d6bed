"""The table of open files."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from userfault.stores import descriptors
from userfault.stores.descriptors import FileChangedError, OpenFile, difference, forget, identify, open_file
from userfault.testing import run_child


@pytest.fixture(autouse=True)
def _empty_table() -> Iterator[None]:
    descriptors._table.clear()
    yield
    descriptors._table.clear()


def make(folder: Path, count: int) -> list[tuple[str, descriptors.Identity]]:
    files = []
    for number in range(count):
        path = folder / f"file-{number}"
        path.write_bytes(b"%d" % number)
        files.append((str(path), identify(path.stat())))
    return files


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_a_file_is_opened_once(tmp_path: Path) -> None:
    [(path, identity)] = make(tmp_path, 1)

    assert open_file(path, identity) is open_file(path, identity)


def test_a_descriptor_is_not_inherited(tmp_path: Path) -> None:
    [(path, identity)] = make(tmp_path, 1)

    assert not os.get_inheritable(open_file(path, identity).fd)


def test_the_least_recently_used_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "_limit", 2)
    files = make(tmp_path, 3)
    first, second = (open_file(*file).fd for file in files[:2])
    open_file(*files[0])

    open_file(*files[2])

    assert is_open(first)
    assert not is_open(second)


def test_a_file_in_use_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "_limit", 1)
    files = make(tmp_path, 2)
    used = open_file(*files[0])
    open_file(*files[1])

    assert os.pread(used.fd, 1, 0) == b"0"
    fd = used.fd
    del used
    assert not is_open(fd)


def test_a_forgotten_file_is_closed(tmp_path: Path) -> None:
    [(path, identity)] = make(tmp_path, 1)
    fd = open_file(path, identity).fd

    forget(path, identity)
    forget(path, identity)

    assert not is_open(fd)


def test_a_path_with_another_file_is_refused(tmp_path: Path) -> None:
    (path, identity), (_, other) = make(tmp_path, 2)

    with pytest.raises(FileChangedError, match="another file has taken its name"):
        open_file(path, other)
    assert os.pread(open_file(path, identity).fd, 1, 0) == b"0"


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_file(str(tmp_path / "none"), (1, 2, 3, 4))


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ((1, 2, 3, 4), ""),
        ((9, 2, 3, 4), "another file has taken its name (inode 2, now 2)"),
        ((1, 9, 3, 4), "another file has taken its name (inode 2, now 9)"),
        ((1, 2, 9, 4), "it had 3 bytes and has 9 now"),
        ((1, 2, 3, 9), "it has been written to"),
    ],
)
def test_a_difference_is_said_in_words(found: descriptors.Identity, text: str) -> None:
    assert difference((1, 2, 3, 4), found) == text


def test_many_threads_may_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "_limit", 3)
    files = make(tmp_path, 8)
    wrong: list[object] = []
    start = threading.Barrier(8)

    def read() -> None:
        start.wait()
        for turn in range(200):
            number = turn % len(files)
            file = open_file(*files[number])
            if os.pread(file.fd, 1, 0) != b"%d" % number:
                wrong.append(number)

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert wrong == []
    assert len(descriptors._table) <= 3


def read_with_few_descriptors(folder: str) -> list[int]:
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
    files = make(Path(folder), 100)
    for number, file in enumerate(files):
        assert os.pread(open_file(*file).fd, 2, 0) == b"%d" % number
    return [len(descriptors._table)]


def test_a_low_limit_of_the_system_makes_room(tmp_path: Path) -> None:
    [entries] = run_child(read_with_few_descriptors, str(tmp_path)).check().value

    assert entries < 32


def test_an_unopened_file_has_nothing_to_close(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        OpenFile(str(tmp_path / "none"))
