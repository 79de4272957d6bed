"""Reservations at the limit of mappings, between threads, and after a fork."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest
from tests.conformance.protocol_tools import (
    SEGV_ACCERR,
    kernel_errno,
    page_of,
    sigsegv,
    there,
    wait_until,
    waiters,
)

from userfault import Reservation
from userfault.errors import KernelError
from userfault.kernel import maps, process

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conformance.conftest import RunChild
    from tests.conformance.protocol_tools import Stage


TIB = 1 << 40


@pytest.fixture
def reservation(stage: Stage) -> Iterator[Reservation]:  # after the stage: what waits in a piece is let go before
    with Reservation(TIB) as reservation:
        yield reservation


def forbidden(address: int) -> object:
    """Return what comes of touching addresses that are reserved and no more."""
    return sigsegv(address, SEGV_ACCERR)


LIMIT = """
    import userfault
    from userfault.protocol import marks
    marks.to_the_end = lambda work: work()  # a thread's stack is mappings too, and comes and goes when it likes
    with open("/proc/sys/vm/max_map_count") as file:
        limit = int(file.read())

    def count():
        with open("/proc/self/maps", "rb", 0) as file:
            return sum(part.count(10) for part in iter(lambda: file.read(4096), b""))

    reservation, descriptor = userfault.Reservation(1 << 40), userfault.userfaultfd()
    start = reservation.address
    pieces = [reservation.piece(P, descriptor, address=start)]
    ordinary = memory.map_memory(3 * P)
    ballast = memory.map_memory(2 * limit * P, prot=memory.PROT_NONE)
    for place in range((limit - count() - {spare}) // 2):
        memory.protect(ballast + 2 * place * P, P, memory.PROT_READ)

    def more():
        while True:
            pieces.append(reservation.piece(P, descriptor, address=start + 2 * len(pieces) * P))

    def refused(call, *args, **named):
        try:
            call(*args, **named)
        except KernelError as error:
            return errno.errorcode[error.errno] + (" vm.max_map_count" if "vm.max_map_count" in str(error) else "")
"""


@pytest.mark.parametrize("spare", [40, 41, 42, 43])
def test_the_limit_of_mappings_is_named_and_the_reservation_keeps_working(run_child: RunChild, spare: int) -> None:
    result = run_child(
        LIMIT.format(spare=spare)
        + """
    print(refused(more), limit - count() < 2, len(pieces) == len(reservation.pieces) == len(descriptor.ranges) > 15)
    print(refused(more), len(pieces) == len(reservation.pieces) == len(descriptor.ranges))
    for piece in pieces:
        descriptor.place(piece.address, b"x" * P)
        assert piece.memory[0] == 120
    pieces[3].close()
    for place in range(1, 5):  # side by side they cost nothing
        beside = reservation.piece(P, descriptor, address=pieces[-1].address + place * P)
    descriptor.place(beside.address, b"y" * P)
    print(bytes(beside.memory[:1]))
    again = reservation.piece(P, descriptor, address=start + 6 * P)
    descriptor.place(again.address, b"z" * P)
    print(bytes(again.memory[:1]), len(pieces) + 4 == len(reservation.pieces))
    descriptor.close()
    reservation.close()
    print(descriptor.closed, reservation.closed, limit - count() > 30)
        """
    )

    assert result.stdout.splitlines() == [
        "ENOMEM vm.max_map_count True True",
        "ENOMEM vm.max_map_count True",
        "b'y'",
        "b'z' True",
        "True True True",
    ]
    assert result.stderr == ""


def test_a_piece_that_cannot_be_cut_out_at_the_limit_stays_open(run_child: RunChild) -> None:
    result = run_child(
        LIMIT.format(spare=40)
        + """
    joined = [reservation.piece(P, descriptor, address=start + place * P) for place in range(1, 6)]
    pieces += joined
    print(refused(more))
    print(refused(userfault.madvise, (ordinary + P, P), userfault.protocol.MADV_USERFAULT))
    print(refused(descriptor.register, (ordinary + P, P)), memory.view(ordinary + P, P)[0])
    descriptor.unregister((ordinary + P, P))
    spare = []  # what the threads that changes are made in have left behind
    try:
        while True:
            spare.append(memory.map_memory(P, prot=len(spare) % 2))
    except KernelError:
        pass
    print(refused(joined[2].close), joined[2].closed, joined[2] in reservation.pieces)
    for address in spare:
        memory.unmap(address, P)
    descriptor.place(joined[2].address, b"x" * P)
    print(bytes(joined[2].memory[:1]))
    joined[4].close()  # at the edge
    reservation.close()
    descriptor.close()
    print(joined[2].closed)
        """
    )

    assert result.stdout.splitlines() == [
        "ENOMEM vm.max_map_count",
        "ENOMEM vm.max_map_count",
        "None 0",
        "ENOMEM vm.max_map_count False True",
        "b'x'",
        "True",
    ]
    assert result.stderr == ""


def test_threads_take_and_give_back_pieces(stage: Stage, reservation: Reservation) -> None:
    def work(byte: int) -> None:
        with stage.descriptor() as descriptor:
            for turn in range(40):
                with reservation.piece((turn % 3 + 1) * stage.page, descriptor) as piece:
                    descriptor.place(piece.address, page_of(byte))
                    assert stage.read(piece.address) == there(byte)

    workers = [stage.call(work, byte) for byte in range(1, 5)]

    assert [worker.result() for worker in workers] == [None] * 4
    assert reservation.pieces == []


def test_pieces_and_their_descriptors_may_be_closed_at_once(stage: Stage, reservation: Reservation) -> None:
    for _ in range(50):
        descriptor = stage.descriptor()
        pieces = [reservation.piece(stage.page, descriptor) for _ in range(4)]
        calls = [stage.call(piece.close) for piece in pieces] + [stage.call(descriptor.close)]
        assert [call.result() for call in calls] == [None] * 5

    assert process.userfaultfds() == []
    assert not [entry for entry in maps.read_smaps() if "um" in entry.flags]  # nothing is registered any more


def test_a_piece_is_never_seen_before_it_is_marked(stage: Stage, reservation: Reservation) -> None:
    # One thread touches the place all the time: it is forbidden, or SIGBUS, or what was placed.
    often = stage.background(stage.toucher.start_often(reservation.address, 1, 7))
    descriptor = stage.descriptor()

    def go_on() -> None:
        before = often.touches
        wait_until(lambda: often.touches > before + 1 or waiters(descriptor)[1])

    for turn in range(200):
        piece = reservation.piece(stage.page, descriptor if turn % 2 else None)
        if turn % 4 == 1:
            descriptor.place(piece.address, page_of(7))
            descriptor.kernel.wake(piece.address, stage.page)  # whoever was there before the page looks again
        go_on()
        piece.close()
        go_on()
    often.stop()
    tally = often.result()

    assert (tally.zeros, tally.others) == (0, 0)
    assert min(tally.right, tally.sigbus, tally.sigsegv) > 0


def test_a_forked_child_has_none_of_it(run_child: RunChild) -> None:
    result = run_child(
        """
        import resource, warnings
        import userfault
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on: of a fork with threads
        faulthandler.cancel_dump_traceback_later()  # its thread is not there in a child, which waits for it at its end
        signal.alarm(20)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        reservation, descriptor = userfault.Reservation(1 << 40), userfault.userfaultfd()
        piece = reservation.piece(P, descriptor)
        descriptor.place(piece.address, b"x" * P)

        def attempt():
            try:
                reservation.piece(P)
            except ValueError as error:
                print("forked from" in str(error))

        for call in (lambda: piece.memory[0], attempt, piece.close, reservation.close, sys.exit):
            sys.stdout.flush()
            pid = os.fork()
            if not pid:
                faulthandler.disable()
                signal.alarm(15)
                call()
                sys.stdout.flush()
                os._exit(0)
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        print(piece.memory[0])
        descriptor.close()
        reservation.close()
        """
    )

    assert result.stdout.splitlines() == ["-11", "True", "0", "0", "0", "0", "120"]
    assert result.stderr == ""


def test_what_fails_half_way_leaves_nothing(
    stage: Stage, reservation: Reservation, monkeypatch: pytest.MonkeyPatch
) -> None:
    descriptor, start = stage.descriptor(), reservation.address

    def protect(*_: int) -> None:
        raise KernelError(errno.ENOMEM, "mprotect")

    with monkeypatch.context() as patch:
        patch.setattr("userfault.kernel.memory.protect", protect)
        assert kernel_errno(reservation.piece, stage.page, descriptor) == errno.ENOMEM

    assert (reservation.pieces, descriptor.ranges) == ([], [])
    assert stage.read(start) == forbidden(start)
    other = stage.descriptor()
    reservation.piece(stage.page, other)
    other.place(start, page_of(7))
    assert stage.read(start) == there(7)
