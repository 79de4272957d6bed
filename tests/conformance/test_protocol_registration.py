"""Which memory is whose: registration (items 30 to 33)."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

import pytest
from tests.conformance.protocol_tools import (
    kernel_errno,
    protocol_errno,
    sigbus,
    there,
    waiters,
)

from userfault.kernel import memory, process
from userfault.protocol import Register, State, Unregister

if TYPE_CHECKING:
    from tests.conformance.protocol_tools import Stage

RANGE = struct.Struct("=QQ")
BOTH_WAYS = [Register, Unregister]


# -- the checklist -----------------------------------------------------------------------------------------------


def test_item_30_x_both_bits_and_addresses_between_pages_are_einval(stage: Stage) -> None:
    descriptor, page = stage.descriptor(), stage.marked(2)
    end = page + stage.page
    wrong = [
        (page | 3, end),
        (page | 4, end),
        (page | 5, end),
        (page + 8 | 2, end),
        (page | 1, end + 1),
        (page | 2, end - 8),
    ]

    assert [protocol_errno(descriptor.write, RANGE.pack(*pair)) for pair in wrong] == [errno.EINVAL] * len(wrong)
    assert protocol_errno(descriptor.write, RANGE.pack(page | 1, page)) == errno.ERANGE
    assert descriptor.ranges == []


@pytest.mark.parametrize("command", BOTH_WAYS)
def test_item_30_x_beyond_all_addresses_is_enomem_and_the_process_keeps_working(
    stage: Stage, command: type[Register | Unregister]
) -> None:
    descriptor, page = stage.descriptor(), stage.marked(1)
    top = (1 << 64) - stage.page
    beyond = [(1 << 62, (1 << 62) + stage.page), (top - stage.page, top), (page, 1 << 62)]

    assert [kernel_errno(descriptor.write, command(*pair).encode()) for pair in beyond] == [errno.ENOMEM] * 3

    assert descriptor.ranges == []
    assert descriptor.write(Register(page, page + stage.page).encode()) == 16


@pytest.mark.parametrize("command", BOTH_WAYS)
def test_item_30_x_where_nothing_is_mapped_is_einval_and_the_process_keeps_working(
    stage: Stage, command: type[Register | Unregister]
) -> None:
    # In 2014 the lock of all mappings stayed taken, and the process stopped at its next one.
    descriptor, page = stage.descriptor(), stage.anonymous(3)
    memory.unmap(page + stage.page, stage.page)
    hole = page + stage.page

    assert kernel_errno(descriptor.write, command(hole, hole + stage.page).encode()) == errno.EINVAL

    assert descriptor.ranges == []
    memory.unmap(memory.map_memory(stage.page), stage.page)
    assert descriptor.write(Register(page, hole).encode()) == 16


def test_item_30_x_a_range_may_have_holes(stage: Stage) -> None:
    descriptor, page = stage.descriptor(), stage.marked(3)
    stage.unmark(page + stage.page)
    memory.unmap(page + stage.page, stage.page)

    assert descriptor.write(Register(page, page + 3 * stage.page).encode()) == 16

    touches = stage.start_reads(descriptor, [page, page + 2 * stage.page])
    for _ in touches:
        stage.answer(descriptor, stage.fault(descriptor), 7)
    assert [touch.result() for touch in touches] == [there(7)] * 2


def test_item_31_x_to_register_twice_is_fine(stage: Stage) -> None:
    descriptor, page = stage.descriptor(), stage.marked(4)

    assert descriptor.write(Register(page, page + 2 * stage.page).encode()) == 16
    assert descriptor.write(Register(page, page + 2 * stage.page).encode()) == 16
    assert descriptor.write(Register(page + stage.page, page + 3 * stage.page).encode()) == 16

    assert [end - start for start, end in descriptor.ranges] in (
        [3 * stage.page],
        [2 * stage.page, stage.page],
        [stage.page] * 3,
    )
    stage.start_reads(descriptor, [page, page + 2 * stage.page])


def test_item_31_x_what_another_descriptor_has_is_ebusy_and_nothing_is_changed(stage: Stage) -> None:
    # In 2014 what came before it in the range stayed registered.
    one, other = stage.descriptor(), stage.descriptor()
    page = stage.marked(3)
    middle = page + stage.page
    one.register((middle, stage.page))

    assert kernel_errno(other.write, Register(page, page + 3 * stage.page).encode()) == errno.EBUSY
    assert kernel_errno(other.write, Unregister(page, page + 3 * stage.page).encode()) == errno.EBUSY

    assert (one.ranges, other.ranges) == ([(middle, middle + stage.page)], [])
    assert [stage.read(page), stage.read(page + 2 * stage.page)] == [sigbus(page), sigbus(page + 2 * stage.page)]
    (touch,) = stage.start_reads(one, [middle])
    stage.answer(one, stage.fault(one), 7)
    assert touch.result() == there(7)


def test_item_31_x_to_unregister_what_is_not_registered_is_fine(stage: Stage) -> None:
    descriptor, page = stage.descriptor(), stage.marked(3)
    descriptor.register((page + stage.page, stage.page))

    assert descriptor.write(Unregister(page, page + 3 * stage.page).encode()) == 16
    assert descriptor.write(Unregister(page, page + 3 * stage.page).encode()) == 16

    assert descriptor.ranges == []


def test_item_32_x_two_descriptors_see_only_their_own_faults(stage: Stage) -> None:
    one, other = stage.descriptor(), stage.descriptor()
    page = stage.marked(2)
    one.register((page, stage.page))
    other.register((page + stage.page, stage.page))
    touch = stage.start_reads(one, [page])[0]
    another = stage.start_reads(other, [page + stage.page])[0]

    assert (waiters(one), waiters(other)) == ((1, 1), (1, 1))
    assert (stage.fault(one), stage.fault(other)) == (page, page + stage.page)
    assert protocol_errno(stage.wake, one, page + stage.page) == errno.ENOENT
    stage.answer(one, page, 7)
    assert touch.result() == there(7)
    assert another.waiting
    stage.answer(other, page + stage.page, 8)
    assert another.result() == there(8)


@pytest.mark.parametrize("shared", [False, True])
def test_item_33_x_all_four_combinations_of_advice_and_registration(stage: Stage, shared: bool) -> None:
    descriptor = stage.descriptor()
    neither, registered, both = (stage.shared(1) if shared else stage.anonymous(1) for _ in range(3))
    marked = stage.marked(1, shared=shared)
    descriptor.register((registered, stage.page))
    descriptor.register((both, stage.page))
    stage.mark(both)
    (touch,) = stage.start_reads(descriptor, [both])

    assert stage.read(neither) == there(0)
    assert stage.read(registered) == there(0)
    assert [stage.read(marked), stage.write(marked)] == [sigbus(marked), sigbus(marked)]
    assert stage.fault(descriptor) == both
    stage.answer(descriptor, both, 7)
    assert touch.result() == there(7)


def test_item_33_x_the_order_of_advice_and_registration_does_not_matter(stage: Stage) -> None:
    descriptor = stage.descriptor()
    first, last = stage.anonymous(1), stage.anonymous(1)
    descriptor.register((first, stage.page))
    stage.mark(first)
    stage.mark(last)
    descriptor.register((last, stage.page))

    stage.start_reads(descriptor, [first, last])

    assert stage.faults(descriptor, 2) == [first, last]


def test_registration_may_come_before_the_handshake(stage: Stage) -> None:
    fresh, page = stage.fresh(), stage.marked(1)

    fresh.register((page, stage.page))

    assert (fresh.ranges, fresh.state) == ([(page, page + stage.page)], State.ASK_PROTOCOL)


def test_to_unregister_ends_the_waiting_with_sigbus(stage: Stage) -> None:
    # In October nobody was woken there.
    descriptor = stage.descriptor()
    page = stage.marked(2, descriptor)
    touches = stage.start_reads(descriptor, [page, page + stage.page])
    stage.fault(descriptor)

    descriptor.write(Unregister(page, page + 2 * stage.page).encode())

    assert [touch.result().signal for touch in touches] == [sigbus(0).signal] * 2
    assert (waiters(descriptor), descriptor.poll()) == ((0, 0), 0)


def test_what_is_unmapped_without_a_word_does_no_harm(stage: Stage) -> None:
    # To whoever passes numbers instead of buffers.
    descriptor, page = stage.descriptor(), memory.map_memory(stage.page)
    descriptor.register((page, stage.page))
    stage.mark(page)
    memory.unmap(page, stage.page)

    descriptor.close()

    assert descriptor.closed
    assert process.userfaultfds() == []
