"""`remap_anon_pages` (item 34): the whole table of the specification's section 13.

Not here, since nobody can bring it about: ENOMEM, for page tables, and EINTR, by a fatal signal.
"""

from __future__ import annotations

import errno
import mmap
from typing import TYPE_CHECKING

import pytest
from tests.conformance.protocol_tools import kernel_errno, page_of, sigbus, there, waiters

from userfault import remap_anon_pages
from userfault.errors import KernelError
from userfault.kernel import Feature, RegisterMode, Userfaultfd, memory, process
from userfault.protocol import RAP_ALLOW_SRC_HOLES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conformance.conftest import RunChild
    from tests.conformance.protocol_tools import Stage

HUGE = 2 << 20


def moved(dst: int, src: int, length: int, flags: int = 0) -> int | str:
    """Return what the call returns, or the name of its errno."""
    try:
        return remap_anon_pages(dst, src, length, flags)
    except KernelError as error:
        return errno.errorcode[error.errno or 0]


def found(stage: Stage, address: int, pages: int) -> list[int]:
    """Return the first byte of each page; -1 where it is missing."""
    there_ = stage.there(address, pages)
    return [
        stage.bytes_at(address + place * stage.page)[0] if is_there else -1 for place, is_there in enumerate(there_)
    ]


def neither(stage: Stage, pages: int) -> int:
    return stage.anonymous(pages)


def marked_only(stage: Stage, pages: int) -> int:
    return stage.marked(pages)


def registered_only(stage: Stage, pages: int) -> int:
    page = stage.anonymous(pages)
    stage.descriptor().register((page, pages * stage.page))
    return page


def both(stage: Stage, pages: int) -> int:
    return stage.marked(pages, stage.descriptor())


DESTINATIONS = pytest.mark.parametrize("destination", [neither, marked_only, registered_only, both])


# -- what is moved -------------------------------------------------------------------------------------------------


@DESTINATIONS
def test_item_34_pages_are_moved_without_a_copy(stage: Stage, destination: Callable[[Stage, int], int]) -> None:
    src, dst = stage.filled(1, 2, 3), destination(stage, 3)
    before = process.userfaultfds()

    assert remap_anon_pages(dst, src, 3 * stage.page) == 3 * stage.page

    assert (found(stage, dst, 3), found(stage, src, 3)) == ([1, 2, 3], [-1, -1, -1])
    assert stage.bytes_at(dst + stage.page, stage.page) == page_of(2)
    assert process.userfaultfds() == before


def test_item_34_a_destination_that_is_nobodys_is_ordinary_afterwards(stage: Stage) -> None:
    src, dst = stage.filled(1), stage.anonymous(2)

    remap_anon_pages(dst, src, stage.page)

    assert [stage.read(dst), stage.read(dst + stage.page), stage.read(src)] == [there(1), there(0), there(0)]


def test_item_34_it_wakes_nobody(stage: Stage) -> None:
    descriptor = stage.descriptor()
    src, dst = stage.filled(7), stage.marked(1, descriptor)
    (touch,) = stage.start_reads(descriptor, [dst])
    stage.fault(descriptor)

    assert remap_anon_pages(dst, src, stage.page) == stage.page

    assert (touch.waiting, waiters(descriptor)) == (True, (0, 1))
    assert stage.wake(descriptor, dst) == 16
    assert touch.result() == there(7)


def test_item_34_a_sigbus_handlers_way_to_resolve(stage: Stage) -> None:
    # The test program of October: without a descriptor, a touch is refused, the page moved in, and the touch repeated.
    src, dst = stage.filled(*range(1, 9)), stage.marked(8)

    for place in range(8):
        page = dst + place * stage.page
        assert stage.read(page) == sigbus(page)
        assert remap_anon_pages(page, src + place * stage.page, stage.page) == stage.page
        assert stage.read(page) == there(place + 1)


def test_item_34_pages_are_moved_inside_one_mapping(stage: Stage) -> None:
    page = stage.filled(1, 2)
    more = stage.anonymous(6)
    assert remap_anon_pages(more, page, 2 * stage.page) == 2 * stage.page

    assert remap_anon_pages(more + 4 * stage.page, more, 2 * stage.page) == 2 * stage.page
    assert found(stage, more, 6) == [-1, -1, -1, -1, 1, 2]


