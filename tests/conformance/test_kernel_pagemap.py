"""Page maps and scans of real memory."""

from __future__ import annotations

import os
from errno import EFAULT, EINVAL, EPERM
from typing import TYPE_CHECKING

import pytest

from userfault.errors import KernelError
from userfault.kernel import (
    Feature,
    PageCategory,
    Pagemap,
    PageRange,
    RegisterMode,
    ScanFlag,
    WriteProtectMode,
    abi,
    memory,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conformance.conftest import Arena, RunChild, StartChild

P = memory.PAGE_SIZE
PRESENT, WRITTEN = PageCategory.PRESENT, PageCategory.WRITTEN


@pytest.fixture
def pagemap() -> Iterator[Pagemap]:
    with Pagemap() as pagemap:
        yield pagemap


def _tracked(arena: Arena, pages: int, *, shared: bool = False) -> int:
    """Map memory whose writes are tracked, and protect all of it."""
    uffd = arena.uffd(Feature.WP_ASYNC | Feature.WP_HUGETLBFS_SHMEM)
    page = arena.shared(arena.memfd(pages), pages) if shared else arena.anonymous(pages)
    uffd.register(page, pages * P, RegisterMode.WP)
    assert uffd.write_protect(page, pages * P, WriteProtectMode.WP) == 0
    return page


def _poke(address: int) -> None:
    memory.view(address, 1)[0] = 1


# -- entries -------------------------------------------------------------------------------------------------


def test_entries_tell_what_is_present(arena: Arena, pagemap: Pagemap) -> None:
    page = arena.anonymous(3)
    _poke(page + P)

    entries = pagemap.entries(page, 3 * P)

    assert [entry.present for entry in entries] == [False, True, False]
    assert (entries[1].file, entries[1].exclusive, entries[1].swapped) == (False, True, False)
    assert pagemap.words(page + P, 1)[0] == entries[1].raw


def test_entries_tell_files_from_private_memory(arena: Arena, pagemap: Pagemap) -> None:
    page = arena.shared(arena.memfd(1), 1)
    _poke(page)

    (entry,) = pagemap.entries(page, P)

    assert (entry.present, entry.file) == (True, True)


def test_entries_tell_what_a_userfaultfd_protects(arena: Arena, pagemap: Pagemap) -> None:
    uffd, page = arena.uffd(), arena.anonymous(2, fill=True)
    uffd.register(page, 2 * P, RegisterMode.WP)
    uffd.write_protect(page, P, WriteProtectMode.WP)

    assert [entry.uffd_wp for entry in pagemap.entries(page, 2 * P)] == [True, False]


def test_a_poison_marker_counts_as_swapped(arena: Arena, pagemap: Pagemap) -> None:
    uffd, page = arena.uffd(Feature.POISON), arena.anonymous(1)
    uffd.register(page, P, RegisterMode.MISSING)
    uffd.poison(page, P)

    (entry,) = pagemap.entries(page, P)

    assert (entry.present, entry.swapped, entry.guard, entry.soft_dirty) == (False, True, False, False)


def test_a_page_map_of_another_process(start_child: StartChild) -> None:
    child = start_child("""
        page = memory.map_memory(2 * P)
        memory.view(page, 1)[0] = 1
        print(page, flush=True)
        sys.stdin.read()
    """)
    assert child.stdout
    page = int(child.stdout.readline())

    with Pagemap(child.pid) as pagemap:
        assert [entry.present for entry in pagemap.entries(page, 2 * P)] == [True, False]
        assert pagemap.scan(page, 2 * P, category_mask=PRESENT).ranges == [PageRange(page, page + P, PRESENT)]


def test_a_closed_page_map_says_so() -> None:
    pagemap = Pagemap()
    pagemap.close()
    pagemap.close()

    with pytest.raises(ValueError, match="closed"):
        pagemap.words(0, P)
    with pytest.raises(KernelError, match=r"open\(/proc/4194305/pagemap\)"):
        Pagemap(2**22 + 1)


# -- PAGEMAP_SCAN --------------------------------------------------------------------------------------------


def test_scan_joins_neighbours_that_are_alike(arena: Arena, pagemap: Pagemap) -> None:
    page = arena.anonymous(8)
    for number in (1, 2, 3, 6):
        _poke(page + number * P)

    found = pagemap.scan(page, 8 * P, category_mask=PRESENT)

    assert found.ranges == [
        PageRange(page + P, page + 4 * P, PRESENT),
        PageRange(page + 6 * P, page + 7 * P, PRESENT),
    ]
    assert found.walk_end == page + 8 * P


def test_scan_selects_by_inverted_and_by_any_category(arena: Arena, pagemap: Pagemap) -> None:
    page = arena.anonymous(4)
    _poke(page + P)
    memory.populate(page + 2 * P, P)  # a read of untouched memory: the zero page

    absent = pagemap.scan(page, 4 * P, category_mask=PRESENT, category_inverted=PRESENT)
    either = pagemap.scan(
        page,
        4 * P,
        category_anyof_mask=PageCategory.PFNZERO | PageCategory.FILE,
        return_mask=PageCategory.PFNZERO | PRESENT,
    )

    assert [(start, end) for start, end, _ in absent.ranges] == [
        (page, page + P),
        (page + 3 * P, page + 4 * P),
    ]
    assert either.ranges == [PageRange(page + 2 * P, page + 3 * P, PageCategory.PFNZERO | PRESENT)]


def test_scan_stops_at_its_limits_and_says_where(arena: Arena, pagemap: Pagemap) -> None:
    page = arena.anonymous(8)
    for number in (0, 2, 4, 5):
        _poke(page + number * P)

    by_ranges = pagemap.scan(page, 8 * P, category_mask=PRESENT, max_ranges=2)
    by_pages = pagemap.scan(page, 8 * P, category_mask=PRESENT, max_pages=3)

    assert [start for start, _, _ in by_ranges.ranges] == [page, page + 2 * P]
    assert page + 3 * P <= by_ranges.walk_end <= page + 4 * P
    assert by_pages.ranges[-1][:2] == (page + 4 * P, page + 5 * P)
    assert by_pages.walk_end == page + 5 * P


@pytest.mark.parametrize(
    ("offset", "named", "errno"),
    [
        (1, {"category_mask": PRESENT}, EINVAL),
        (0, {"category_mask": 1 << 40}, EINVAL),
        (0, {"category_mask": PRESENT, "flags": 1 << 40}, EINVAL),
        (0, {"category_mask": PRESENT, "flags": ScanFlag.CHECK_WPASYNC}, EPERM),
        (1 << 62, {"category_mask": PRESENT}, EFAULT),
    ],
    ids=["unaligned", "unknown category", "unknown flag", "not tracked", "no address"],
)
def test_scan_refuses_what_makes_no_sense(
    arena: Arena, pagemap: Pagemap, offset: int, named: dict[str, int], errno: int
) -> None:
    page = arena.anonymous(1)

    with pytest.raises(KernelError) as caught:
        pagemap.scan(page + offset, P, **named)

    assert (caught.value.errno, caught.value.syscall) == (errno, "ioctl(PAGEMAP_SCAN)")


# -- WP_ASYNC ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True], ids=["anonymous", "memfd"])
def test_written_finds_what_changed_and_nothing_else(arena: Arena, pagemap: Pagemap, shared: bool) -> None:
    page = _tracked(arena, 16, shared=shared)
    assert list(pagemap.written(page, 16 * P)) == []

    for number in (3, 4, 9):
        _poke(page + number * P)  # in this very thread: nobody waits for anybody
    arena.peek(page + 12 * P)

    expected = [(page + 3 * P, page + 5 * P), (page + 9 * P, page + 10 * P)]
    assert list(pagemap.written(page, 16 * P)) == expected
    assert list(pagemap.written(page, 16 * P)) == expected  # looking changes nothing


@pytest.mark.parametrize("shared", [False, True], ids=["anonymous", "memfd"])
def test_written_and_protected_anew_in_one_step(arena: Arena, pagemap: Pagemap, shared: bool) -> None:
    page = _tracked(arena, 16, shared=shared)
    for number in (3, 4, 9):
        _poke(page + number * P)

    first = list(pagemap.written(page, 16 * P, protect=True))
    nothing = list(pagemap.written(page, 16 * P, protect=True))
    _poke(page + 4 * P)
    again = list(pagemap.written(page, 16 * P, protect=True))

    assert first == [(page + 3 * P, page + 5 * P), (page + 9 * P, page + 10 * P)]
    assert (nothing, again) == ([], [(page + 4 * P, page + 5 * P)])


def test_written_takes_as_many_scans_as_it_needs(arena: Arena, pagemap: Pagemap) -> None:
    page = _tracked(arena, 64)
    for number in range(0, 64, 2):
        _poke(page + number * P)

    found = list(pagemap.written(page, 64 * P, protect=True, max_ranges=3))

    assert found == [(page + number * P, page + (number + 1) * P) for number in range(0, 64, 2)]
    assert list(pagemap.written(page, 64 * P)) == []


def test_written_refuses_memory_that_is_not_tracked(arena: Arena, pagemap: Pagemap) -> None:
    with pytest.raises(KernelError, match="Operation not permitted"):
        list(pagemap.written(arena.anonymous(1), P))


def test_protecting_without_reporting(arena: Arena, pagemap: Pagemap) -> None:
    page = _tracked(arena, 4)
    _poke(page)

    found = pagemap.scan(page, 4 * P, category_mask=WRITTEN, flags=ScanFlag.WP_MATCHING, max_ranges=0)

    assert (found.ranges, found.walk_end) == ([], page + 4 * P)
    assert list(pagemap.written(page, 4 * P)) == []


def test_tracked_memory_sends_no_messages(arena: Arena, pagemap: Pagemap) -> None:
    uffd, page = arena.uffd(Feature.WP_ASYNC), arena.anonymous(1)
    uffd.register(page, P, RegisterMode.WP)
    uffd.write_protect(page, P, WriteProtectMode.WP)

    _poke(page)

    assert uffd.read() == []
    assert [entry.uffd_wp for entry in pagemap.entries(page, P)] == [False]


def test_changes_of_another_process_are_found(start_child: StartChild) -> None:
    child = start_child("""
        uffd = Userfaultfd.open(Feature.WP_ASYNC)
        page = memory.map_memory(4 * P)
        uffd.register(page, 4 * P, RegisterMode.WP)
        uffd.write_protect(page, 4 * P, WriteProtectMode.WP)
        memory.view(page, 4 * P)[2 * P] = 1
        print(page, flush=True)
        sys.stdin.read()
    """)
    assert child.stdout
    page = int(child.stdout.readline())

    with Pagemap(child.pid) as pagemap:
        assert list(pagemap.written(page, 4 * P)) == [(page + 2 * P, page + 3 * P)]


def test_the_page_map_of_somebody_elses_process_is_refused(run_child: RunChild) -> None:
    if os.geteuid():
        pytest.skip("gives up rights on purpose: run the tests as root")
    result = run_child("""
        import userfault.kernel.pagemap
        os.setuid(65534)
        try:
            Pagemap(os.getppid())
        except KernelError as error:
            print(error.errno == errno.EACCES)
    """)

    assert result.stdout == "True\n", result.stderr


def test_guard_regions_are_told_where_the_kernel_has_them(arena: Arena, pagemap: Pagemap) -> None:
    page = arena.anonymous(2)
    if _linux() < (6, 13):
        with pytest.raises(KernelError, match="Invalid argument"):
            memory.advise(page, P, abi.MADV_GUARD_INSTALL)
        return

    memory.advise(page, P, abi.MADV_GUARD_INSTALL)

    # The page map tells since 6.15.
    assert [entry.guard for entry in pagemap.entries(page, 2 * P)] == [_linux() >= (6, 15), False]


def _linux() -> tuple[int, ...]:
    return tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
