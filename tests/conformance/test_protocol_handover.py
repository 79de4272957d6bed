"""No zero is ever read: marked memory changes hands while threads touch it without a pause.

Three threads touch pages of a marked range, around and around; one of them writes first, so that a page which its write
made would be seen by its zeros.  Meanwhile the range is registered, unregistered, closed and passed on.  Whatever
happens, a touch finds the byte that was placed, or ends in SIGBUS.  (Without the poison of `holes` such a test finds
billions of zeros.)
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import warnings
from typing import TYPE_CHECKING

import pytest
from tests.conformance.protocol_tools import Tally, number, page_of, sigbus, there, wait_until

from userfault import Reservation, userfaultfd
from userfault.errors import KernelError, LocalProtocolError
from userfault.kernel import abi, memory
from userfault.protocol import UFFD_CLOEXEC, UFFD_NONBLOCK, Register, Unregister

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conformance.protocol_tools import Stage

    from userfault.protocol import Descriptor

PAGES = 64
RIGHT = 7
ROUNDS = 100


class Unrest:
    """A range that three threads touch without a pause."""

    def __init__(self, stage: Stage, start: int, shared: bool) -> None:
        self.stage, self.start = stage, start
        self.range = start, PAGES * stage.page
        self._missing_again = abi.MADV_REMOVE if shared else mmap.MADV_DONTNEED
        self._threads = [
            stage.background(
                stage.toucher.start_often(start, PAGES, RIGHT, first=13 * place, step=2 * place + 3, write=place == 1)
            )
            for place in range(3)
        ]
        self.go_on()

    def go_on(self) -> None:
        """Wait until a few more touches have been made."""
        before = sum(thread.touches for thread in self._threads)
        wait_until(lambda: sum(thread.touches for thread in self._threads) > before + 30)

    def serve(self, descriptor: Descriptor, count: int) -> None:
        """Answer so many faults, if they come soon."""
        for _ in range(count):
            if not descriptor.wait(0.01, 1):
                return
            page = number(descriptor.read()) & -self.stage.page
            with contextlib.suppress(KernelError):  # EEXIST: for another thread
                descriptor.place(page, page_of(RIGHT))
            with contextlib.suppress(LocalProtocolError):  # ENOENT: woken with another one on its page
                self.stage.wake(descriptor, page)

    def drop(self) -> None:
        """Make every page missing again."""
        memory.advise(*self.range, self._missing_again)

    def end(self) -> Tally:
        """Stop, and return what all touches came to."""
        for thread in self._threads:
            thread.stop()
        tallies = [thread.result() for thread in self._threads]
        return Tally(*(sum(getattr(tally, name) for tally in tallies) for name in Tally.__dataclass_fields__))


@pytest.fixture(params=[False, True], ids=["anonymous", "shared"])
def unrest(stage: Stage, request: pytest.FixtureRequest) -> Iterator[Unrest]:
    unrest = Unrest(stage, stage.marked(PAGES, shared=request.param), request.param)
    yield unrest
    tally = unrest.end()

    assert (tally.zeros, tally.others, tally.sigsegv) == (0, 0, 0), hex(tally.latest)
    assert tally.right + tally.sigbus == tally.touches
    assert min(tally.right, tally.sigbus) > ROUNDS, "the threads have hardly seen anything"


def test_register_and_unregister(stage: Stage, unrest: Unrest) -> None:
    descriptor = stage.descriptor()
    register = Register(unrest.start, unrest.start + unrest.range[1]).encode()
    unregister = Unregister(unrest.start, unrest.start + unrest.range[1]).encode()

    for turn in range(ROUNDS):
        descriptor.write(register)
        unrest.serve(descriptor, turn % 4)
        descriptor.write(unregister)
        unrest.go_on()
        if turn % 8 == 7:
            unrest.drop()
    descriptor.close()


def test_open_and_close(stage: Stage, unrest: Unrest) -> None:
    for turn in range(ROUNDS):
        with stage.descriptor() as descriptor:
            descriptor.register(unrest.range)
            unrest.serve(descriptor, turn % 4)
        if turn % 8 == 7:
            unrest.drop()
    unrest.go_on()


def test_pages_pass_from_one_descriptor_to_another_one_by_one(stage: Stage, unrest: Unrest) -> None:
    one, other = stage.descriptor(), stage.descriptor()
    for turn in range(ROUNDS):
        place = 5 * turn % PAGES
        piece = unrest.start + place * stage.page, min(8, PAGES - place) * stage.page
        one.unregister(unrest.range)
        other.register(piece)
        unrest.serve(other, turn % 3)
        other.unregister(piece)
        one.register(unrest.range)
        unrest.serve(one, turn % 3)
        if turn % 8 == 7:
            unrest.drop()
    one.close()
    other.close()
    unrest.go_on()


def test_forget_a_descriptor(unrest: Unrest) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        for turn in range(ROUNDS):
            descriptor = userfaultfd(UFFD_CLOEXEC | UFFD_NONBLOCK)
            descriptor.handshake()
            descriptor.register(unrest.range)
            unrest.serve(descriptor, turn % 4)
            del descriptor
            if turn % 8 == 7:
                unrest.drop()
    unrest.go_on()


def test_memory_that_is_locked(stage: Stage, unrest: Unrest) -> None:
    stage.lock(unrest.start, PAGES)

    for turn in range(ROUNDS):
        with stage.descriptor() as descriptor:
            descriptor.register(unrest.range)
            unrest.serve(descriptor, turn % 4)
        if turn % 8 == 7:
            memory.advise(*unrest.range, abi.MADV_DONTNEED_LOCKED)
    unrest.go_on()


def test_another_thread_gives_pages_meanwhile(stage: Stage, unrest: Unrest) -> None:
    # A page that is placed in the very moment may be lost, and is missed again; it is never zeros.
    rounds: list[int] = []

    def give(descriptor: Descriptor) -> set[int | None]:
        outcomes: set[int | None] = set()
        place = 0
        while len(rounds) < ROUNDS:
            place = (place + 11) % PAGES
            try:
                outcomes.add(descriptor.place(unrest.start + place * stage.page, page_of(RIGHT)))
            except KernelError as error:
                outcomes.add(error.errno)
        return outcomes

    with stage.descriptor() as descriptor:
        giver = stage.call(give, descriptor)
        for turn in range(ROUNDS):
            descriptor.register(unrest.range)
            unrest.serve(descriptor, turn % 2)
            descriptor.unregister(unrest.range)
            unrest.drop()
            rounds.append(turn)
        assert {stage.page} < giver.result() <= {stage.page, errno.ENOENT, errno.EEXIST}
    unrest.go_on()


def test_a_piece_of_a_reservation(stage: Stage) -> None:
    with Reservation(1 << 40) as reservation, stage.descriptor() as descriptor:
        unrest = Unrest(stage, reservation.piece(PAGES * stage.page).address, shared=False)
        for turn in range(ROUNDS):
            descriptor.register(unrest.range)
            unrest.serve(descriptor, turn % 4)
            descriptor.unregister(unrest.range)
            if turn % 8 == 7:
                unrest.drop()
        tally = unrest.end()

    assert (tally.zeros, tally.others, tally.sigsegv) == (0, 0, 0)


@pytest.mark.parametrize("shared", [False, True])
def test_what_was_missing_before_is_missing_afterwards(stage: Stage, shared: bool) -> None:
    page = stage.marked(4, shared=shared)
    with stage.descriptor() as descriptor:
        descriptor.register((page, 4 * stage.page))
        descriptor.place(page + stage.page, page_of(RIGHT))

        for _ in range(3):
            descriptor.unregister((page, 4 * stage.page))
            descriptor.register((page, 4 * stage.page))

        assert stage.there(page, 4) == [False, True, False, False]
        assert descriptor.place(page, page_of(RIGHT)) == stage.page
        assert descriptor.place(page + 2 * stage.page, page_of(RIGHT) * 2) == 2 * stage.page


def test_a_large_range_changes_hands(stage: Stage) -> None:
    # More than a piece that is looked at in one go.
    pages = (1 << 30) // stage.page + 3
    page = stage.marked(pages)
    last = page + (pages - 1) * stage.page
    with stage.descriptor() as descriptor:
        descriptor.register((page, pages * stage.page))
        descriptor.place(page + stage.page, page_of(RIGHT))
        (touch,) = stage.start_reads(descriptor, [last])

    assert touch.result().signal == sigbus(last).signal
    assert [stage.read(page), stage.read(last)] == [sigbus(page), sigbus(last)]
    assert stage.read(page + stage.page) == there(RIGHT)
