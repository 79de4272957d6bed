"""The protocol's machine against a model that was written straight from the specification's tables.

Whatever is written, and however much is asked for, gives a documented result (8 or 16 from a write, 8 bytes from a
read, EINVAL, ERANGE or ENOENT as `LocalProtocolError`, EAGAIN as `BlockingIOError`, and nothing else), a refusal
changes nothing, and a handshake that was possible is possible afterwards, with faults that flow.

No kernel, no process and no clock takes part: `USERFAULT_PROTOCOL_SEED` repeats a long run exactly.
"""

from __future__ import annotations

import os
import random
import select
import sys
from collections import Counter
from errno import EAGAIN, EINVAL, ENOENT, ERANGE, errorcode
from typing import TypeAlias, TypedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from userfault.errors import LocalProtocolError
from userfault.kernel.memory import PAGE_SIZE
from userfault.protocol.connection import Connection, Written
from userfault.protocol.messages import Fault, Wake
from userfault.protocol.states import State

SEED = "USERFAULT_PROTOCOL_SEED"
Result: TypeAlias = int | bytes | str  # a length, what was read, the name of an errno

TOP = (1 << 64) - 1
LAST = TOP & -PAGE_SIZE
BASE = 0x7F00_0000_0000
# Pages side by side, and the first and the last there are.
PAGES = [0, *range(BASE, BASE + 6 * PAGE_SIZE, PAGE_SIZE), LAST - PAGE_SIZE, LAST]
OFFSETS = [0, 1, 5, PAGE_SIZE // 2, PAGE_SIZE - 1]
CROOKED = [0, 4, 8, PAGE_SIZE // 2, PAGE_SIZE - 4]
NUMBERS = [0xAA, 0xAB, 0, 1, TOP - 1, TOP]
KNOWN: list[tuple[int, ...]] = [(0xAA,), (0xAA,), (0xAA, 0xAB), (0, TOP - 1), ()]
LENGTHS = [8, 8, 8, 8, 16, 4096, 9, 7, 1, 0, -1]


def word(number: int) -> bytes:
    return number.to_bytes(8, sys.byteorder)


def two_words(start: int, end: int) -> bytes:
    return word(start) + word(end)


# -- the model


class Row(TypedDict):
    """A thread that is stopped."""

    address: int
    thread: int
    read: bool


class Model:
    """A descriptor as the specification's tables have it: a state's name, and a row for each fault, oldest first."""

    def __init__(self, versions: tuple[int, ...]) -> None:
        self.versions = versions
        self.state = "ASK_PROTOCOL"
        self.answer = b""
        self.rows: list[Row] = []

    def write(self, data: bytes) -> tuple[Result, list[tuple[int, int]]]:
        """Sections 6.1 and 6.3, line by line. Return what write() gives, and who is woken."""
        start, end = (int.from_bytes(data[place : place + 8], sys.byteorder) for place in (0, 8))
        covered = [row for row in self.rows if row["read"] and start <= row["address"] < end]
        tables: dict[str, list[tuple[bool, Result]]] = {
            "ASK_PROTOCOL": [(len(data) < 8, "EINVAL"), (True, 8)],
            "RUNNING": [
                (len(data) < 16, "EINVAL"),
                (start % PAGE_SIZE > 3, "EINVAL"),
                (start % 4 == 3, "EINVAL"),
                (end % PAGE_SIZE > 0, "EINVAL"),
                (start // PAGE_SIZE >= end // PAGE_SIZE, "ERANGE"),
                (start % 4 > 0, 16),
                (not covered, "ENOENT"),
                (True, 16),
            ],
        }
        table = tables.get(self.state, [(True, "EINVAL")])
        result = next(result for applies, result in table if applies)
        if result == 8:
            known = start in self.versions
            self.state = "ACK_PROTOCOL" if known else "ACK_UNKNOWN_PROTOCOL"
            self.answer = data[:8] if known else b"\xff" * 8
        woken = covered if result == 16 and start % 4 == 0 else []
        self.rows = [row for row in self.rows if row not in woken]
        return result, [(row["address"], row["thread"]) for row in woken]

    def read(self, length: int) -> Result:
        """Section 5, and the handshake's half of section 4."""
        if length < 8 or self.state == "ASK_PROTOCOL":
            return "EINVAL"
        if self.state != "RUNNING":
            self.state = {"ACK_PROTOCOL": "RUNNING", "ACK_UNKNOWN_PROTOCOL": "ASK_PROTOCOL"}[self.state]
            return self.answer
        for row in self.rows:
            if not row["read"]:
                row["read"] = True
                if row["thread"] and any(other["thread"] == row["thread"] for other in self.unread()):
                    self.rows.remove(row)  # it has gone on, and waits elsewhere
                return word(row["address"])
        return "EAGAIN"

    def fault(self, address: int, thread: int) -> bool:
        """Our own rules for a kernel that tells things twice."""
        self.rows = [row for row in self.rows if not (row["read"] and row["thread"] == thread) or not thread]
        for row in self.rows if thread else []:
            same_page = row["address"] // PAGE_SIZE == address // PAGE_SIZE
            if not row["read"] and row["thread"] == thread and same_page:
                return False
        self.rows.append({"address": address, "thread": thread, "read": False})
        return True

    def forget(self) -> None:
        self.rows = self.unread()

    def unread(self) -> list[Row]:
        return [row for row in self.rows if not row["read"]]

    def poll(self) -> int:
        """Section 4's last column, and section 7."""
        if self.state != "RUNNING":
            return select.POLLOUT if self.state == "ASK_PROTOCOL" else select.POLLIN
        return sum({select.POLLOUT if row["read"] else select.POLLIN for row in self.rows})

    def fdinfo(self) -> str:
        """Section 8."""
        known = [f"{version:x}" for version in sorted(self.versions)]
        lines = {"pending": len(self.unread()), "total": len(self.rows), "protocols": " ".join(known)}
        return "".join(f"{name}:\t{value}\n" for name, value in lines.items())

    def next_reads(self) -> list[bytes]:
        if self.state != "RUNNING":
            return [] if self.state == "ASK_PROTOCOL" else [self.answer]
        return [word(row["address"]) for row in self.unread()]


# -- both at once


def name_of(error: OSError, *documented: int) -> str:
    assert error.errno in documented
    return errorcode[error.errno]


def result_of_write(connection: Connection, data: bytes) -> Written | str:
    try:
        return connection.write(data)
    except LocalProtocolError as error:
        return name_of(error, EINVAL, ERANGE, ENOENT)


def result_of_read(connection: Connection, length: int) -> bytes | str:
    try:
        return connection.read(length)
    except LocalProtocolError as error:
        return name_of(error, EINVAL)
    except BlockingIOError as error:
        return name_of(error, EAGAIN)


class Pair:
    """The machine and its model: everything is done to both, and both must say the same."""

    def __init__(self, versions: tuple[int, ...]) -> None:
        self.versions = versions
        self.machine = Connection(versions)
        self.model = Model(versions)
        self.results: Counter[str] = Counter()

    def write(self, data: bytes) -> None:
        expected, woken = self.model.write(data)
        actual = result_of_write(self.machine, data)
        if isinstance(actual, Written):
            assert [(fault.address, fault.thread) for fault in actual.woken] == woken
            assert data.startswith(actual.command.encode())
            actual = str(actual.length)
        assert actual == str(expected)
        self.results[f"write {actual}"] += 1

    def read(self, length: int) -> None:
        expected = self.model.read(length)
        actual = result_of_read(self.machine, length)
        assert actual == expected
        self.results[f"read {actual if isinstance(actual, str) else len(actual)}"] += 1

    def fault(self, address: int, thread: int) -> None:
        told = self.machine.fault(address, thread)
        assert told == self.model.fault(address, thread)
        self.results[f"fault {told}"] += 1

    def forget(self) -> None:
        self.machine.retain(lambda fault: False)
        self.model.forget()

    def restart(self) -> None:
        """Another pager, and with it another conversation."""
        self.machine, self.model = Connection(self.model.versions), Model(self.model.versions)

    def shake_hands(self) -> None:
        """Bring both to RUNNING, if a version is known."""
        if self.model.state.startswith("ACK"):
            self.read(8)
        if self.model.state == "ASK_PROTOCOL":
            for version in self.versions[:1]:
                self.write(word(version))
                self.read(8)

    def cover(self) -> None:
        """Write a range over all pages but the last: its end is no number of 64 bits, so that no range covers it."""
        self.write(two_words(0, LAST))

    def compare(self) -> None:
        machine, model = self.machine, self.model
        assert machine.state.name == model.state
        assert machine.poll() == model.poll()
        assert machine.fdinfo() == model.fdinfo()
        ahead = model.next_reads()
        assert [machine.outgoing(number) for number in range(len(ahead))] == ahead
        assert machine.outgoing(len(ahead)) is None


class ConversationMachine(RuleBasedStateMachine):
    """One conversation, in any order that a pager and its memory can think of."""

    @initialize(versions=st.sampled_from(KNOWN), running=st.booleans())
    def open(self, versions: tuple[int, ...], running: bool) -> None:
        self.pair = Pair(versions)
        if running:
            self.pair.shake_hands()

    @precondition(lambda self: self.pair.model.state != "RUNNING")
    @rule()
    def shake_hands(self) -> None:
        self.pair.shake_hands()

    @rule(number=st.sampled_from(NUMBERS), extra=st.binary(max_size=9))
    def ask(self, number: int, extra: bytes) -> None:
        self.pair.write(word(number) + extra)

    @rule(length=st.one_of(st.just(8), st.sampled_from(LENGTHS), st.integers(-1, 1 << 40)))
    def read(self, length: int) -> None:
        self.pair.read(length)

    @rule(page=st.sampled_from(PAGES), offset=st.sampled_from(OFFSETS), thread=st.integers(0, 4))
    def fault(self, page: int, offset: int, thread: int) -> None:
        self.pair.fault(page + offset, thread)

    @rule(start=st.sampled_from(PAGES), end=st.sampled_from(PAGES), extra=st.binary(max_size=2))
    def wake(self, start: int, end: int, extra: bytes) -> None:
        self.pair.write(two_words(start, end) + extra)

    @rule(start=st.sampled_from(PAGES), end=st.sampled_from(PAGES), bits=st.integers(1, 3))
    def register(self, start: int, end: int, bits: int) -> None:
        self.pair.write(two_words(start | bits, end))

    @rule(page=st.sampled_from(PAGES), start=st.sampled_from(CROOKED), bits=st.integers(0, 3), end=st.integers(0, 5))
    def crooked(self, page: int, start: int, bits: int, end: int) -> None:
        self.pair.write(two_words(page + start + bits, min(page + PAGE_SIZE + end, TOP)))

    @rule()
    def cover(self) -> None:
        self.pair.cover()

    @rule(data=st.binary(max_size=15))
    def short(self, data: bytes) -> None:
        self.pair.write(data)

    @rule()
    def forget(self) -> None:
        self.pair.forget()

    @rule()
    def restart(self) -> None:
        self.pair.restart()

    @invariant()
    def both_say_the_same(self) -> None:
        self.pair.compare()


def test_the_machine_does_what_the_tables_say(soak: bool) -> None:
    run_state_machine_as_test(
        ConversationMachine,
        settings=settings(max_examples=2000 if soak else 150, stateful_step_count=100 if soak else 50, deadline=None),
    )


# -- nonsense

numbers = st.one_of(
    st.sampled_from([*NUMBERS, *PAGES]),
    st.builds(int.__or__, st.sampled_from(PAGES), st.integers(0, 8)),
    st.integers(0, TOP),
)
nonsense = st.one_of(
    st.binary(max_size=40),
    st.builds(
        bytes.__add__, st.lists(numbers, max_size=3).map(lambda all_: b"".join(map(word, all_))), st.binary(max_size=9)
    ),
)
Operation: TypeAlias = tuple[str, bytes] | tuple[str, int]
operations: st.SearchStrategy[list[Operation]] = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["write", "dribble"]), nonsense),
        st.tuples(st.just("read"), st.one_of(st.just(8), st.integers(-(1 << 63), 1 << 63))),
        st.tuples(st.just("fault"), st.integers(0, TOP)),
    ),
    max_size=25,
)


