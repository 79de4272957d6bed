"""Texts of /proc/PID/maps and smaps as data: no kernel is asked here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from userfault.errors import KernelError
from userfault.kernel.maps import UFFD_MISSING, UFFD_WP, MapEntry, parse_maps, parse_smaps, read_maps, read_smaps

_MAPS = """\
00400000-00402000 r-xp 00001000 fd:00 173521                             /usr/bin/db us
55cf41a1f000-55cf41a40000 rw-p 00000000 00:00 0                          [heap]
7f7035c94000-7f7035d94000 rw-s 00000000 00:01 1027                       /memfd:userfault-region (deleted)
7f7035d94000-7f7035d95000 ---p 00000000 00:00 0 
7f7035d95000-7f7035d96000 rw-p 00000000 00:00 0                          [anon:glibc: malloc arena]
7f7035d96000-7f7035d97000 r--p 123456789000 103:1a 18446744073709551615  /tmp/two\\012lines \r\x0b\x85
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
"""  # noqa: W291  # the kernel writes that blank

_SMAPS = """\
7f7035c94000-7f7035d94000 r--s 00000000 00:01 1027                       /memfd:userfault-region (deleted)
Size:               1024 kB
KernelPageSize:        4 kB
Rss:                  64 kB
THPeligible:           0
ProtectionKey:         0
VmFlags: rd sh mr mw me ms dc dd nr um uw 
7f7035d94000-7f7035d95000 ---p 00000000 00:00 0 
Size:                  4 kB
VmFlags: mr mw me 
Another: line of a kernel to come
And one without a colon
7f7035d95000-7f7035d96000 rw-p 00000000 00:00 0                          [heap]
Size:                  4 kB
"""  # noqa: W291


def test_every_kind_of_line_is_parsed() -> None:
    entries = list(parse_maps(_MAPS))

    assert [entry.path for entry in entries] == [
        "/usr/bin/db us",
        "[heap]",
        "/memfd:userfault-region (deleted)",
        "",
        "[anon:glibc: malloc arena]",
        "/tmp/two\nlines \r\x0b\x85",
        "[vsyscall]",
    ]
    assert entries[0] == MapEntry(
        0x400000, 0x402000, "r-xp", 0x1000, os.makedev(0xFD, 0), 173521, "/usr/bin/db us", frozenset()
    )
    assert (entries[2].size, entries[2].device, entries[2].inode) == (1 << 20, os.makedev(0, 1), 1027)
    assert (entries[5].offset, entries[5].device) == (0x123456789000, os.makedev(0x103, 0x1A))
    assert entries[6].start == 0xFFFFFFFFFF600000


def test_flags_go_with_the_mapping_above_them() -> None:
    region, gap, heap = parse_smaps(_SMAPS)

    assert region.flags == {"rd", "sh", "mr", "mw", "me", "ms", "dc", "dd", "nr", UFFD_MISSING, UFFD_WP}
    assert (gap.path, gap.flags) == ("", frozenset(["mr", "mw", "me"]))
    assert (heap.path, heap.flags) == ("[heap]", frozenset())


def test_a_process_without_memory_has_no_mappings() -> None:
    assert list(parse_maps("")) == list(parse_smaps("")) == []


@pytest.mark.parametrize("text", ["nonsense\n", "1-2 rw-p\n", "x-y rw-p 0 00:00 0\n"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"values? |base 16"):
        list(parse_maps(text))


_names = st.text(st.characters(exclude_characters="\\", exclude_categories=["Cs"])).map("/".__add__) | st.just("")


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**20), _names)))
def test_what_the_kernel_writes_comes_back(mappings: list[tuple[int, int, int, str]]) -> None:
    lines = [f"{start:08x}-{end:08x} rw-p {minor:08x} 08:{minor:02x} 7 {name}" for start, end, minor, name in mappings]

    entries = list(parse_maps("".join(line.replace("\n", "\\012") + "\n" for line in lines)))

    assert [(entry.start, entry.end, os.minor(entry.device), entry.path) for entry in entries] == mappings


def test_a_file_that_cannot_be_read_is_named() -> None:
    with pytest.raises(KernelError, match=r"open\(/proc/0/maps\).*No such file"):
        read_maps(0)
    with pytest.raises(KernelError, match=r"open\(/proc/0/smaps\).*No such file"):
        read_smaps(0)


def test_the_text_is_split_at_newlines_only(tmp_path: Path) -> None:
    text = "1000-2000 r--p 00000000 00:00 1 /a\rb\n2000-3000 r--p 00000000 00:00 1 /\udcff\n"
    (tmp_path / "maps").write_bytes(text.encode("utf-8", "surrogateescape"))

    assert [entry.path for entry in read_maps(f"../{tmp_path}")] == ["/a\rb", "/\udcff"]
