"""Reading faults, poll and fdinfo (items 7 to 11, 20 to 22), and many descriptors at once."""

from __future__ import annotations

import errno
import os
import select
import signal
from typing import TYPE_CHECKING

import pytest
from tests.conformance.protocol_tools import (
    TIMEOUT_S,
    handling,
    number,
    page_of,
    protocol_errno,
    there,
    wait_until,
    waiters,
)

from userfault import madvise
from userfault.protocol import MADV_NOUSERFAULT, MADV_USERFAULT

if TYPE_CHECKING:
    from tests.conformance.protocol_tools import Stage

    from userfault.protocol import Descriptor

IN, OUT = select.POLLIN, select.POLLOUT


class Interrupted(Exception):  # noqa: N818  # it is no error
    """What the handler of a signal raises."""


def wait_for_reader(descriptor: Descriptor) -> None:
    """Wait until another thread waits in `wait` or `read`; nothing outside shows it."""
    wait_until(lambda: descriptor._bells)


# -- the checklist -----------------------------------------------------------------------------------------------


def test_item_7_r_an_idle_descriptor_that_does_not_block_is_eagain(stage: Stage) -> None:
    descriptor = stage.descriptor()
    stage.marked(1, descriptor)

    with pytest.raises(BlockingIOError) as caught:
        descriptor.read()

    assert caught.value.errno == errno.EAGAIN


def test_item_7_r_a_blocking_read_ends_with_a_fault(stage: Stage) -> None:
    descriptor = stage.descriptor(0)
    page = stage.marked(1, descriptor)

    reader = stage.call(descriptor.read)
    wait_for_reader(descriptor)
    touch = stage.start_read(page + 3)

    assert number(reader.result()) == page + 3
    stage.answer(descriptor, page, 7)
    assert touch.result() == there(7)


def test_item_7_r_a_signal_whose_handler_returns_lets_the_read_go_on(stage: Stage) -> None:
    # EINTR as Python has it (PEP 475).
    descriptor = stage.descriptor(0)
    page = stage.marked(1, descriptor)
    signals = []

    def handler(*_: object) -> None:
        signals.append(descriptor.state)
        if len(signals) == 3:
            stage.start_read(page)

    with handling(signal.SIGALRM, handler):
        signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
        data = descriptor.read()

    assert number(data) == page
    assert len(signals) >= 3


def test_item_7_r_a_signal_whose_handler_raises_ends_the_read_and_no_fault_is_lost(stage: Stage) -> None:
    descriptor = stage.descriptor(0)
    page = stage.marked(1, descriptor)
    before = os.listdir("/proc/self/fd")

    def handler(*_: object) -> None:
        raise Interrupted

    def read_with_alarm() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.005)
        descriptor.read()

    for _ in range(3):
        with handling(signal.SIGALRM, handler), pytest.raises(Interrupted):
            read_with_alarm()
    touch = stage.start_read(page)

    assert number(descriptor.read()) == page
    stage.answer(descriptor, page, 7)
    assert touch.result() == there(7)
    assert os.listdir("/proc/self/fd") == before


def test_item_8_r_a_big_buffer_gets_eight_bytes(stage: Stage) -> None:
    descriptor = stage.descriptor()
    page = stage.marked(3, descriptor)
    stage.start_reads(descriptor, [page, page + stage.page, page + 2 * stage.page])

    assert [len(descriptor.read(length)) for length in (8, 9, 1 << 20)] == [8, 8, 8]


def test_item_8_r_a_small_buffer_is_einval_and_no_fault_is_lost(stage: Stage) -> None:
    descriptor = stage.descriptor()
    page = stage.marked(1, descriptor)
    stage.start_reads(descriptor, [page])

    assert [protocol_errno(descriptor.read, length) for length in (7, 0, -1)] == [errno.EINVAL] * 3
    assert stage.fault(descriptor) == page


def test_item_9_r_a_fault_is_reported_once(stage: Stage) -> None:
    descriptor = stage.descriptor()
    page = stage.marked(1, descriptor)
    (touch,) = stage.start_reads(descriptor, [page])

    assert number(descriptor.read()) == page
    with pytest.raises(BlockingIOError):
        descriptor.read()
    assert touch.waiting


def test_item_10_r_two_threads_on_one_page_are_two_reads(stage: Stage) -> None:
    descriptor = stage.descriptor()
    page = stage.marked(1, descriptor)
    touches = stage.start_reads(descriptor, [page + 1, page + 2])

    assert stage.faults(descriptor, 2) == [page + 1, page + 2]
    stage.answer(descriptor, page, 7)
    assert [touch.result() for touch in touches] == [there(7), there(7)]


def test_item_11_r_an_address_is_where_it_was_touched(stage: Stage) -> None:
    # Alignment was not promised; it was the raw address, and is.
    descriptor = stage.descriptor()
    page = stage.marked(4, descriptor)
    touched = [page, page + stage.page + 1, page + 3 * stage.page - 1, page + 3 * stage.page + 8]
    stage.start_reads(descriptor, touched)

    assert stage.faults(descriptor, 4) == touched