def look(connection: Connection) -> tuple[State, int, str, bytes | None]:
    return connection.state, connection.poll(), connection.fdinfo(), connection.outgoing(0)


def write_whole(connection: Connection, data: bytes) -> None:
    before = look(connection)
    result = result_of_write(connection, data)
    if isinstance(result, Written):
        assert result.length == (8 if before[0] is State.ASK_PROTOCOL else 16) <= len(data)
    else:
        assert look(connection) == before


def write_byte_by_byte(connection: Connection, data: bytes) -> None:
    """A write is a command, and not a part of a stream."""
    before = look(connection)
    for number in range(len(data)):
        assert result_of_write(connection, data[number : number + 1]) == "EINVAL"
    assert look(connection) == before


def read_any(connection: Connection, length: int) -> None:
    before = look(connection)
    result = result_of_read(connection, length)
    if isinstance(result, bytes):
        assert len(result) == 8 <= length
        assert result == before[3]
    else:
        assert look(connection) == before


def assert_usable(connection: Connection, known: int | None) -> None:
    """Shake hands, unless that has been done; then have a fault read, and woken."""
    if connection.state in {State.ACK_PROTOCOL, State.ACK_UNKNOWN_PROTOCOL}:
        connection.read(8)
    if connection.state is State.ASK_PROTOCOL:
        assert connection.write(word(0xAA if known is None else known)).length == 8
        assert connection.read(8) == (b"\xff" * 8 if known is None else word(known))
    if known is None:
        assert connection.state is State.ASK_PROTOCOL
        return
    assert connection.fault(BASE + 5, thread=99)
    read = [connection.read(8) for _ in range(connection.unread)]
    assert read[-1] == word(BASE + 5)
    assert Fault(BASE + 5, 99) in connection.write(Wake(BASE, BASE + PAGE_SIZE).encode()).woken