def test_item_34_pages_are_moved_inside_one_range_of_a_descriptor(stage: Stage) -> None:
    descriptor = stage.descriptor()
    page = stage.marked(4, descriptor)
    descriptor.place(page, page_of(5))

    assert remap_anon_pages(page + 3 * stage.page, page, stage.page) == stage.page

    (touch,) = stage.start_reads(descriptor, [page])
    assert stage.fault(descriptor) == page
    assert found(stage, page, 4) == [-1, -1, -1, 5]
    stage.answer(descriptor, page, 6)
    assert touch.result() == there(6)


def test_item_34_the_source_may_be_marked(stage: Stage) -> None:
    descriptor, other = stage.descriptor(), stage.descriptor()
    src, dst = stage.marked(1, descriptor), stage.marked(1, other)
    descriptor.place(src, page_of(5))

    assert remap_anon_pages(dst, src, stage.page) == stage.page
    assert found(stage, dst, 1) == [5]


@pytest.mark.parametrize("huge", [False, True])
def test_item_34_two_mebibytes_at_once(stage: Stage, huge: bool) -> None:
    pages = 3 * HUGE // stage.page
    src = -(-stage.anonymous(pages) // HUGE) * HUGE
    dst = -(-stage.marked(pages) // HUGE) * HUGE
    memory.advise(src, HUGE, mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    memory.populate(src, HUGE, write=True)
    stage.write(src + HUGE - 1, 9)

    done = 0
    while done < HUGE:
        done += remap_anon_pages(dst + done, src + done, HUGE - done)

    assert stage.read(dst + HUGE - 1) == there(9)
    assert stage.there(src, HUGE // stage.page) == [False] * (HUGE // stage.page)


# -- short counts, and holes -----------------------------------------------------------------------------------------


@DESTINATIONS
def test_item_34_a_short_count_says_where_it_stopped_and_the_next_call_why(
    stage: Stage, destination: Callable[[Stage, int], int]
) -> None:
    src, dst, page = stage.filled(1, 2, 3, 4), destination(stage, 4), stage.page
    memory.advise(src + 2 * page, page, mmap.MADV_DONTNEED)

    assert moved(dst, src, 4 * page) == 2 * page
    assert moved(dst + 2 * page, src + 2 * page, 2 * page) == "ENOENT"

    assert (found(stage, dst, 4), found(stage, src, 4)) == ([1, 2, -1, -1], [-1, -1, -1, 4])


def test_item_34_a_page_in_the_way_stops_it(stage: Stage) -> None:
    src, dst, page = stage.filled(1, 2, 3), stage.marked(3, descriptor := stage.descriptor()), stage.page
    descriptor.place(dst + 2 * page, page_of(9))

    assert moved(dst, src, 3 * page) == 2 * page
    assert moved(dst + 2 * page, src + 2 * page, page) == "EEXIST"

    assert (found(stage, dst, 3), found(stage, src, 3)) == ([1, 2, 9], [-1, -1, 3])


@DESTINATIONS
def test_item_34_with_the_flag_holes_are_skipped_and_counted(
    stage: Stage, destination: Callable[[Stage, int], int]
) -> None:
    src, dst, page = stage.filled(1, 2, 3, 4), destination(stage, 4), stage.page
    memory.advise(src, page, mmap.MADV_DONTNEED)
    memory.advise(src + 2 * page, page, mmap.MADV_DONTNEED)

    assert moved(dst, src, 4 * page) == "ENOENT"
    assert found(stage, dst, 4) == [-1, -1, -1, -1]
    assert moved(dst, src, 4 * page, RAP_ALLOW_SRC_HOLES) == 4 * page

    assert (found(stage, dst, 4), found(stage, src, 4)) == ([-1, 2, -1, 4], [-1, -1, -1, -1])


def test_item_34_with_the_flag_a_range_of_holes_moves_nothing_and_counts(stage: Stage) -> None:
    src, dst = stage.anonymous(3), stage.marked(3)

    assert moved(dst, src, 3 * stage.page, RAP_ALLOW_SRC_HOLES) == 3 * stage.page
    assert [stage.there(dst, 3), stage.read(dst)] == [[False] * 3, sigbus(dst)]


def test_item_34_with_the_flag_a_page_in_the_way_is_one_all_the_same(stage: Stage) -> None:
    src, dst = stage.filled(1, 2), stage.filled(8, 9)
    memory.advise(src, stage.page, mmap.MADV_DONTNEED)

    assert moved(dst, src + stage.page, stage.page, RAP_ALLOW_SRC_HOLES) == "EEXIST"
    assert moved(dst, src, stage.page, RAP_ALLOW_SRC_HOLES) == "EEXIST"  # where there is nothing to move, too

    assert (found(stage, dst, 2), found(stage, src, 2)) == ([8, 9], [-1, 2])


# -- errors, each with the destination untouched ---------------------------------------------------------------------


@pytest.mark.parametrize("flags", [0, RAP_ALLOW_SRC_HOLES])
def test_item_34_einval_numbers(stage: Stage, flags: int) -> None:
    src, dst, page = stage.filled(1, 2), stage.anonymous(2), stage.page
    top = (1 << 64) - page
    wrong = [
        *((dst + 1, src, page), (dst, src + 8, page), (dst, src, page - 1), (dst, src, 0), (dst, src, -page)),
        *((-page, src, page), (dst, -page, page), (dst, src, top), (top, src, 2 * page), (dst, top, 2 * page)),
        *((dst, src, 1 << 64), (1 << 64, src, page), (1 << 62, src, page), (dst, 1 << 62, page)),
    ]

    assert [moved(*numbers, flags) for numbers in wrong] == ["EINVAL"] * len(wrong)
    assert [moved(dst, src, page, bits | flags) for bits in (2, 3, 4, 1 << 40, -2)] == ["EINVAL"] * 5

    assert (found(stage, dst, 2), found(stage, src, 2)) == ([-1, -1], [1, 2])


def test_item_34_einval_outside_one_mapping(stage: Stage) -> None:
    page = stage.page
    src, dst = stage.filled(1, 2, 3), stage.anonymous(3)
    memory.unmap(src + 2 * page, page)
    memory.unmap(dst + 2 * page, page)
    part = stage.anonymous(2)
    stage.mark(part)

    assert moved(dst, src, 3 * page) == "EINVAL"
    assert moved(dst + page, src, 2 * page) == "EINVAL"
    assert moved(dst + 2 * page, src, page) == "EINVAL"
    assert moved(dst, src + 2 * page, page) == "EINVAL"
    assert moved(dst, src + page, 2 * page) == "EINVAL"
    assert moved(part, src, 2 * page) == "EINVAL"

    assert (found(stage, dst, 2), found(stage, part, 2), found(stage, src, 2)) == ([-1, -1], [-1, -1], [1, 2])


@DESTINATIONS
def test_item_34_einval_shared_memory_and_files(
    stage: Stage, destination: Callable[[Stage, int], int], tmp_path: Path
) -> None:
    src, dst, page = stage.filled(1), destination(stage, 1), stage.page
    shared, marked = stage.shared(1), stage.marked(1, stage.descriptor(), shared=True)
    stage.write(shared, 9)
    (tmp_path / "file").write_bytes(page_of(8))
    with (tmp_path / "file").open("r+b") as file, mmap.mmap(file.fileno(), page, mmap.MAP_PRIVATE) as mapping:
        mapping[0] = 7  # its own page, anonymous
        private = memory.address_of(mapping)

        assert [moved(dst, shared, page), moved(shared, src, page), moved(marked, src, page)] == ["EINVAL"] * 3
        assert moved(private, src, page) == "EINVAL"
        assert moved(dst, private, page) == "EINVAL"

    assert (found(stage, dst, 1), found(stage, src, 1)) == ([-1], [1])


@DESTINATIONS
def test_item_34_einval_different_protection(stage: Stage, destination: Callable[[Stage, int], int]) -> None:
    src, dst, page = stage.filled(1), destination(stage, 1), stage.page
    memory.protect(src, page, memory.PROT_READ)

    assert moved(dst, src, page) == "EINVAL"
    assert (found(stage, dst, 1), found(stage, src, 1)) == ([-1], [1])

    memory.protect(src, page, memory.PROT_READ | memory.PROT_WRITE)
    assert moved(dst, src, page) == page


def test_item_34_einval_one_side_locked(stage: Stage) -> None:
    src, dst, page = stage.filled(1, 2), stage.marked(2), stage.page
    stage.lock(src)

    assert moved(dst, src, page) == "EINVAL"
    assert found(stage, dst, 1) == [-1]

    stage.lock(dst)
    assert moved(dst, src, page) == page
    stage.lock(dst + page)
    assert moved(dst + page, src + page, page) == "EINVAL"
    assert (found(stage, dst, 2), found(stage, src, 2)) == ([1, -1], [-1, 2])


@DESTINATIONS
def test_item_34_enoent_a_hole(stage: Stage, destination: Callable[[Stage, int], int]) -> None:
    src, dst = stage.anonymous(1), destination(stage, 1)

    assert moved(dst, src, stage.page) == "ENOENT"
    assert found(stage, dst, 1) == [-1]


def test_item_34_enoent_a_hole_that_is_marked(stage: Stage) -> None:
    # Nobody is asked for the page: it is no touch.
    descriptor = stage.descriptor()
    src, dst = stage.marked(1, descriptor), stage.anonymous(1)

    assert moved(dst, src, stage.page) == "ENOENT"
    assert waiters(descriptor) == (0, 0)


@pytest.mark.parametrize("mark", [False, True])
@pytest.mark.parametrize("register", [False, True])
def test_item_34_eexist_a_page_is_there(stage: Stage, mark: bool, register: bool) -> None:
    src, dst = stage.filled(1), stage.filled(9)
    if register:
        stage.descriptor().register((dst, stage.page))
    if mark:
        stage.mark(dst)

    assert moved(dst, src, stage.page) == "EEXIST"
    assert (found(stage, dst, 1), found(stage, src, 1)) == ([9], [1])


def test_item_34_ebusy_a_page_shared_with_a_forked_child(run_child: RunChild) -> None:
    result = run_child(
        """
        import mmap, warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on: of a fork while there are threads
        from userfault import madvise, remap_anon_pages
        from userfault.protocol import *

        def move(dst):
            try:
                return remap_anon_pages(dst, src, P)
            except KernelError as error:
                return errno.errorcode[error.errno]

        src, marked, ordinary = (memory.map_memory(2 * P) for _ in range(3))
        madvise((marked, 2 * P), MADV_USERFAULT)
        memory.view(src, 2 * P)[:] = b"x" * 2 * P
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
        print(move(marked), move(ordinary), set(memory.mincore(marked, 2 * P)), set(memory.mincore(ordinary, 2 * P)))
        os.close(writer)
        os.waitpid(pid, 0)
        memory.view(src, P)[0] = 121  # the page is our own again, and is so for the kernel once it has been written
        print(move(marked), bytes(memory.view(marked, 2)))

        memory.advise(src, 2 * P, mmap.MADV_DONTFORK)  # what the proposal tells who moves pages to do
        memory.view(src, P)[:] = b"z" * P
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
        print(move(ordinary))
        os.close(writer)
        os.waitpid(pid, 0)
        madvise((marked, 2 * P), MADV_NOUSERFAULT)
        """
    )

    page = mmap.PAGESIZE
    assert result.stdout.splitlines() == ["EBUSY EBUSY {0} {0}", f"{page} b'yx'", f"{page}"]
    assert result.stderr == ""


def test_item_34_the_page_of_zeros_is_moved(stage: Stage) -> None:
    # In 2014 it was EBUSY: no anonymous page of one's own.
    src, dst = stage.anonymous(1), stage.marked(1)
    assert stage.read(src) == there(0)

    assert moved(dst, src, stage.page) == stage.page
    assert stage.read(dst) == there(0)


@DESTINATIONS
def test_item_34_efault_a_special_entry(stage: Stage, destination: Callable[[Stage, int], int]) -> None:
    src, dst = stage.anonymous(1), destination(stage, 1)
    with Userfaultfd.open(Feature.POISON, nonblock=True) as uffd:
        uffd.register(src, stage.page, RegisterMode.MISSING)
        assert uffd.poison(src, stage.page) == (stage.page, 0)
        uffd.unregister(src, stage.page)

    assert moved(dst, src, stage.page) == "EFAULT"
    assert found(stage, dst, 1) == [-1]


def test_a_destination_of_another_userfaultfd_is_einval(stage: Stage) -> None:
    src, dst = stage.filled(1), stage.anonymous(1)
    with Userfaultfd.open(nonblock=True) as other:
        other.register(dst, stage.page, RegisterMode.MISSING)

        assert kernel_errno(remap_anon_pages, dst, src, stage.page) == errno.EINVAL
        other.unregister(dst, stage.page)

    assert (found(stage, dst, 1), found(stage, src, 1)) == ([-1], [1])


def test_a_source_of_another_userfaultfd_is_moved(stage: Stage) -> None:
    src, dst = stage.filled(1), stage.anonymous(1)
    with Userfaultfd.open(nonblock=True) as other:
        other.register(src, stage.page, RegisterMode.MISSING)

        assert moved(dst, src, stage.page) == stage.page
        other.unregister(src, stage.page)

    assert found(stage, dst, 1) == [1]


def test_threads_move_pages_to_and_fro(stage: Stage) -> None:
    def work(place: int) -> list[int]:
        one, other = stage.filled(place), stage.marked(1)
        for _ in range(50):
            assert remap_anon_pages(other, one, stage.page) == stage.page
            one, other = other, one
        return found(stage, one, 1)

    workers = [stage.call(work, place) for place in range(1, 5)]

    assert [worker.result() for worker in workers] == [[1], [2], [3], [4]]
