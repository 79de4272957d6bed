"""Waiting for faults in every way: `wait`, epoll, selectors and asyncio, and signals to those who are stopped."""

from __future__ import annotations

import asyncio
import errno
import select
import selectors
import signal
from typing import TYPE_CHECKING

import pytest
from tests.conformance.protocol_tools import (
    TIMEOUT_S,
    handling,
    kernel_errno,
    number,
    protocol_errno,
    there,
    wait_until,
    waiters,
)

from userfault.protocol import UFFD_NONBLOCK

if TYPE_CHECKING:
    from tests.conformance.protocol_tools import Stage

    from userfault.protocol import Descriptor

IN, OUT = select.POLLIN, select.POLLOUT


def wait_for_reader(descriptor: Descriptor) -> None:
    """Wait until another thread waits in `wait` or `read`; nothing outside shows it."""
    wait_until(lambda: descriptor._bells)


@pytest.mark.parametrize("flags", [0, UFFD_NONBLOCK])
def test_wait_ends_when_the_time_is_up(stage: Stage, flags: int) -> None:
    descriptor = stage.descriptor(flags)
    stage.marked(1, descriptor)

    assert [descriptor.wait(timeout) for timeout in (0, 0.001, 0.02, -1)] == [0, 0, 0, 0]


@pytest.mark.parametrize("flags", [0, UFFD_NONBLOCK])
@pytest.mark.parametrize("timeout", [None, TIMEOUT_S])
def test_wait_ends_with_a_fault_and_leaves_it_unread(stage: Stage, flags: int, timeout: float | None) -> None:
    descriptor = stage.descriptor(flags)
    page = stage.marked(1, descriptor)

    waiter = stage.call(descriptor.wait, timeout)
    wait_for_reader(descriptor)
    assert waiter.waiting
    stage.start_read(page)

    assert waiter.result() == IN
    assert waiters(descriptor) == (1, 1)
    assert number(descriptor.read()) == page


@pytest.mark.parametrize("flags", [0, UFFD_NONBLOCK])
def test_wait_for_pollout_ends_with_a_read(stage: Stage, flags: int) -> None:
    descriptor = stage.descriptor(flags)
    page = stage.marked(1, descriptor)
    waiter = stage.call(descriptor.wait, None, OUT)
    wait_for_reader(descriptor)

    stage.start_reads(descriptor, [page])
    assert waiter.waiting
    descriptor.read()

    assert waiter.result() == OUT


def test_wait_follows_the_handshake(stage: Stage) -> None:
    fresh = stage.fresh()
    waiter = stage.call(fresh.wait, None, IN)
    wait_for_reader(fresh)

    fresh.write(b"\0" * 8)

    assert waiter.result() == IN
    assert fresh.wait(0) == IN


@pytest.mark.parametrize("flags", [0, UFFD_NONBLOCK])
def test_close_ends_the_waits_of_other_threads(stage: Stage, flags: int) -> None:
    descriptor = stage.descriptor(flags)
    waiters_ = [stage.call(kernel_errno, descriptor.wait, timeout) for timeout in (None, TIMEOUT_S)]
    wait_until(lambda: len(descriptor._bells) == 2)

    descriptor.close()

    assert [waiter.result() for waiter in waiters_] == [errno.EBADF] * 2


def test_close_ends_a_blocking_read_of_another_thread(stage: Stage) -> None:
    descriptor = stage.descriptor(0)
    readers = [stage.call(kernel_errno, descriptor.read) for _ in range(3)]
    wait_until(lambda: len(descriptor._bells) == 3)

    descriptor.close()

    assert [reader.result() for reader in readers] == [errno.EBADF] * 3


def test_many_blocking_readers_share_the_faults(stage: Stage) -> None:
    descriptor = stage.descriptor(0)
    page = stage.marked(8, descriptor)
    readers = [stage.call(descriptor.read) for _ in range(8)]
    wait_until(lambda: len(descriptor._bells) == 8)

    pages = [page + place * stage.page for place in range(8)]
    for address in pages:
        stage.start_read(address)

    assert sorted(number(reader.result()) for reader in readers) == pages


# -- others that wait on fileno() ----------------------------------------------------------------------------------


def test_a_level_triggered_epoll_tells_as_long_as_a_fault_is_unread(stage: Stage) -> None:
    descriptor = stage.descriptor()
    page = stage.marked(2, descriptor)
    with select.epoll() as epoll:
        epoll.register(descriptor, select.EPOLLIN)
        told = [epoll.poll(0)]
        stage.start_reads(descriptor, [page, page + stage.page])
        told += [epoll.poll(TIMEOUT_S), epoll.poll(0)]
        descriptor.read()
        told.append(epoll.poll(0))
        descriptor.read()
        told.append(epoll.poll(0))

    event = [(descriptor.fileno(), select.EPOLLIN)]
    assert told == [[], event, event, event, []]


def test_an_edge_triggered_epoll_tells_once_for_each_arrival(stage: Stage) -> None:
    descriptor = stage.descriptor()
    page = stage.marked(2, descriptor)
    with select.epoll() as epoll:
        epoll.register(descriptor, select.EPOLLIN | select.EPOLLET)
        told = [epoll.poll(0)]
        stage.start_reads(descriptor, [page])
        told += [epoll.poll(TIMEOUT_S), epoll.poll(0)]
        stage.start_reads(descriptor, [page + stage.page])
        told += [epoll.poll(TIMEOUT_S), epoll.poll(0)]

    event = [(descriptor.fileno(), select.EPOLLIN)]
    assert told == [[], event, [], event, []]
    assert stage.faults(descriptor, 2) == [page, page + stage.page]


