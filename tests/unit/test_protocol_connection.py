"""The descriptor's side without a descriptor: the checklist of the specification, item by item, and rules of our own.

A test's name begins with the item's letter and number (H handshake, R read, W write, P poll, F fdinfo, X registration).
What is missing here needs a kernel.
"""

from __future__ import annotations

import select
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from errno import EAGAIN, EINVAL, ENOENT, ERANGE

import pytest

from userfault.errors import LocalProtocolError
from userfault.kernel.memory import PAGE_SIZE
from userfault.protocol.connection import Connection
from userfault.protocol.messages import Fault, Register, Unregister, Version, Wake
from userfault.protocol.states import State

IN, OUT = select.POLLIN, select.POLLOUT
BASE = 0x7F00_0000_0000
ONES = b"\xff" * 8
Conversation = tuple[int, str, State, bytes | None]


def word(number: int) -> bytes:
    return number.to_bytes(8, sys.byteorder)


def page(number: int) -> int:
    return BASE + number * PAGE_SIZE


def pages(first: int, count: int = 1) -> Wake:
    return Wake(page(first), page(first + count))


def everything(connection: Connection) -> Conversation:
    """All that can be seen of a conversation without changing it."""
    return connection.poll(), connection.fdinfo(), connection.state, connection.outgoing(0)


def counts(connection: Connection) -> tuple[int, int]:
    """Pending and total, as fdinfo says."""
    pending, total, _ = (line.split("\t", 1)[1] for line in connection.fdinfo().splitlines())
    return int(pending), int(total)


@contextmanager
def refused(connection: Connection, errno: int, *mentions: str) -> Iterator[None]:
    """Refused with this number, in a message that mentions these, and nothing has changed."""
    before = everything(connection)
    with pytest.raises(LocalProtocolError) as caught:
        yield
    assert caught.value.errno == errno
    assert caught.value.syscall in {"read(userfaultfd)", "write(userfaultfd)"}
    for mention in mentions:
        assert mention in str(caught.value)
    assert everything(connection) == before


@contextmanager
def nothing_to_read(connection: Connection) -> Iterator[None]:
    before = everything(connection)
    with pytest.raises(BlockingIOError) as caught:
        yield
    assert caught.value.errno == EAGAIN
    assert everything(connection) == before


def shake(connection: Connection, version: int = 0xAA) -> None:
    assert connection.write(word(version)).length == 8
    assert connection.read(8) == word(version)


@pytest.fixture
def fresh() -> Connection:
    return Connection()


@pytest.fixture
def running() -> Connection:
    connection = Connection()
    shake(connection)
    return connection


# -- handshake


def test_h1_a_fresh_descriptor_polls_out_and_cannot_be_read(fresh: Connection) -> None:
    assert fresh.poll() == OUT
    for length in (0, 7, 8, 4096):
        with refused(fresh, EINVAL):
            fresh.read(length)


@pytest.mark.parametrize("length", range(8))
def test_h2_less_than_eight_bytes_are_no_version(fresh: Connection, length: int) -> None:
    with refused(fresh, EINVAL, f"{length} bytes", "64-bit word", "ASK_PROTOCOL"):
        fresh.write(word(0xAA)[:length])


@pytest.mark.parametrize("extra", [b"", b"x", word(0xAB), bytes(100)])
def test_h2_a_version_is_eight_bytes_and_the_rest_is_ignored(fresh: Connection, extra: bytes) -> None:
    written = fresh.write(word(0xAA) + extra)

    assert (written.command, written.length, written.woken) == (Version(0xAA), 8, ())
    assert fresh.read(8) == word(0xAA)


def test_h3_a_known_version_is_acknowledged_and_then_it_runs(fresh: Connection) -> None:
    assert fresh.write(word(0xAA)).length == 8
    assert fresh.poll() == IN
    for length in (0, 7):
        with refused(fresh, EINVAL, f"{length} bytes asked for"):
            fresh.read(length)
    assert fresh.read(8) == word(0xAA)
    assert fresh.state is State.RUNNING
    assert fresh.poll() == 0


