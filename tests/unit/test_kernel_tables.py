"""Kernel flags, messages and /proc texts as data: no kernel is asked here."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from userfault import kernel
from userfault.kernel import (
    Event,
    FaultFlag,
    Feature,
    Fork,
    Gate,
    Ioctl,
    PageFault,
    Remap,
    Remove,
    Unknown,
    Unmap,
    abi,
    opening,
    parse,
    process,
)
from userfault.kernel.fdinfo import parse_fdinfo

if TYPE_CHECKING:
    from pathlib import Path

_U64 = st.integers(0, 2**64 - 1)


# -- flags ---------------------------------------------------------------------------------------------------


def test_flags_keep_bits_that_they_do_not_know() -> None:
    flags = Feature(1 << 40 | Feature.MOVE)

    assert int(flags) == 1 << 40 | 1 << 16
    assert Feature.MOVE in flags
    assert int(flags & ~Feature.MOVE) == 1 << 40
    assert Feature.MOVE not in flags & ~Feature.MOVE


def test_every_feature_has_its_first_kernel() -> None:
    assert list(abi.FEATURE_SINCE) == list(Feature)
    assert (abi.FEATURE_SINCE[Feature.EVENT_FORK], abi.FEATURE_SINCE[Feature.MOVE]) == ("4.11", "6.8")


def test_features_are_described_by_name_and_newest_kernel() -> None:
    names, remedy = opening.describe_features(Feature.MOVE | Feature.EVENT_FORK | Feature.MINOR_SHMEM)
    assert names == "EVENT_FORK, MINOR_SHMEM, MOVE"
    assert remedy.startswith("It needs Linux 6.8 ")

    # 5.14 is newer than 5.7: numbers, not text.
    assert "5.14" in opening.describe_features(Feature.PAGEFAULT_FLAG_WP | Feature.MINOR_SHMEM)[1]

    names, remedy = opening.describe_features(Feature.MOVE | 1 << 40)
    assert names == "MOVE, 0x10000000000 (no name known)"
    assert "newer than this library" in remedy


# -- messages ------------------------------------------------------------------------------------------------

_message = st.one_of(
    st.builds(
        lambda flags, address, tid: (
            struct.pack("=B7xQQI4x", 0x12, flags, address, tid),
            PageFault(address, FaultFlag(flags), tid),
        ),
        _U64,
        _U64,
        st.integers(0, 2**32 - 1),
    ),
    st.builds(lambda fd: (struct.pack("=B7xI20x", 0x13, fd), Fork(fd)), st.integers(0, 2**31 - 1)),
    st.builds(lambda *words: (struct.pack("=B7xQQQ", 0x14, *words), Remap(*words)), _U64, _U64, _U64),
    st.builds(lambda *words: (struct.pack("=B7xQQ8x", 0x15, *words), Remove(*words)), _U64, _U64),
    st.builds(lambda *words: (struct.pack("=B7xQQ8x", 0x16, *words), Unmap(*words)), _U64, _U64),
    st.binary(min_size=32, max_size=32)
    .filter(lambda raw: raw[0] not in set(kernel.EventKind))
    .map(lambda raw: (raw, Unknown(raw[0], raw))),
)


@given(st.lists(_message, max_size=70))
def test_messages_become_events_in_their_order(messages: list[tuple[bytes, Event]]) -> None:
    assert parse(b"".join(raw for raw, _ in messages)) == [event for _, event in messages]


def test_half_a_message_is_refused() -> None:
    with pytest.raises(ValueError, match="33 bytes are not a whole number of messages of 32 bytes"):
        parse(bytes(33))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (0, (False, False, False, True)),
        (FaultFlag.WRITE, (True, False, False, True)),
        (FaultFlag.WRITE | FaultFlag.WP, (True, True, False, False)),
        (FaultFlag.MINOR, (False, False, True, False)),
        (1 << 20, (False, False, False, True)),
    ],
)
def test_a_fault_is_of_one_kind(flags: int, expected: tuple[bool, bool, bool, bool]) -> None:
    fault = PageFault(0, FaultFlag(flags))

    assert (fault.is_write, fault.is_wp, fault.is_minor, fault.is_missing) == expected


# -- /proc ---------------------------------------------------------------------------------------------------


def test_the_state_of_a_descriptor_is_parsed() -> None:
    text = "pos:\t0\nflags:\t02004002\nmnt_id:\t16\nino:\t7381\n"
    text += "pending:\t2\ntotal:\t5\nAPI:\taa:80010100:80000000000001ff\n"

    info = parse_fdinfo(text)

    assert (info.pending, info.total, info.api, info.initialized) == (2, 5, 0xAA, True)
    assert info.features == Feature.MOVE | Feature.THREAD_ID
    assert info.ioctls >= Ioctl.API | Ioctl.MOVE
    assert (info.flags, info.inode) == (os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC, 7381)


def test_the_state_of_a_descriptor_of_an_old_kernel_is_parsed() -> None:
    info = parse_fdinfo("pending:\t0\ntotal:\t0\nAPI:\taa:0:8000000000000003\n")

    assert (info.flags, info.inode, info.initialized) == (0, 0, False)


@pytest.mark.parametrize("text", ["", "pos:\t0\n", "pending:\t1\ntotal:\t1\n"])
def test_other_states_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not the fdinfo of a userfaultfd"):
        parse_fdinfo(text)


def _write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{text}\n", encoding="ascii")


def test_the_tightest_cgroup_of_version_2_counts_with_its_cache(tmp_path: Path) -> None:
    _write(
        tmp_path / "a",
        memory_max=1000,
        memory_high="max",
        memory_current=600,
        memory_stat="inactive_file 100",
    )
    _write(tmp_path / "a/b", memory_max="max", memory_high=900, memory_current=500, memory_stat="anon 1")
    mounts = f"30 23 0:26 / {tmp_path} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"

    folders = list(process._folders("0::/a/b\n", mounts))

    assert folders == [(f"{tmp_path}/a/b", 2), (f"{tmp_path}/a", 2), (str(tmp_path), 2)]
    assert process._headroom(folders) == 400
    assert process._headroom([(f"{tmp_path}/a", 2)]) == 500
    assert process._headroom([(str(tmp_path), 2)]) is None


def test_the_tightest_cgroup_of_version_1_counts_with_its_cache(tmp_path: Path) -> None:
    no_limit = 9223372036854771712
    _write(tmp_path, memory_limit_in_bytes=no_limit, memory_usage_in_bytes=5, memory_stat="")
    _write(
        tmp_path / "job",
        memory_limit_in_bytes=4096,
        memory_usage_in_bytes=3000,
        memory_stat="inactive_file 7\ntotal_inactive_file 1000",
    )
    mounts = (
        f"1 1 0:1 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
        f"2 1 0:2 / {tmp_path} rw,relatime - cgroup cgroup rw,memory\n"
    )

    folders = list(process._folders("7:cpu:/job\n4:hugetlb,memory:/job\n", mounts))

    assert folders == [(f"{tmp_path}/job", 1), (str(tmp_path), 1)]
    assert process._headroom(folders) == 4096 - 2000


def test_a_group_that_is_full_leaves_nothing(tmp_path: Path) -> None:
    _write(tmp_path, memory_max=100, memory_current=500, memory_stat="inactive_file 0")

    assert process._headroom([(str(tmp_path), 2)]) == 0


@pytest.mark.parametrize(
    ("path", "root", "expected"),
    [
        ("/docker/id", "/docker/id", ["/mnt/cg"]),  # the container's group is the root of its mount
        ("/docker/id/sub", "/docker/id", ["/mnt/cg/sub", "/mnt/cg"]),
        ("/docker/idle", "/docker/id", ["/mnt/cg"]),  # another group whose name begins alike
        ("/../other", "/", ["/mnt/cg/../other", "/mnt/cg/..", "/mnt/cg"]),
        ("/", "/", ["/mnt/cg"]),
    ],
)
def test_paths_are_taken_from_the_root_of_the_mount(path: str, root: str, expected: list[str]) -> None:
    mounts = f"2 1 0:2 {root} /mnt/cg rw - cgroup2 cgroup rw\n"

    assert [folder for folder, _ in process._folders(f"0::{path}\n", mounts)] == expected


def test_spaces_in_a_mount_point_are_unescaped() -> None:
    mounts = "2 1 0:2 / /mnt/my\\040groups rw - cgroup2 cgroup rw\n"

    assert list(process._folders("0::/\n", mounts)) == [("/mnt/my groups", 2)]


def test_a_machine_without_memory_cgroups_has_no_limit() -> None:
    assert process._headroom(process._folders("0::/\n", "")) is None
    assert process._headroom(process._folders("", "2 1 0:2 / /mnt/cg rw - cgroup2 cgroup rw\n")) is None


# -- the package's own face ----------------------------------------------------------------------------------


def test_every_public_name_can_be_had() -> None:
    for name in kernel.__all__:
        assert getattr(kernel, name) is not None
    assert set(dir(kernel)) == set(kernel.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = kernel.nonsense


def test_a_gate_says_in_words_what_it_found() -> None:
    assert str(Gate(ok=True)) == "open"
    assert str(Gate(ok=False, errno=1, gate="seccomp")) == "EPERM, refused by seccomp"
    assert str(Gate(ok=False, errno=2, gate="absent")) == "ENOENT: it is absent"
    assert str(Gate(ok=False, errno=24)) == "EMFILE"
