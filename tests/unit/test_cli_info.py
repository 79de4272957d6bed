"""What `userfault info` says of a file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from userfault.cli import main
from userfault.cli.info import advise, gather
from userfault.cli.storage import FileSystem, cached_bytes, file_system


def test_a_npy_file_is_described_from_its_header(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.asfortranarray(np.zeros((300, 500), np.int16)))

    facts = gather(str(path), 4096)

    assert (facts.kind, facts.dtype, facts.shape, facts.order) == (".npy", "int16", (300, 500), "F")
    assert (facts.offset, facts.size, facts.blocks) == (128, 128 + 300_000, 74)


def test_any_other_file_is_raw_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"abc" * 1000)

    facts = gather(str(path), 65536)

    assert (facts.kind, facts.dtype, facts.shape, facts.blocks) == ("raw", "uint8", (3000,), 1)


def test_an_array_without_items_is_for_numpy_load(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.zeros((0, 3)))

    assert gather(str(path), 65536).tool == "numpy.load"


def test_without_numpy_the_header_stays_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.zeros(3))
    monkeypatch.setattr("userfault.cli.info.find_spec", lambda _: None)

    facts = gather(str(path), 65536)

    assert facts.shape is None
    assert "not installed" in facts.dtype


def test_a_file_just_written_is_in_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(10_000))

    cached = cached_bytes(str(path))

    if cached is None:
        pytest.skip("cachestat(2) is not there or not allowed: Linux 6.5 or later")
    assert cached == 10_000


def test_the_file_system_is_found(tmp_path: Path) -> None:
    assert file_system(str(tmp_path)).kind


@pytest.mark.parametrize(
    ("kind", "cached", "tool", "reason"),
    [
        ("ext4", 100, "numpy.memmap", "page cache"),
        ("ext4", 10, "numpy.memmap", "what mmap is made for"),
        ("ext4", None, "numpy.memmap", "what mmap is made for"),
        ("tmpfs", 100, "numpy.memmap", "in memory already"),
        ("nfs4", 100, "userfault.open_array", "nfs4"),
        ("fuse.sshfs", 0, "userfault.open_array", "fuse.sshfs"),
        ("", 0, "numpy.memmap", "what mmap is made for"),
    ],
)
def test_advice(kind: str, cached: int | None, tool: str, reason: str) -> None:
    answer, why = advise(FileSystem(kind), cached, 100)

    assert answer == tool
    assert reason in why


def test_text_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.zeros((2, 3)))

    status = main(["info", str(path), "--block-size", "4KiB"])

    text = capsys.readouterr().out
    assert status == 0
    assert "float64 (2, 3), C order" in text
    assert "1 block of 4 KiB" in text


def test_json_for_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.zeros((2, 3)))

    status = main(["info", "--json", str(path)])

    facts = json.loads(capsys.readouterr().out)
    assert status == 0
    assert (facts["shape"], facts["dtype"], facts["block_size"]) == ([2, 3], "float64", 65536)


def _wrong_files(folder: Path) -> dict[str, str]:
    """Files that no region can be made of, and what must be said of each."""
    np.save(folder / "whole.npy", np.zeros(1000))
    np.save(folder / "object.npy", np.array([None, "a"], dtype=object))
    (folder / "truncated.npy").write_bytes((folder / "whole.npy").read_bytes()[:500])
    (folder / "damaged.npy").write_bytes(b"\x93NUMPY\x01\x00\xff\xff{")
    (folder / "magic.npy").write_bytes(b"\x93NUMPY")
    (folder / "empty").touch()
    os.mkfifo(folder / "fifo")
    return {
        "missing": "No such file",
        ".": "Is a directory",
        "empty": "is empty",
        "fifo": "not a regular file",
        "truncated.npy": "is truncated",
        "damaged.npy": "damaged",
        "magic.npy": "damaged",
        "object.npy": "holds Python objects",
    }


def test_what_is_no_array_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, reason in _wrong_files(tmp_path).items():
        status = main(["info", str(tmp_path / name)])

        out, err = capsys.readouterr()
        assert (status, out, err.count("\n")) == (2, "", 1), name
        assert err.startswith("userfault info: "), name
        assert reason in err, err