@pytest.mark.parametrize("length", [0, 7, 8, 15, 16, 4096])
@pytest.mark.parametrize("version", [0xAA, 0xAB], ids=["h3_acknowledgement", "h6_refusal"])
def test_h3_h6_nothing_can_be_written_while_the_answer_is_unread(fresh: Connection, version: int, length: int) -> None:
    fresh.write(word(version))

    with refused(fresh, EINVAL, "has not been read", fresh.state.name):
        fresh.write(bytes(length))


@pytest.mark.parametrize("version", [0, 1, 0xAB, 0xAA << 8, 1 << 63, (1 << 64) - 1])
def test_h4_another_version_is_refused_by_ones_and_a_known_one_still_works(fresh: Connection, version: int) -> None:
    assert fresh.write(word(version)).length == 8
    assert fresh.poll() == IN
    assert fresh.read(8) == ONES
    assert fresh.poll() == OUT
    shake(fresh)


def test_h5_several_are_refused_in_a_row(fresh: Connection) -> None:
    for version in (1, 2, 2, 3, 0):
        fresh.write(word(version))
        assert fresh.read(8) == ONES
    shake(fresh)


def test_h6_a_write_while_a_refusal_is_unread_is_only_refused(fresh: Connection) -> None:
    fresh.write(word(1))
    with refused(fresh, EINVAL):
        fresh.write(word(0xAA))
    assert fresh.read(8) == ONES
    shake(fresh)


def test_running_cannot_be_renegotiated(running: Connection) -> None:
    with refused(running, EINVAL, "8 bytes", "two 64-bit words"):
        running.write(word(0xAA))


def test_faults_wait_for_the_handshake(fresh: Connection) -> None:
    fresh.fault(page(0) + 5)
    assert (fresh.poll(), counts(fresh)) == (OUT, (1, 1))
    with refused(fresh, EINVAL):
        fresh.read(8)
    fresh.write(word(0xAA))
    assert fresh.poll() == IN
    assert fresh.read(8) == word(0xAA)
    assert fresh.poll() == IN
    assert fresh.read(8) == word(page(0) + 5)


# -- versions


@pytest.mark.parametrize("versions", [[0xAA], [0xAA, 0xAB], (0, 7), {1 << 63}])
def test_every_known_version_is_acknowledged_by_its_own_number(versions: Iterable[int]) -> None:
    known = list(versions)
    for version in known:
        shake(Connection(iter(known)), version)
    unknown = Connection(known)
    unknown.write(word(0xAC))
    assert unknown.read(8) == ONES


def test_without_a_version_every_one_is_refused() -> None:
    connection = Connection(())
    for version in (0, 0xAA, (1 << 64) - 1):
        connection.write(word(version))
        assert connection.read(8) == ONES
    assert connection.poll() == OUT
    assert connection.fdinfo() == "pending:\t0\ntotal:\t0\nprotocols:\t\n"


# -- read


def test_r7_with_nothing_to_read_it_would_block(running: Connection) -> None:
    with nothing_to_read(running):
        running.read(8)
    with nothing_to_read(running):
        running.read(1 << 20)


@pytest.mark.parametrize("length", [-1, 0, 7])
def test_less_than_an_address_is_asked_for(running: Connection, length: int) -> None:
    running.fault(page(0))
    with refused(running, EINVAL, f"{length} bytes asked for", "an address has 8"):
        running.read(length)


def test_r8_a_big_buffer_gets_eight_bytes(running: Connection) -> None:
    running.fault(page(1))
    running.fault(page(2))
    assert running.read(4096) == word(page(1))
    assert running.read(9) == word(page(2))


def test_r9_a_fault_is_reported_once(running: Connection) -> None:
    running.fault(page(0), thread=1)
    running.read(8)
    with nothing_to_read(running):
        running.read(8)


@pytest.mark.parametrize("threads", [(1, 2), (0, 0)], ids=["told_apart", "unknown"])
def test_r10_two_threads_on_one_page_are_two_reads(running: Connection, threads: tuple[int, int]) -> None:
    for thread in threads:
        assert running.fault(page(0), thread)
    assert [running.read(8), running.read(8)] == [word(page(0))] * 2
    assert counts(running) == (0, 2)


