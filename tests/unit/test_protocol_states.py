"""The table of a conversation: what the specification says, what the machine does, and the picture of it."""

from __future__ import annotations

import select
from errno import EINVAL
from itertools import product

import pytest

from userfault.errors import LocalProtocolError
from userfault.kernel.memory import PAGE_SIZE
from userfault.protocol.connection import Connection
from userfault.protocol.messages import Acknowledgement, Fault, Refusal, Register, Version, Wake
from userfault.protocol.states import POLL, TRANSITIONS, State, Step, diagram, poll_bits

ASK, ACK, ACK_UNKNOWN, RUNNING = State
KNOWN, UNKNOWN = Version(0xAA), Version(0xAB)
PAGE = 0x7F00_0000_0000

# Section 4 of the specification, once more and by hand.
SPECIFIED = {
    (ASK, Step.KNOWN): ACK,
    (ASK, Step.UNKNOWN): ACK_UNKNOWN,
    (ACK, Step.READ): RUNNING,
    (ACK_UNKNOWN, Step.READ): ASK,
    (RUNNING, Step.READ): RUNNING,
    (RUNNING, Step.RANGE): RUNNING,
}
# Before the handshake two words are no range: the first is a version, and the second is ignored.
NO_STEP = {(ASK, Step.RANGE)}
REFUSED = [pair for pair in product(State, Step) if pair not in SPECIFIED and pair not in NO_STEP]


def name(value: State | Step) -> str:
    return value.name


def connection_in(state: State) -> Connection:
    """A connection that has come to this state as a pager brings it there."""
    connection = Connection()
    if state is ACK_UNKNOWN:
        connection.write(UNKNOWN.encode())
    elif state is not ASK:
        connection.write(KNOWN.encode())
        if state is RUNNING:
            connection.read(8)
            connection.fault(PAGE)
    assert connection.state is state
    return connection


def take(connection: Connection, step: Step) -> int | bytes:
    """Do what the pager does, and return what the call returns."""
    if step is Step.READ:
        return connection.read(8)
    word = UNKNOWN if step is Step.UNKNOWN else KNOWN
    data = Register(PAGE, PAGE + PAGE_SIZE).encode() if step is Step.RANGE else word.encode()
    return connection.write(data).length


RESULTS: dict[tuple[State, Step], int | bytes] = {
    (ASK, Step.KNOWN): 8,
    (ASK, Step.UNKNOWN): 8,
    (ACK, Step.READ): Acknowledgement(KNOWN.number).encode(),
    (ACK_UNKNOWN, Step.READ): Refusal().encode(),
    (RUNNING, Step.READ): Fault(PAGE).encode(),
    (RUNNING, Step.RANGE): 16,
}


def test_the_table_is_the_specification() -> None:
    assert dict(TRANSITIONS) == SPECIFIED


@pytest.mark.parametrize(("state", "step"), SPECIFIED, ids=name)
def test_a_step_in_the_table_goes_where_it_says(state: State, step: Step) -> None:
    connection = connection_in(state)

    assert take(connection, step) == RESULTS[state, step]
    assert connection.state is SPECIFIED[state, step]


@pytest.mark.parametrize(("state", "step"), REFUSED, ids=name)
def test_a_step_outside_the_table_is_refused_and_changes_nothing(state: State, step: Step) -> None:
    connection = connection_in(state)
    before = (connection.poll(), connection.fdinfo(), connection.outgoing(0))

    with pytest.raises(LocalProtocolError) as caught:
        take(connection, step)

    assert caught.value.errno == EINVAL
    assert connection.state is state
    assert (connection.poll(), connection.fdinfo(), connection.outgoing(0)) == before


def test_a_range_written_first_is_a_version() -> None:
    connection = connection_in(ASK)

    assert take(connection, Step.RANGE) == 8
    assert connection.state is ACK_UNKNOWN


def test_a_wake_is_a_range_too() -> None:
    connection = connection_in(RUNNING)
    connection.read(8)

    assert connection.write(Wake(PAGE, PAGE + PAGE_SIZE).encode()).length == 16
    assert connection.state is RUNNING


def test_running_is_the_end() -> None:
    assert {after for (before, _), after in TRANSITIONS.items() if before is RUNNING} == {RUNNING}


def test_every_state_is_reached_and_has_a_way_on() -> None:
    assert {after for _, after in TRANSITIONS.items()} == set(State)
    assert {before for before, _ in TRANSITIONS} == set(State)


def test_the_numbers_are_the_proposals() -> None:
    assert {state.name: state.value for state in State} == {
        "ASK_PROTOCOL": 0,
        "ACK_PROTOCOL": 1,
        "ACK_UNKNOWN_PROTOCOL": 2,
        "RUNNING": 3,
    }


def test_poll_promises_what_the_table_allows() -> None:
    assert POLL.keys() == set(State) - {RUNNING}
    for state, bits in POLL.items():
        assert bool(bits & select.POLLIN) == ((state, Step.READ) in TRANSITIONS)
        assert bool(bits & select.POLLOUT) == any(
            (state, step) in TRANSITIONS for step in Step if step is not Step.READ
        )
        assert bits == connection_in(state).poll()


@pytest.mark.parametrize("unread", [0, 1, 7])
@pytest.mark.parametrize("read", [0, 1, 7])
def test_poll_while_running_depends_on_the_faults_alone(unread: int, read: int) -> None:
    bits = {(False, False): 0, (True, False): select.POLLIN, (False, True): select.POLLOUT}

    assert poll_bits(unread, read) == bits.get((unread > 0, read > 0), select.POLLIN | select.POLLOUT)


def test_the_diagram_shows_every_transition() -> None:
    lines = diagram().splitlines()

    assert lines[0] == "stateDiagram-v2"
    assert lines[1].split() == ["[*]", "-->", "ASK_PROTOCOL"]
    assert len(lines) == 2 + len(SPECIFIED)
    for (before, step), after in SPECIFIED.items():
        assert f"    {before.name} --> {after.name}: {step.value}" in lines