def test_faults_come_oldest_first(stage: Stage) -> None:
    # In 2014 the newest came first, though nothing promised it.
    descriptor = stage.descriptor()
    page = stage.marked(8, descriptor)
    touched = [page + place * stage.page for place in (5, 2, 7, 0, 1)]
    stage.start_reads(descriptor, touched)

    assert stage.faults(descriptor, 5) == touched


@pytest.mark.parametrize(("unread", "read", "bits"), [(0, 0, 0), (1, 0, IN), (0, 1, OUT), (1, 1, IN | OUT)])
def test_item_20_p_poll_says_what_is_unread_and_who_waits(stage: Stage, unread: int, read: int, bits: int) -> None:
    descriptor = stage.descriptor()
    page = stage.marked(2, descriptor)
    stage.start_reads(descriptor, [page][:read])
    stage.faults(descriptor, read)
    stage.start_reads(descriptor, [page + stage.page][:unread])

    assert descriptor.poll() == bits
    assert descriptor.wait(0) == bits


def test_item_21_p_poll_says_out_from_the_read_to_the_wake(stage: Stage) -> None:
    descriptor = stage.descriptor()
    page = stage.marked(1, descriptor)
    stage.start_reads(descriptor, [page])
    seen = [descriptor.poll()]

    stage.fault(descriptor)
    seen.append(descriptor.poll())
    descriptor.place(page, page_of(7))
    seen.append(descriptor.poll())
    stage.wake(descriptor, page)
    seen.append(descriptor.poll())

    assert seen == [IN, OUT, OUT, 0]


def test_item_22_fdinfo_counts_one_fault(stage: Stage) -> None:
    descriptor = stage.descriptor()
    page = stage.marked(1, descriptor)
    seen = [waiters(descriptor)]

    stage.start_reads(descriptor, [page])
    seen.append(waiters(descriptor))
    stage.fault(descriptor)
    seen.append(waiters(descriptor))
    stage.answer(descriptor, page, 7)
    seen.append(waiters(descriptor))

    assert seen == [(0, 0), (1, 1), (0, 1), (0, 0)]


def test_item_22_fdinfo_counts_three_faults_two_of_them_read(stage: Stage) -> None:
    descriptor = stage.descriptor()
    page = stage.marked(3, descriptor)

    stage.start_reads(descriptor, [page, page + stage.page, page + 2 * stage.page])
    assert waiters(descriptor) == (3, 3)
    stage.faults(descriptor, 2)
    assert waiters(descriptor) == (1, 3)


def test_faults_wait_for_the_handshake(stage: Stage) -> None:
    # In July a thread blocked before the handshake, and poll showed it once running; so it is.
    fresh = stage.fresh()
    page = stage.marked(1, fresh)
    (touch,) = stage.start_reads(fresh, [page])

    assert fresh.poll() == OUT
    assert waiters(fresh) == (1, 1)
    assert fresh.handshake()
    assert fresh.poll() == IN
    stage.answer(fresh, stage.fault(fresh), 7)
    assert touch.result() == there(7)


# -- many ----------------------------------------------------------------------------------------------------------


def test_64_descriptors_with_64_ranges_each_serve_64_threads(stage: Stage) -> None:
    count = 64
    start = stage.anonymous(count * count)
    descriptors = [stage.descriptor() for _ in range(count)]
    for place in range(count * count):  # in turn: no range of a descriptor lies beside another one of it
        descriptors[place % count].register((start + place * stage.page, stage.page))
    everything = (start, count * count * stage.page)
    madvise(everything, MADV_USERFAULT)

    def walk(thread: int) -> list[int]:
        """Touch one page of every descriptor."""
        pages = (thread * count + (thread + step) % count for step in range(count))
        return [stage.read(start + place * stage.page).byte - place % count for place in pages]

    walkers = [stage.call(walk, thread) for thread in range(count)]
    seen: list[set[int]] = [set() for _ in descriptors]
    with select.epoll() as epoll:
        places = {descriptor.fileno(): place for place, descriptor in enumerate(descriptors)}
        for descriptor in descriptors:
            epoll.register(descriptor, select.EPOLLIN)
        while sum(map(len, seen)) < count * count:
            for fd, _ in epoll.poll(TIMEOUT_S):
                place = places[fd]
                seen[place].add(address := number(descriptors[place].read()))
                stage.answer(descriptors[place], address, place + 1)
    madvise(everything, MADV_NOUSERFAULT)  # before 4096 ranges change hands one by one

    assert [walker.result() for walker in walkers] == [[1] * count] * count
    assert seen == [
        set(range(start + place * stage.page, start + everything[1], count * stage.page)) for place in range(count)
    ]
