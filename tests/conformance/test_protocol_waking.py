"""Range writes that wake (items 12 to 19), and placing pages before them."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

import pytest
from tests.conformance.protocol_tools import (
    kernel_errno,
    page_of,
    protocol_errno,
    there,
    wait_until,
    waiters,
)

from userfault.kernel import memory
from userfault.protocol import UFFD_NONBLOCK, Wake

if TYPE_CHECKING:
    from tests.conformance.protocol_tools import Stage

RANGE = struct.Struct("=QQ")


# -- the checklist -----------------------------------------------------------------------------------------------


def test_item_12_w_fifteen_bytes_are_einval(stage: Stage) -> None:
    descriptor = stage.descriptor()
    page = stage.marked(1, descriptor)
    data = Wake(page, page + stage.page).encode()

    assert [protocol_errno(descriptor.write, data[:length]) for length in (15, 8, 0)] == [errno.EINVAL] * 3


def test_item_12_w_a_bad_pointer_is_efault_and_the_thread_waits_on(stage: Stage) -> None:
    descriptor = stage.descriptor()
    page, nothing = stage.marked(1, descriptor), stage.anonymous(1, prot=memory.PROT_NONE)
    (touch,) = stage.start_reads(descriptor, [page])
    stage.fault(descriptor)

    with memory.view(nothing, 16) as buffer:
        assert kernel_errno(descriptor.write, buffer) == errno.EFAULT

    assert (touch.waiting, waiters(descriptor)) == (True, (0, 1))


@pytest.mark.parametrize("pages", [0, -1, -5])
def test_item_12_w_an_empty_or_backward_range_is_erange(stage: Stage, pages: int) -> None:
    descriptor = stage.descriptor()
    page = stage.marked(1, descriptor)
    (touch,) = stage.start_reads(descriptor, [page])
    stage.fault(descriptor)

    assert protocol_errno(descriptor.write, RANGE.pack(page, page + pages * stage.page)) == errno.ERANGE
    assert (touch.waiting, waiters(descriptor)) == (True, (0, 1))


@pytest.mark.parametrize("flags", [0, UFFD_NONBLOCK])
def test_item_13_w_without_a_waiter_it_is_enoent_at_once(stage: Stage, flags: int) -> None:
    descriptor = stage.descriptor(flags)
    page = stage.marked(1, descriptor)

    assert protocol_errno(stage.wake, descriptor, page) == errno.ENOENT
    assert protocol_errno(stage.wake, descriptor, 0, 1 << 40) == errno.ENOENT


@pytest.mark.parametrize("flags", [0, UFFD_NONBLOCK])
def test_item_14_w_a_waiter_that_is_unread_is_enoent_and_stays_blocked(stage: Stage, flags: int) -> None:
    descriptor = stage.descriptor(flags)
    page = stage.marked(1, descriptor)
    (touch,) = stage.start_reads(descriptor, [page])

    assert protocol_errno(stage.wake, descriptor, page) == errno.ENOENT
    assert (touch.waiting, waiters(descriptor)) == (True, (1, 1))


def test_item_14_w_a_page_placed_while_its_fault_is_unread_has_to_be_acknowledged_again(stage: Stage) -> None:
    # The race for which QEMU kept two bits of every page.
    descriptor = stage.descriptor()
    page = stage.marked(1, descriptor)
    (touch,) = stage.start_reads(descriptor, [page])
    descriptor.place(page, page_of(7))
    assert protocol_errno(stage.wake, descriptor, page) == errno.ENOENT

    assert stage.fault(descriptor) == page
    assert kernel_errno(descriptor.place, page, page_of(8)) == errno.EEXIST
    assert stage.wake(descriptor, page) == 16

    assert touch.result() == there(7)


def test_item_15_w_a_range_that_ends_at_the_address_is_enoent_and_one_page_further_wakes(stage: Stage) -> None:
    # In July one byte further was enough; since October the end is a page's.
    descriptor = stage.descriptor()
    page = stage.marked(3, descriptor) + stage.page
    (touch,) = stage.start_reads(descriptor, [page])
    stage.fault(descriptor)
    descriptor.place(page, page_of(7))

    assert protocol_errno(descriptor.write, RANGE.pack(page - stage.page, page)) == errno.ENOENT
    assert protocol_errno(descriptor.write, RANGE.pack(page + stage.page, page + 2 * stage.page)) == errno.ENOENT
    assert protocol_errno(descriptor.write, RANGE.pack(page - stage.page, page + 1)) == errno.EINVAL
    assert (touch.waiting, waiters(descriptor)) == (True, (0, 1))
    assert descriptor.write(RANGE.pack(page - stage.page, page + stage.page)) == 16

    assert touch.result() == there(7)


def test_item_15_w_the_last_byte_of_a_page_belongs_to_its_range(stage: Stage) -> None:
    descriptor = stage.descriptor()
    page = stage.marked(1, descriptor)
    (touch,) = stage.start_reads(descriptor, [page + stage.page - 1])

    stage.answer(descriptor, stage.fault(descriptor), 7)

    assert touch.result() == there(7)


def test_item_16_w_one_range_wakes_all_whom_it_covers(stage: Stage) -> None:
    descriptor = stage.descriptor()
    page = stage.marked(6, descriptor)
    pages = [page + place * stage.page for place in (0, 2, 3, 5)]
    touches = stage.start_reads(descriptor, [*pages, pages[0] + 9])
    stage.faults(descriptor, 5)
    for address in pages:
        descriptor.place(address, page_of(7))

    assert stage.wake(descriptor, page, 6) == 16

    assert [touch.result() for touch in touches] == [there(7)] * 5
    assert waiters(descriptor) == (0, 0)


def test_item_17_w_a_wake_without_the_page_brings_the_same_fault_again(stage: Stage) -> None:
    descriptor = stage.descriptor()
    page = stage.marked(1, descriptor)
    (touch,) = stage.start_reads(descriptor, [page + 9])

    for _ in range(5):
        assert stage.fault(descriptor) == page + 9
        assert stage.wake(descriptor, page) == 16

    stage.answer(descriptor, stage.fault(descriptor), 7)
    assert touch.result() == there(7)


def test_item_18_w_the_same_range_twice_is_enoent(stage: Stage) -> None:
    descriptor = stage.descriptor()
    page = stage.marked(1, descriptor)
    (touch,) = stage.start_reads(descriptor, [page])
    stage.answer(descriptor, stage.fault(descriptor), 7)

    assert protocol_errno(stage.wake, descriptor, page) == errno.ENOENT
    assert touch.result() == there(7)


def test_item_19_w_a_range_over_unread_faults_wakes_the_read_ones_alone(stage: Stage) -> None:
    descriptor = stage.descriptor()
    page = stage.marked(4, descriptor)
    touches = stage.start_reads(descriptor, [page + place * stage.page for place in range(4)])
    read = stage.faults(descriptor, 2)
    descriptor.place(page, page_of(7) * 4)

    assert stage.wake(descriptor, page, 4) == 16

    assert [touch.result() for touch in touches[:2]] == [there(7)] * 2
    assert read == [page, page + stage.page]
    assert ([touch.waiting for touch in touches[2:]], waiters(descriptor)) == ([True, True], (2, 2))
    assert protocol_errno(stage.wake, descriptor, page, 4) == errno.ENOENT
    assert stage.faults(descriptor, 2) == [page + 2 * stage.page, page + 3 * stage.page]
    assert stage.wake(descriptor, page, 4) == 16
    assert [touch.result() for touch in touches[2:]] == [there(7)] * 2


def test_an_unread_fault_on_the_page_of_a_read_one_is_woken_with_it(stage: Stage) -> None:
    # In 2014 it slept on until it was read: UFFDIO_WAKE knows pages, not faults.
    descriptor = stage.descriptor()
    page = stage.marked(1, descriptor)
    touches = stage.start_reads(descriptor, [page + 1, page + 2])
    assert stage.fault(descriptor) == page + 1

    assert stage.wake(descriptor, page) == 16
    wait_until(lambda: waiters(descriptor) == (2, 2))
    assert sorted(stage.faults(descriptor, 2)) == [page + 1, page + 2]  # the page was missing: both fault anew
    descriptor.place(page, page_of(7))
    stage.wake(descriptor, page)
    assert [touch.result() for touch in touches] == [there(7)] * 2

    other = stage.marked(1, descriptor)
    touches = stage.start_reads(descriptor, [other, other])
    stage.answer(descriptor, stage.fault(descriptor), 8)

    assert [touch.result() for touch in touches] == [there(8)] * 2  # the page was there: one fault was never read
    assert waiters(descriptor) == (0, 0)


def test_what_is_beyond_the_range_is_ignored(stage: Stage) -> None:
    descriptor = stage.descriptor()
    page = stage.marked(1, descriptor)
    (touch,) = stage.start_reads(descriptor, [page])
    stage.fault(descriptor)
    descriptor.place(page, page_of(7))

    assert descriptor.write(Wake(page, page + stage.page).encode() + b"\xff" * 100) == 16
    assert touch.result() == there(7)


def test_a_write_fault_is_like_a_read_fault(stage: Stage) -> None:
    descriptor = stage.descriptor()
    page = stage.marked(1, descriptor)
    touch = stage.start_write(page + 5, 9)

    assert stage.fault(descriptor) == page + 5
    stage.answer(descriptor, page, 7)

    assert touch.result() == there(0)
    assert stage.bytes_at(page + 4, 3) == b"\7\11\7"


def test_pages_that_are_there_are_no_faults(stage: Stage) -> None:
    # Only what is missing: not protection, not copying on write.
    descriptor = stage.descriptor()
    page = stage.filled(1, 2)
    descriptor.register((page, 2 * stage.page))
    stage.mark(page, 2)

    assert [stage.read(page), stage.write(page), stage.read(page + stage.page)] == [there(1), there(0), there(2)]
    assert waiters(descriptor) == (0, 0)


# -- place -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_place_wakes_nobody(stage: Stage, shared: bool) -> None:
    descriptor = stage.descriptor()
    page = stage.marked(1, descriptor, shared=shared)
    (touch,) = stage.start_reads(descriptor, [page])
    stage.fault(descriptor)

    assert descriptor.place(page, page_of(7)) == stage.page

    assert (touch.waiting, waiters(descriptor)) == (True, (0, 1))
    assert stage.bytes_at(page, stage.page) == page_of(7)
    assert stage.wake(descriptor, page) == 16
    assert touch.result() == there(7)


@pytest.mark.parametrize("shared", [False, True])
def test_place_stops_where_a_page_is(stage: Stage, shared: bool) -> None:
    descriptor = stage.descriptor()
    page = stage.marked(4, descriptor, shared=shared)
    descriptor.place(page + 2 * stage.page, page_of(9))

    assert descriptor.place(page, page_of(7) * 4) == 2 * stage.page
    assert kernel_errno(descriptor.place, page + 2 * stage.page, page_of(7) * 2) == errno.EEXIST
    assert descriptor.place(page + 3 * stage.page, page_of(7)) == stage.page

    assert [stage.read(page + place * stage.page).byte for place in range(4)] == [7, 7, 9, 7]


def test_place_where_the_descriptor_has_no_range_is_enoent(stage: Stage) -> None:
    one, other = stage.descriptor(), stage.descriptor()
    ones, others = stage.marked(1, one), stage.marked(1, other)
    mixed = stage.marked(2)
    one.register((mixed, stage.page))
    ordinary, registered = stage.anonymous(1), stage.anonymous(1)
    one.register((registered, stage.page))
    places = [others, stage.marked(1), ordinary, registered, mixed + stage.page]

    assert [kernel_errno(one.place, place, page_of(7)) for place in places] == [errno.ENOENT] * 5
    assert kernel_errno(one.place, mixed, page_of(7) * 2) == errno.ENOENT
    assert [stage.there(place) for place in [*places, mixed]] == [[False]] * 6
    assert one.place(ones, page_of(7)) == stage.page


def test_place_takes_whole_pages(stage: Stage) -> None:
    descriptor = stage.descriptor()
    page = stage.marked(2, descriptor)
    wrong = [(page, b""), (page, b"x"), (page, page_of(7)[1:]), (page + 1, page_of(7)), (page, page_of(7) + b"x")]

    assert [kernel_errno(descriptor.place, *args) for args in wrong] == [errno.EINVAL] * len(wrong)
    assert stage.there(page, 2) == [False, False]


def test_place_from_memory_that_cannot_be_read_is_efault(stage: Stage) -> None:
    descriptor = stage.descriptor()
    page, nothing = stage.marked(1, descriptor), stage.anonymous(1, prot=memory.PROT_NONE)

    with memory.view(nothing, stage.page) as data:
        assert kernel_errno(descriptor.place, page, data) == errno.EFAULT

    assert stage.there(page) == [False]


def test_place_gives_pages_before_anybody_asks_for_them(stage: Stage) -> None:
    descriptor = stage.descriptor()
    page = stage.marked(3, descriptor)

    assert descriptor.place(page, page_of(7) * 3) == 3 * stage.page

    assert [stage.read(page + place * stage.page) for place in range(3)] == [there(7)] * 3
    assert waiters(descriptor) == (0, 0)


def test_any_way_of_filling_a_page_will_do(stage: Stage) -> None:
    # In 2014 too: only that the page is there counts. Here another mapping of the same file.
    descriptor = stage.descriptor()
    page, window = stage.shared_twice(1)
    descriptor.register((page, stage.page))
    stage.mark(page)
    (touch,) = stage.start_reads(descriptor, [page])
    stage.fault(descriptor)

    stage.write(window, 7)

    assert touch.waiting
    assert stage.wake(descriptor, page) == 16
    assert touch.result() == there(7)