@given(versions=st.sampled_from(KNOWN), running=st.booleans(), todo=operations)
@settings(max_examples=500, deadline=None)
def test_nonsense_is_answered_and_does_no_harm(versions: tuple[int, ...], running: bool, todo: list[Operation]) -> None:
    connection = Connection(versions)
    known = versions[0] if versions else None
    if running and known is not None:
        connection.write(word(known))
        connection.read(8)
    for what, value in todo:
        if isinstance(value, bytes):
            (write_whole if what == "write" else write_byte_by_byte)(connection, value)
        elif what == "read":
            read_any(connection, value)
        else:
            connection.fault(value)
    assert_usable(connection, known)


# -- a long run


def act(pair: Pair, rng: random.Random) -> None:
    """Do one thing at random."""
    start, end = rng.choice(PAGES), rng.choice(PAGES)
    chance = rng.random()
    if chance < 0.20:
        pair.fault(start + rng.choice(OFFSETS), rng.randrange(7))
    elif chance < 0.55:
        pair.read(rng.choice(LENGTHS))
    elif chance < 0.70:
        pair.write(two_words(start, end))
    elif chance < 0.75:
        pair.write(two_words(start | rng.randrange(4), end))
    elif chance < 0.80:
        pair.write(two_words(start + rng.choice(CROOKED) + rng.randrange(4), min(end + rng.randrange(5), TOP)))
    elif chance < 0.83:
        pair.write(rng.randbytes(rng.randrange(40)))
    elif chance < 0.87:
        pair.write(word(rng.choice(NUMBERS)))
    elif chance < 0.93:
        pair.cover()
    elif chance < 0.94:
        pair.forget()
    elif chance < 0.945:
        pair.restart()
    else:
        pair.shake_hands()
    pair.compare()


@pytest.fixture
def rng() -> random.Random:
    """The randomness of a run; its seed is printed, so that a failure shows it."""
    seed = int(os.environ.get(SEED) or random.SystemRandom().randrange(1 << 32))
    print(f"{SEED}={seed}")
    return random.Random(seed)


def test_a_long_run_never_leaves_the_model(rng: random.Random, soak: bool) -> None:
    results: Counter[str] = Counter()
    operations_left = 1_000_000 if soak else 10_000
    while operations_left > 0:
        pair = Pair(rng.choice(KNOWN))
        life = min(rng.randrange(1, 500), operations_left)
        operations_left -= life
        for _ in range(life):
            act(pair, rng)
        results += pair.results
    assert results.keys() == {
        "write 8",
        "write 16",
        "write EINVAL",
        "write ERANGE",
        "write ENOENT",
        "read 8",
        "read EINVAL",
        "read EAGAIN",
        "fault True",
        "fault False",
    }