@pytest.mark.parametrize("offset", [0, 1, 8, PAGE_SIZE - 1])
def test_r11_an_address_comes_as_it_was_touched(running: Connection, offset: int) -> None:
    running.fault(page(3) + offset)
    assert running.read(8) == word(page(3) + offset)


def test_the_oldest_comes_first(running: Connection) -> None:
    order = [5, 1, 9, 1, 0]
    for number in order:
        running.fault(page(number))
    assert [running.read(8) for _ in order] == [word(page(number)) for number in order]


# -- write


@pytest.mark.parametrize("length", range(16))
def test_w12_fifteen_bytes_are_no_range(running: Connection, length: int) -> None:
    with refused(running, EINVAL, f"{length} bytes", "two 64-bit words"):
        running.write(pages(0).encode()[:length])


@pytest.mark.parametrize("end", [page(1), page(0), 0])
def test_w12_an_empty_or_backward_range_is_erange(running: Connection, end: int) -> None:
    running.fault(page(1))
    running.read(8)
    with refused(running, ERANGE, f"[{page(1):#x}, {end:#x})", "the end is the byte after the last"):
        running.write(Wake(page(1), end).encode())


def test_w13_without_a_waiter_it_is_enoent(running: Connection) -> None:
    with refused(running, ENOENT, f"[{page(0):#x}, {page(4):#x})", "nobody waits", "has been read"):
        running.write(pages(0, 4).encode())


def test_w14_a_waiter_that_is_unread_does_not_count(running: Connection) -> None:
    running.fault(page(0), thread=1)
    with refused(running, ENOENT):
        running.write(pages(0).encode())
    assert running.read(8) == word(page(0))
    assert running.write(pages(0).encode()).woken == (Fault(page(0), 1),)


@pytest.mark.parametrize("offset", [0, 1, PAGE_SIZE - 1])
def test_w15_the_end_is_outside_the_range(running: Connection, offset: int) -> None:
    running.fault(page(5) + offset)
    running.read(8)
    with refused(running, ENOENT):
        running.write(pages(4).encode())
    with refused(running, ENOENT):
        running.write(pages(6).encode())
    with refused(running, EINVAL, "end"):  # a byte further, as the July form allowed
        running.write(Wake(page(4), page(5) + 1).encode())
    assert running.write(pages(4, 2).encode()).length == 16


def test_w15_a_range_begins_with_its_start(running: Connection) -> None:
    running.fault(page(5))
    running.read(8)
    assert running.write(pages(5).encode()).length == 16


def test_w16_one_range_wakes_all_whom_it_covers(running: Connection) -> None:
    faults = [Fault(page(number) + number, thread=number) for number in range(1, 7)]
    for fault in faults:
        running.fault(fault.address, fault.thread)
        running.read(8)
    written = running.write(pages(2, 4).encode())

    assert (written.command, written.length) == (pages(2, 4), 16)
    assert sorted(written.woken, key=lambda fault: fault.address) == faults[1:5]
    assert counts(running) == (0, 2)


def test_w17_a_wake_without_the_page_brings_the_fault_again(running: Connection) -> None:
    for _ in range(3):
        assert running.fault(page(0), thread=1)
        assert running.read(8) == word(page(0))
        assert running.write(pages(0).encode()).woken == (Fault(page(0), 1),)
    assert counts(running) == (0, 0)


def test_w18_the_same_range_twice_is_enoent(running: Connection) -> None:
    running.fault(page(0))
    running.read(8)
    running.write(pages(0).encode())
    with refused(running, ENOENT):
        running.write(pages(0).encode())


def test_w19_a_range_over_unread_faults_wakes_the_read_ones_alone(running: Connection) -> None:
    for thread in (1, 2, 3):
        running.fault(page(0), thread)
    running.read(8)

    assert running.write(pages(0).encode()).woken == (Fault(page(0), 1),)
    assert (counts(running), running.poll()) == ((2, 2), IN)
    running.read(8)
    running.read(8)
    assert running.write(pages(0).encode()).woken == (Fault(page(0), 2), Fault(page(0), 3))


def test_bytes_beyond_the_range_are_ignored(running: Connection) -> None:
    running.fault(page(0))
    running.fault(page(9))
    running.read(8)
    running.read(8)
    written = running.write(pages(0).encode() + pages(9).encode())

    assert (written.length, written.woken) == (16, (Fault(page(0)),))


