"""The mappings of real processes, and what the kernel says of registered ones."""

from __future__ import annotations

import os
import subprocess
from errno import ENOENT
from typing import TYPE_CHECKING

import pytest

from userfault.errors import KernelError
from userfault.kernel import Feature, MapEntry, RegisterMode, abi, maps, memfd, memory

if TYPE_CHECKING:
    from tests.conformance.conftest import Arena, StartChild


def _at(address: int, entries: list[MapEntry]) -> MapEntry:
    return next(entry for entry in entries if entry.start <= address < entry.end)


@pytest.mark.parametrize(
    ("mode", "features", "words"),
    [
        (RegisterMode.MISSING, 0, frozenset(["um"])),
        (RegisterMode.WP, Feature.PAGEFAULT_FLAG_WP, frozenset(["uw"])),
        (RegisterMode.MISSING | RegisterMode.WP, Feature.PAGEFAULT_FLAG_WP, frozenset(["um", "uw"])),
        (RegisterMode.MINOR, Feature.MINOR_SHMEM, frozenset(["ui"])),
    ],
)
def test_flags_tell_what_a_range_is_registered_for(
    arena: Arena, mode: int, features: int, words: frozenset[str]
) -> None:
    length = 4 * arena.page
    address = arena.shared(arena.memfd(4), 4) if mode == RegisterMode.MINOR else arena.anonymous(4)
    uffd = arena.uffd(features)

    uffd.register(address, length, mode)
    registered = _at(address, maps.read_smaps())
    uffd.unregister(address, length)
    unregistered = _at(address, maps.read_smaps())

    kinds = {maps.UFFD_MISSING, maps.UFFD_WP, maps.UFFD_MINOR}
    assert (registered.start, registered.size, registered.flags & kinds) == (address, length, words)
    assert unregistered.flags & kinds == frozenset()


def test_a_file_is_named_by_device_and_inode(arena: Arena) -> None:
    fd = arena.memfd(4)
    address = arena.shared(fd, 2, offset=2 * arena.page)

    entry = _at(address, maps.read_maps())

    stat = os.fstat(fd)
    assert (entry.device, entry.inode, entry.offset) == (stat.st_dev, stat.st_ino, 2 * arena.page)
    assert (entry.path, entry.permissions) == ("/memfd:arena (deleted)", "rw-s")


def test_anonymous_memory_has_no_name(arena: Arena) -> None:
    address = arena.anonymous(3)
    uffd = arena.uffd()
    uffd.register(address, 3 * arena.page, RegisterMode.MISSING)  # so that it does not merge with its neighbours

    entry = _at(address, maps.read_maps())

    assert (entry.path, entry.device, entry.inode, entry.permissions) == ("", 0, 0, "rw-p")


@pytest.mark.parametrize("name", ["with a blank", "two\nlines", "Größe", " both ends "])
def test_names_of_any_kind_are_read(arena: Arena, name: str) -> None:
    fd = memfd.create(name, arena.page)
    address = arena.shared(fd, 1)
    os.close(fd)

    assert _at(address, maps.read_maps()).path == f"/memfd:{name} (deleted)"


def test_maps_and_smaps_agree() -> None:
    file = [entry for entry in maps.read_maps() if entry.path.startswith("/")]

    assert [entry._replace(flags=frozenset()) for entry in maps.read_smaps() if entry.path.startswith("/")] == file


def test_another_process_is_looked_at(start_child: StartChild) -> None:
    child = start_child("""
        uffd, address = Userfaultfd.open(), memory.map_memory(4 * P)
        uffd.register(address, 4 * P, RegisterMode.MISSING)
        print(address, flush=True)
        sys.stdin.read()
    """)
    assert child.stdout is not None
    address = int(child.stdout.readline())

    entry = _at(address, maps.read_smaps(child.pid))

    assert (entry.start, maps.UFFD_MISSING in entry.flags) == (address, True)


def test_a_dead_process_has_no_mappings() -> None:
    with subprocess.Popen(["true"]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert maps.read_maps(child.pid) == maps.read_smaps(child.pid) == []
    with pytest.raises(KernelError) as caught:
        maps.read_maps(child.pid)
    assert caught.value.errno == ENOENT


@pytest.mark.parametrize("old_kernel", [False, True], ids=["asked one by one", "all read"])
def test_the_mappings_of_a_range_are_those_of_the_whole_list(
    arena: Arena, old_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = arena.anonymous(6)
    memory.protect(address + 2 * arena.page, 2 * arena.page, memory.PROT_NONE)
    memory.protect(address + 4 * arena.page, arena.page, memory.PROT_READ)
    if old_kernel:  # what a kernel before 6.11 answers
        monkeypatch.setattr(abi, "PROCMAP_QUERY", abi.UFFDIO_API)
    start, end = address + arena.page, address + 5 * arena.page

    found = list(maps.query_maps(start, end))

    listed = [entry for entry in maps.read_maps() if entry.start < end and start < entry.end]
    assert found == [(entry.start, entry.end, entry.permissions[:3], entry.inode) for entry in listed]
    assert {"---", "r--"} <= {permissions for _, _, permissions, _ in found}
    assert list(maps.query_maps(1 << 46, (1 << 46) + arena.page)) == []


def test_a_range_is_mapped_if_all_of_it_is(arena: Arena) -> None:
    address = arena.anonymous(2)

    assert memory.is_mapped(address, 2 * arena.page)
    memory.unmap(address + arena.page, arena.page)
    arena.forget(address)
    arena.adopt(address, arena.page)
    assert not memory.is_mapped(address, 2 * arena.page)