def test_a_selector_serves_several_descriptors(stage: Stage) -> None:
    descriptors = [stage.descriptor() for _ in range(3)]
    pages = [stage.marked(1, descriptor) for descriptor in descriptors]
    touches = [stage.start_read(page + place) for place, page in enumerate(pages)]
    served: dict[int, int] = {}
    with selectors.DefaultSelector() as selector:
        for place, descriptor in enumerate(descriptors):
            selector.register(descriptor, selectors.EVENT_READ, place)
        while len(served) < 3:
            ready = selector.select(TIMEOUT_S)
            assert ready
            for key, _ in ready:
                place = key.data
                served[place] = number(descriptors[place].read())
                stage.answer(descriptors[place], served[place], place + 1)

    assert served == {place: page + place for place, page in enumerate(pages)}
    assert [touch.result() for touch in touches] == [there(1), there(2), there(3)]


def test_asyncio_reads_without_a_thread(stage: Stage) -> None:
    descriptor = stage.descriptor()
    page = stage.marked(16, descriptor)

    async def serve() -> list[int]:
        loop = asyncio.get_running_loop()
        served: list[int] = []
        done = loop.create_future()

        def readable() -> None:
            served.append(number(descriptor.read()))
            stage.answer(descriptor, served[-1], 7)
            if len(served) == 16:
                done.set_result(None)

        loop.add_reader(descriptor, readable)
        try:
            touches = [stage.start_read(page + place * stage.page) for place in range(16)]
            await asyncio.wait_for(done, TIMEOUT_S)
        finally:
            loop.remove_reader(descriptor)
        assert [touch.result() for touch in touches] == [there(7)] * 16
        return served

    assert sorted(asyncio.run(serve())) == [page + place * stage.page for place in range(16)]


def test_poll_on_the_bare_descriptor_knows_faults_and_neither_the_handshake_nor_pollout(stage: Stage) -> None:
    # In 2014 the descriptor itself told all of it. That is what an exported one is for.
    descriptor, poll = stage.fresh(), select.poll()
    page = stage.marked(1, descriptor)
    poll.register(descriptor, IN | OUT)
    told = [poll.poll(0)]
    descriptor.handshake()
    told.append(poll.poll(0))
    stage.start_reads(descriptor, [page])
    told.append(poll.poll(0))
    descriptor.read()
    told.append(poll.poll(0))

    assert told == [[], [], [(descriptor.fileno(), IN)], []]


def test_poll_on_a_bare_descriptor_that_blocks_is_always_pollerr(stage: Stage) -> None:
    # Since the first version with ioctls; `Descriptor.poll` and `wait` work all the same.
    descriptor, poll = stage.descriptor(0), select.poll()
    poll.register(descriptor, IN)

    assert poll.poll(0) == [(descriptor.fileno(), select.POLLERR)]
    assert descriptor.poll() == 0


# -- signals to those who wait -------------------------------------------------------------------------------------


def test_a_thread_that_a_signal_interrupts_after_the_read_is_read_again(stage: Stage) -> None:
    # In July the same; in October signals waited until the fault was resolved.
    descriptor = stage.descriptor()
    page = stage.marked(1, descriptor)
    (touch,) = stage.start_reads(descriptor, [page + 5])
    assert stage.fault(descriptor) == page + 5
    handled: list[int] = []

    with handling(signal.SIGUSR1, lambda number, _: handled.append(number)):
        signal.pthread_kill(touch.ident, signal.SIGUSR1)
        wait_until(lambda: waiters(descriptor) == (1, 1))

    assert handled == [signal.SIGUSR1]
    assert descriptor.poll() == IN
    assert protocol_errno(stage.wake, descriptor, page) == errno.ENOENT
    assert waiters(descriptor) == (1, 1)
    assert stage.fault(descriptor) == page + 5
    stage.answer(descriptor, page, 7)
    assert touch.result() == there(7)
    assert protocol_errno(stage.wake, descriptor, page) == errno.ENOENT


def test_a_thread_that_a_signal_interrupts_before_the_read_is_read_once(stage: Stage) -> None:
    descriptor = stage.descriptor()
    page = stage.marked(1, descriptor)
    (touch,) = stage.start_reads(descriptor, [page + 5])
    handled: list[int] = []

    with handling(signal.SIGUSR1, lambda number, _: handled.append(number)):
        for count in range(1, 11):
            signal.pthread_kill(touch.ident, signal.SIGUSR1)
            wait_until(lambda count=count: len(handled) == count)  # type: ignore[misc]
        wait_until(lambda: waiters(descriptor) == (1, 1))

    assert stage.fault(descriptor) == page + 5
    with pytest.raises(BlockingIOError):
        descriptor.read()
    stage.answer(descriptor, page, 7)
    assert touch.result() == there(7)


def test_a_signal_to_one_thread_leaves_the_other_on_its_page_alone(stage: Stage) -> None:
    descriptor = stage.descriptor()
    page = stage.marked(1, descriptor)
    touches = stage.start_reads(descriptor, [page + 1, page + 2])
    stage.faults(descriptor, 2)

    with handling(signal.SIGUSR1, lambda *_: None):
        signal.pthread_kill(touches[0].ident, signal.SIGUSR1)
        wait_until(lambda: waiters(descriptor) == (1, 2))

    assert descriptor.poll() == IN | OUT
    assert stage.fault(descriptor) == page + 1
    stage.answer(descriptor, page, 7)
    assert [touch.result() for touch in touches] == [there(7)] * 2
    assert protocol_errno(stage.wake, descriptor, page) == errno.ENOENT
