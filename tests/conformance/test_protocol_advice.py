"""The advice: which memory can be marked, what that changes, and what is held while it is marked."""

from __future__ import annotations

import errno
import mmap
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tests.conformance.protocol_tools import (
    kernel_errno,
    page_of,
    sigbus,
    there,
    wait_until,
)

from userfault import MemoryStore, Region, madvise
from userfault.errors import KernelError
from userfault.kernel import RegisterMode, Userfaultfd, abi, maps, memfd, memory, process
from userfault.protocol import MADV_NOUSERFAULT, MADV_USERFAULT, Advice

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.conformance.protocol_tools import Stage


@pytest.fixture
def plain_file(tmp_path: Path) -> Iterator[mmap.mmap]:
    path = tmp_path / "file"
    path.write_bytes(b"x" * mmap.PAGESIZE)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), mmap.PAGESIZE) as mapping:
        yield mapping


def flags_of(address: int) -> set[str]:
    """Return the kernel's flags of the mapping at an address."""
    (entry,) = (entry for entry in maps.read_smaps() if entry.start <= address < entry.end)
    return set(entry.flags)


@pytest.mark.parametrize("shared", [False, True])
def test_the_advice_can_be_given_twice_and_taken_back_twice(stage: Stage, shared: bool) -> None:
    page = stage.marked(1, shared=shared)

    stage.mark(page)
    assert stage.read(page) == sigbus(page)
    stage.unmark(page)
    stage.unmark(page)

    assert [stage.read(page), stage.write(page)] == [there(0), there(0)]
    assert process.userfaultfds() == []


def test_the_advice_may_change_from_page_to_page(stage: Stage) -> None:
    page = stage.marked(5)

    stage.unmark(page + stage.page)
    stage.unmark(page + 3 * stage.page, 2)
    stage.mark(page + 4 * stage.page)

    assert [stage.read(page + place * stage.page).signal != 0 for place in range(5)] == [True, False, True, False, True]


def test_pages_that_are_there_stay_as_they_are(stage: Stage) -> None:
    page = stage.filled(1, 2)

    stage.mark(page, 2)
    assert [stage.read(page), stage.read(page + stage.page)] == [there(1), there(2)]
    memory.advise(page, stage.page, mmap.MADV_DONTNEED)
    assert [stage.read(page), stage.read(page + stage.page)] == [sigbus(page), there(2)]
    stage.unmark(page, 2)

    assert [stage.read(page), stage.read(page + stage.page)] == [there(0), there(2)]


def test_to_take_the_mark_away_lets_threads_go_on_with_zeros(stage: Stage) -> None:
    descriptor = stage.descriptor()
    page = stage.marked(2, descriptor)
    touches = stage.start_reads(descriptor, [page, page + stage.page])
    stage.fault(descriptor)

    stage.unmark(page, 2)

    assert [touch.result() for touch in touches] == [there(0)] * 2
    assert descriptor.ranges == [(page, page + 2 * stage.page)]


@pytest.mark.parametrize("advice", [18, 19, 4, "MADV_USERFAULT", None])
def test_a_number_is_no_advice(stage: Stage, advice: Any) -> None:
    page = stage.anonymous(1)

    with pytest.raises(TypeError, match=r"pass protocol\.MADV_USERFAULT or"):
        madvise((page, stage.page), advice)

    assert stage.read(page) == there(0)
    assert "wf" not in flags_of(page)  # MADV_WIPEONFORK, which 18 is today


def test_a_plain_file_is_einval(stage: Stage, plain_file: mmap.mmap) -> None:
    before = flags_of(memory.address_of(plain_file))

    assert kernel_errno(madvise, plain_file, MADV_USERFAULT) == errno.EINVAL

    assert flags_of(memory.address_of(plain_file)) == before
    assert process.userfaultfds() == []
    assert plain_file[0] == ord("x")


def test_a_plain_file_can_be_registered_as_long_as_it_is_not_marked(stage: Stage, plain_file: mmap.mmap) -> None:
    # The proposal did not look at the kind of memory there.
    descriptor = stage.descriptor()

    descriptor.register(plain_file)
    assert kernel_errno(madvise, plain_file, MADV_USERFAULT) == errno.EINVAL
    descriptor.unregister(plain_file)


@pytest.mark.parametrize("length", [0, -1, -4096])
def test_an_empty_range_is_einval(stage: Stage, length: int) -> None:
    page = stage.anonymous(1)

    assert kernel_errno(madvise, (page, length), MADV_USERFAULT) == errno.EINVAL
    assert kernel_errno(stage.descriptor().register, (page, length)) == errno.EINVAL


@pytest.mark.parametrize("offset", [1, 8, 4095])
def test_a_start_between_pages_is_einval(stage: Stage, offset: int) -> None:
    page = stage.anonymous(2)

    assert kernel_errno(madvise, (page + offset, stage.page), MADV_USERFAULT) == errno.EINVAL
    assert kernel_errno(stage.descriptor().register, (page + offset, stage.page)) == errno.EINVAL