@pytest.mark.parametrize("command", [Register(page(0), page(9)), Unregister(page(0), page(9))])
def test_registration_wakes_nobody(running: Connection, command: Register | Unregister) -> None:
    running.fault(page(0))
    running.fault(page(1))
    running.read(8)
    before = everything(running)
    written = running.write(command.encode())

    assert (written.command, written.length, written.woken) == (command, 16, ())
    assert everything(running) == before


@pytest.mark.parametrize(
    ("start", "end", "mistake"),
    [(page(0) + 3, page(1), "both register"), (page(0) + 8, page(1), "start"), (page(0), page(1) - 1, "end")],
)
def test_x30_both_bits_and_addresses_between_pages_are_einval(
    running: Connection, start: int, end: int, mistake: str
) -> None:
    running.fault(page(0))
    running.read(8)
    with refused(running, EINVAL, mistake):
        running.write(word(start) + word(end))


def test_a_version_that_cannot_be_one_is_refused_at_once() -> None:
    for version in (-1, 2**64 - 1, 2**64):
        with pytest.raises(ValueError, match="each is a number from 0"):
            Connection([0xAA, version])


def test_a_thread_that_has_gone_on_before_it_was_read_counts_once(running: Connection) -> None:
    running.fault(page(0), thread=1)
    running.fault(page(1), thread=1)  # a signal took it elsewhere, before anybody had read the first

    assert [running.read(8), running.read(8)] == [word(page(0)), word(page(1))]
    assert counts(running) == (0, 1)
    with refused(running, ENOENT):
        running.write(pages(0, 1).encode())
    assert running.write(pages(1, 2).encode()).length == 16


# -- poll and fdinfo


@pytest.mark.parametrize(
    ("unread", "read", "bits"),
    [(0, 0, 0), (1, 0, IN), (3, 0, IN), (0, 1, OUT), (0, 3, OUT), (1, 1, IN | OUT), (2, 2, IN | OUT)],
)
def test_p20_poll_says_what_would_not_block(running: Connection, unread: int, read: int, bits: int) -> None:
    for number in range(read + unread):
        running.fault(page(number), thread=number + 1)
        if number < read:
            running.read(8)
    assert running.poll() == bits
    assert (running.unread, running.read_faults) == (unread, read)


def test_p21_poll_says_out_from_the_read_to_the_wake(running: Connection) -> None:
    running.fault(page(0))
    assert running.poll() == IN
    running.read(8)
    assert running.poll() == OUT
    running.write(pages(0).encode())
    assert running.poll() == 0


def test_f22_one_fault_through_fdinfo(running: Connection) -> None:
    assert counts(running) == (0, 0)
    running.fault(page(0))
    assert counts(running) == (1, 1)
    running.read(8)
    assert counts(running) == (0, 1)
    running.write(pages(0).encode())
    assert counts(running) == (0, 0)


def test_f22_three_faults_two_of_them_read(running: Connection) -> None:
    for number in range(3):
        running.fault(page(number))
    assert counts(running) == (3, 3)
    running.read(8)
    running.read(8)
    assert counts(running) == (1, 3)


@pytest.mark.parametrize(
    ("versions", "shown"),
    [
        ([0xAA], "aa"),
        ([0x1AB, 8, 1, 0xAA], "1 8 aa 1ab"),
        ([7, 7], "7"),
        ([(1 << 64) - 2], "fffffffffffffffe"),
        ([], ""),
    ],
)
def test_f23_fdinfo_shows_the_protocols(versions: list[int], shown: str) -> None:
    assert Connection(versions).fdinfo() == f"pending:\t0\ntotal:\t0\nprotocols:\t{shown}\n"


# -- threads


def test_a_thread_heard_of_again_drops_what_was_read_of_it(running: Connection) -> None:
    """A signal has interrupted it, and it waits elsewhere now."""
    running.fault(page(0), thread=1)
    running.read(8)
    assert running.fault(page(7), thread=1)

    assert (counts(running), running.poll()) == ((1, 1), IN)
    with refused(running, ENOENT):
        running.write(pages(0).encode())
    assert running.read(8) == word(page(7))