def test_a_length_is_rounded_up_to_whole_pages(stage: Stage) -> None:
    page = stage.anonymous(3)

    madvise((page, stage.page + 1), MADV_USERFAULT)

    assert [stage.read(page + place * stage.page).signal != 0 for place in range(3)] == [True, True, False]


def test_what_is_not_mapped_is_enomem(stage: Stage) -> None:
    page = stage.anonymous(3)
    hole = page + stage.page
    memory.unmap(hole, stage.page)
    ranges = [
        (hole, stage.page),
        (page, 3 * stage.page),
        (1 << 62, stage.page),
        (-stage.page, stage.page),
        (0, 1 << 64),
    ]

    assert [kernel_errno(madvise, pair, MADV_USERFAULT) for pair in ranges] == [errno.ENOMEM] * len(ranges)

    assert [stage.read(page), stage.read(page + 2 * stage.page)] == [there(0)] * 2
    assert "dc" not in flags_of(page)  # MADV_DONTFORK, which marked memory has
    assert process.userfaultfds() == []


def test_a_range_of_which_a_part_cannot_be_marked_is_refused_as_a_whole(stage: Stage) -> None:
    descriptor, page = stage.descriptor(), stage.anonymous(3)
    descriptor.register((page, stage.page))
    with open("/proc/self/exe", "rb") as file:
        flags = memory.MAP_PRIVATE | abi.MAP_FIXED
        last = page + 2 * stage.page
        memory.map_memory(stage.page, fd=file.fileno(), prot=memory.PROT_READ, flags=flags, address=last)

    assert kernel_errno(madvise, (page, 3 * stage.page), MADV_USERFAULT) == errno.EINVAL
    assert [stage.read(page), stage.read(page + stage.page), stage.read(last).signal] == [there(0), there(0), 0]

    with Userfaultfd.open(nonblock=True) as other:
        memory.advise(page, 2 * stage.page, mmap.MADV_DONTNEED)
        other.register(page + stage.page, stage.page, RegisterMode.MISSING)
        assert kernel_errno(madvise, (page, 2 * stage.page), MADV_USERFAULT) == errno.EBUSY
        assert stage.read(page) == there(0)
        assert "dc" not in flags_of(page) | flags_of(page + stage.page)  # MADV_DONTFORK
        other.unregister(page + stage.page, stage.page)


def test_another_userfaultfds_range_is_ebusy_and_stays_as_it_is(stage: Stage) -> None:
    page = stage.anonymous(2)
    memory.advise(page, stage.page, mmap.MADV_DONTFORK)
    with Userfaultfd.open(nonblock=True) as other:
        other.register(page, stage.page, RegisterMode.MISSING)
        before = flags_of(page)

        assert kernel_errno(madvise, (page, 2 * stage.page), MADV_USERFAULT) == errno.EBUSY
        stage.descriptor().register((page, stage.page))  # of no account before it is marked
        assert kernel_errno(madvise, (page, stage.page), MADV_USERFAULT) == errno.EBUSY

        assert flags_of(page) == before
        other.unregister(page, stage.page)
    assert [stage.read(page), stage.read(page + stage.page)] == [there(0)] * 2


def test_a_regions_memory_is_ebusy_and_stays_as_it_is(stage: Stage) -> None:
    with Region(MemoryStore(b"x" * 4 * stage.page), block_size=stage.page) as region:
        before = flags_of(region.address)

        assert kernel_errno(madvise, region.memory, MADV_USERFAULT) == errno.EBUSY

        assert "dc" in before  # a forked child has none of it
        assert flags_of(region.address) == before
        assert bytes(region.memory[:2]) == b"xx"


def test_memory_that_is_locked_stays_locked(stage: Stage) -> None:
    descriptor = stage.descriptor()
    page = stage.marked(2, descriptor)
    stage.lock(page, 2)
    descriptor.place(page, page_of(7))

    descriptor.close()

    assert [stage.read(page), stage.read(page + stage.page)] == [there(7), sigbus(page + stage.page)]
    assert "lo" in flags_of(page)


# -- buffers -----------------------------------------------------------------------------------------------------


def test_a_mapping_is_held_until_it_is_no_longer_marked(stage: Stage) -> None:
    mapping = mmap.mmap(-1, stage.page)
    madvise(mapping, MADV_USERFAULT)

    with pytest.raises(BufferError):
        mapping.close()
    madvise(mapping, MADV_NOUSERFAULT)

    mapping.close()


def test_a_mapping_is_held_until_it_is_no_longer_registered(stage: Stage) -> None:
    descriptor, mapping = stage.descriptor(), mmap.mmap(-1, 2 * stage.page)
    descriptor.register(mapping)

    with pytest.raises(BufferError):
        mapping.close()
    madvise(mapping, MADV_USERFAULT)
    madvise(mapping, MADV_NOUSERFAULT)
    with pytest.raises(BufferError):
        mapping.close()
    descriptor.unregister(memoryview(mapping)[: stage.page])
    with pytest.raises(BufferError):
        mapping.close()
    descriptor.unregister(mapping)

    mapping.close()