def test_a_thread_heard_of_again_at_the_same_place_is_read_again(running: Connection) -> None:
    running.fault(page(0), thread=1)
    running.read(8)
    assert running.fault(page(0), thread=1)

    assert counts(running) == (1, 1)
    assert running.read(8) == word(page(0))
    assert running.write(pages(0).encode()).woken == (Fault(page(0), 1),)


def test_other_threads_and_unknown_ones_are_left_alone(running: Connection) -> None:
    for thread in (1, 2, 0):
        running.fault(page(0), thread)
        running.read(8)
    running.fault(page(1), thread=1)
    running.fault(page(1), thread=0)

    assert counts(running) == (2, 4)
    assert running.write(pages(0).encode()).woken == (Fault(page(0), 2), Fault(page(0), 0))


def test_a_fault_that_is_unread_is_not_told_twice(running: Connection) -> None:
    assert running.fault(page(0) + 5, thread=1)
    assert not running.fault(page(0) + 5, thread=1)
    assert not running.fault(page(0) + 9, thread=1)  # the same page

    assert counts(running) == (1, 1)
    assert running.read(8) == word(page(0) + 5)


def test_an_unread_fault_stays_when_its_thread_is_heard_of_elsewhere(running: Connection) -> None:
    """Whoever has polled must be able to read it."""
    assert running.fault(page(0), thread=1)
    assert running.fault(page(1), thread=1)

    assert [running.read(8), running.read(8)] == [word(page(0)), word(page(1))]


def test_only_who_still_waits_is_retained(running: Connection) -> None:
    for number in range(3):
        running.fault(page(number), thread=number + 1)
    running.read(8)
    running.read(8)
    running.retain(lambda fault: fault.thread == 2)

    assert (counts(running), running.poll()) == ((1, 2), IN | OUT)
    running.retain(lambda fault: False)

    assert (counts(running), running.poll()) == ((1, 1), IN)
    with refused(running, ENOENT):
        running.write(pages(0, 2).encode())
    assert running.read(8) == word(page(2))


# -- from one process to the next


@pytest.mark.parametrize("state", State, ids=lambda state: state.name)
def test_a_conversation_goes_on_where_it_stood(state: State) -> None:
    connection = Connection([0xAA, 0xAB], state=state, version=0xAB)
    connection.fault(page(0))
    answers = {State.ACK_PROTOCOL: word(0xAB), State.ACK_UNKNOWN_PROTOCOL: ONES, State.RUNNING: word(page(0))}

    assert connection.outgoing(0) == answers.get(state)
    if state is State.ASK_PROTOCOL:
        shake(connection)
    else:
        assert connection.read(8) == answers[state]


# -- what is queued


def test_outgoing_is_what_the_next_read_gives(fresh: Connection) -> None:
    assert fresh.outgoing(0) is None
    for version, answer in ((1, ONES), (0xAA, word(0xAA))):
        fresh.write(word(version))
        assert fresh.outgoing(0) == answer == fresh.read(8)
    assert fresh.outgoing(0) is None


def test_outgoing_looks_further_ahead(running: Connection) -> None:
    for number in range(4):
        running.fault(page(number))
    ahead = [running.outgoing(number) for number in range(5)]

    assert ahead == [*(word(page(number)) for number in range(4)), None]
    assert [running.read(8) for _ in range(4)] == ahead[:4]
    assert running.outgoing(0) is None


@pytest.mark.parametrize("version", [0xAA, 0xAB], ids=["acknowledgement", "refusal"])
def test_nothing_goes_out_behind_an_answer(fresh: Connection, version: int) -> None:
    fresh.fault(page(0))
    fresh.write(word(version))

    assert fresh.outgoing(0) is not None
    assert fresh.outgoing(1) is None


def test_looking_changes_nothing(running: Connection) -> None:
    running.fault(page(0))
    before = everything(running)

    assert before == everything(running)
    assert running.read(8) == before[3]


def test_a_connection_says_how_it_stands(running: Connection) -> None:
    running.fault(page(0))
    running.fault(page(1))
    running.read(8)

    assert repr(running) == "<Connection RUNNING unread=1 read=1>"
    assert repr(Connection()) == "<Connection ASK_PROTOCOL unread=0 read=0>"