def test_a_mapping_is_held_beyond_the_life_of_the_descriptor(stage: Stage) -> None:
    descriptor, mapping = stage.descriptor(), mmap.mmap(-1, stage.page)
    descriptor.register(mapping)
    madvise(mapping, MADV_USERFAULT)
    descriptor.close()

    with pytest.raises(BufferError):
        mapping.close()
    address = memory.address_of(mapping)
    assert stage.read(address) == sigbus(address)
    madvise(mapping, MADV_NOUSERFAULT)

    mapping.close()


def test_close_lets_a_mapping_go_that_is_not_marked(stage: Stage) -> None:
    descriptor, mapping = stage.descriptor(), mmap.mmap(-1, stage.page)
    descriptor.register(mapping)

    descriptor.close()

    mapping.close()


def test_a_refused_mapping_is_not_held(stage: Stage) -> None:
    mapping = mmap.mmap(-1, stage.page)
    descriptor, other = stage.descriptor(), stage.descriptor()
    other.register((memory.address_of(mapping), stage.page))

    assert kernel_errno(descriptor.register, mapping) == errno.EBUSY
    other.unregister((memory.address_of(mapping), stage.page))

    mapping.close()


@pytest.mark.parametrize("flags", [mmap.MAP_SHARED, mmap.MAP_PRIVATE])
def test_an_mmap_and_an_array_over_it_can_be_marked(stage: Stage, flags: int) -> None:
    descriptor, mapping = stage.descriptor(), mmap.mmap(-1, 4 * stage.page, flags)
    array = np.frombuffer(mapping, dtype="<u4").reshape(4, -1)
    descriptor.register(mapping)
    madvise(array.data, MADV_USERFAULT)
    start = memory.address_of(mapping)
    touch = stage.call(array[1:3].copy)  # a copy of this size releases the GIL
    try:
        for place in (1, 2):
            assert stage.fault(descriptor) & -stage.page == start + place * stage.page
            stage.answer(descriptor, start + place * stage.page, place)

        assert touch.result().tobytes() == page_of(1) + page_of(2)
    finally:
        descriptor.unregister(mapping)
        madvise(mapping, MADV_NOUSERFAULT)
        del array
        mapping.close()


def test_a_memory_file_mapped_privately_can_be_marked(stage: Stage) -> None:
    fd = memfd.create("private", stage.page)
    page = memory.map_memory(stage.page, fd=fd, flags=memory.MAP_PRIVATE)
    stage.adopt(page, 1)
    descriptor = stage.descriptor()
    descriptor.register((page, stage.page))
    stage.mark(page)
    (touch,) = stage.start_reads(descriptor, [page])

    stage.answer(descriptor, stage.fault(descriptor), 7)
    assert touch.result() == there(7)
    with open(fd, "rb") as file:
        assert file.read() == bytes(stage.page)


def test_pages_that_are_in_the_file_are_no_faults_even_if_they_are_not_mapped(stage: Stage) -> None:
    descriptor = stage.descriptor()
    page, window = stage.shared_twice(2)
    stage.write(window, 7)
    descriptor.register((page, 2 * stage.page))
    stage.mark(page, 2)

    assert stage.read(page) == there(7)
    descriptor.close()
    assert [stage.read(page), stage.read(page + stage.page)] == [there(7), sigbus(page + stage.page)]


def test_the_advice_says_what_it_is() -> None:
    assert [MADV_USERFAULT.value, MADV_NOUSERFAULT.value] == ["MADV_USERFAULT", "MADV_NOUSERFAULT"]
    assert list(Advice) == [MADV_USERFAULT, MADV_NOUSERFAULT]


def test_a_refusal_names_the_range_and_the_kinds_of_memory(stage: Stage, plain_file: mmap.mmap) -> None:
    start = memory.address_of(plain_file)

    with pytest.raises(KernelError) as caught:
        madvise((start, stage.page), MADV_USERFAULT)

    assert caught.value.syscall == "madvise(MADV_USERFAULT)"
    assert f"[{start:#x}, {start + stage.page:#x}): it takes anonymous memory" in str(caught.value)


def test_threads_may_mark_and_register_at_once(stage: Stage) -> None:
    pages, rounds = 8, 30
    start = stage.anonymous(pages)

    def work(place: int) -> None:
        page = start + place * stage.page
        with stage.descriptor() as descriptor:
            for _ in range(rounds):
                descriptor.register((page, stage.page))
                stage.mark(page)
                descriptor.place(page, page_of(place + 1))
                assert stage.read(page) == there(place + 1)
                memory.advise(page, stage.page, mmap.MADV_DONTNEED)
                descriptor.unregister((page, stage.page))
                assert stage.read(page) == sigbus(page)
                stage.unmark(page)

    workers = [stage.call(work, place) for place in range(pages)]
    wait_until(lambda: not any(worker.waiting for worker in workers))

    assert [worker.result() for worker in workers] == [None] * pages
