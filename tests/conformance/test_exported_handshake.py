"""Exported descriptors: the handshake, over a socket. The numbers are those of the checklist of the protocol."""

from __future__ import annotations

import os
import select
import struct
from errno import EAGAIN, EINVAL
from typing import TYPE_CHECKING

import pytest
from tests.conformance.exported_tools import IN, OUT, REFUSAL, VERSION, make_ground, make_scene  # noqa: F401
from tests.conformance.protocol_tools import sigbus, there, wait_until

from userfault.pager import wire
from userfault.protocol import State

if TYPE_CHECKING:
    from tests.conformance.exported_tools import Ground, Scene, Served

OTHERS = (0, 1, 0xA9, 0xAB, 0xAA << 8, 1 << 63, (1 << 64) - 1)
ANSWERS = {State.ACK_PROTOCOL: VERSION, State.ACK_UNKNOWN_PROTOCOL: REFUSAL}


def word(number: int) -> bytes:
    return struct.pack("=Q", number)


def asked(served: Served, version: bytes, state: State) -> None:
    """Ask for a version, and wait until the worker has heard it."""
    served.program.write(version)
    wait_until(lambda: served.exported.state is state)


def test_exported_item_1_h_a_fresh_one_may_be_written_and_not_be_read(scene: Scene) -> None:
    served = scene.fresh()
    os.set_blocking(served.program.fd, False)

    assert served.program.poll() == OUT
    assert served.exported.state is State.ASK_PROTOCOL
    with pytest.raises(BlockingIOError) as caught:  # a socket's way to say EINVAL
        os.read(served.program.fd, 8)
    assert caught.value.errno == EAGAIN
    assert served.program.poll() == OUT


@pytest.mark.parametrize("length", [0, 1, 7])
def test_exported_item_2_h_a_write_that_is_too_short_changes_nothing(scene: Scene, length: int) -> None:
    served = scene.fresh()

    assert f"{length} bytes: a protocol version is a 64-bit word" in served.refused(EINVAL, VERSION[:length])

    assert served.exported.state is State.ASK_PROTOCOL
    assert served.program.poll() == OUT
    served.program.handshake()


@pytest.mark.parametrize("more", [1, 8, 992, 16000 - 8, 40000])
def test_exported_item_2_h_what_is_written_behind_the_version_is_ignored(scene: Scene, more: int) -> None:
    served = scene.fresh()

    served.program.write(VERSION + bytes(more))

    assert served.program.read() == VERSION
    wait_until(lambda: served.exported.state is State.RUNNING)
    assert served.info.refused == 0


def test_a_version_as_long_as_what_the_worker_parks_is_a_version(scene: Scene) -> None:
    for length in range(15990, 16010):
        served = scene.fresh(1)
        served.program.write(bytes(length))
        assert served.program.read() == REFUSAL
        served.exported.close()


def test_exported_item_3_h_the_version_is_acknowledged(scene: Scene) -> None:
    served = scene.fresh()

    asked(served, VERSION, State.ACK_PROTOCOL)
    served.program.becomes(IN)
    assert os.read(served.program.fd, 8) == VERSION
    wait_until(lambda: served.exported.state is State.RUNNING)

    assert served.program.poll() == 0
    assert served.info.refused == 0


@pytest.mark.parametrize(("version", "state"), [(VERSION, State.ACK_PROTOCOL), (word(5), State.ACK_UNKNOWN_PROTOCOL)])
def test_exported_items_3_and_6_h_a_write_while_the_answer_is_unread_is_refused(
    scene: Scene, version: bytes, state: State
) -> None:
    served = scene.fresh()
    asked(served, version, state)

    for data in (VERSION, word(7), bytes(16), b"", b"\xff" * 5000):
        assert "has not been read" in served.refused(EINVAL, data)
        assert served.exported.state is state
        served.program.becomes(IN)

    assert served.program.read() == ANSWERS[state]
    assert served.info.refused == 5
    if state is State.ACK_UNKNOWN_PROTOCOL:
        served.program.becomes(OUT)
        served.program.handshake()


def test_exported_item_4_h_another_version_is_refused_in_the_answer(scene: Scene) -> None:
    served = scene.fresh()

    asked(served, word(0xAB), State.ACK_UNKNOWN_PROTOCOL)
    served.program.becomes(IN)
    assert os.read(served.program.fd, 8) == REFUSAL
    served.program.becomes(OUT)

    assert served.exported.state is State.ASK_PROTOCOL
    assert served.info.refused == 0, "that is no error"
    served.program.handshake()


def test_exported_item_5_h_many_versions_are_refused_and_then_one_is_not(scene: Scene) -> None:
    served = scene.fresh()

    for version in OTHERS * 3:
        served.program.write(word(version))
        assert served.program.read() == REFUSAL

    served.program.handshake()
    (touch,) = served.touch(0)
    served.program.answer(served.program.fault(), 9)
    assert touch.result() == there(9)


def test_versions_that_nobody_waits_for_are_not_answered(scene: Scene) -> None:
    """The second is written while the answer to the first is unread, or on its way: a socket takes it all the same."""
    served = scene.fresh()

    for _ in range(30):
        served.program.write(word(1))
    wait_until(lambda: served.info.refused == 29)

    assert served.program.read() == REFUSAL
    served.program.becomes(OUT)
    served.program.handshake()


def test_faults_before_the_handshake_wait_for_it(scene: Scene) -> None:
    """The proposal blocks them from the registration on, and shows them in no poll before RUNNING."""
    served = scene.fresh()
    touches = served.touch(0, 1)
    assert served.program.poll() == OUT
    assert served.info.waiting == (2, 2)

    served.program.write(word(3))
    assert served.program.read() == REFUSAL
    served.program.becomes(OUT)
    served.program.handshake()
    served.program.becomes(IN)

    for byte in (1, 2):
        served.program.answer(served.program.fault(), byte)
    assert sorted(touch.result().byte for touch in touches) == [1, 2]


def test_faults_of_the_descriptor_before_it_was_exported_are_told(scene: Scene) -> None:
    """One that was read there, and one that was not."""
    address = scene.mapped(scene.file(2), 2)
    descriptor = scene.registered(address, 2)
    assert descriptor.handshake()
    touches = scene.stage.start_reads(descriptor, [address, address + scene.stage.page])
    read = scene.stage.fault(descriptor)

    served = scene.served(descriptor.export(pager=scene.pager))
    served.program.handshake()
    found = [served.program.fault(), served.program.fault()]

    assert read in found
    assert sorted(found) == [address, address + scene.stage.page]
    for told in found:
        served.program.answer(told, 3)
    assert [touch.result() for touch in touches] == [there(3)] * 2


def test_exported_item_23_fdinfo_shows_the_protocol_and_where_it_stands(scene: Scene) -> None:
    served = scene.fresh()
    assert served.exported.fdinfo() == (
        "pending:\t0\ntotal:\t0\nprotocols:\taa\nstate:\tASK_PROTOCOL\nanswered:\t0\nrefused:\t0\n"
    )
    served.program.handshake()
    wait_until(lambda: "state:\tRUNNING\n" in served.exported.fdinfo())
    served.refused(EINVAL, b"")
    assert served.exported.fdinfo() == (
        "pending:\t0\ntotal:\t0\nprotocols:\taa\nstate:\tRUNNING\nanswered:\t0\nrefused:\t1\n"
        "refusal:\twrite(userfaultfd): [Errno 22] Invalid argument: "
        "0 bytes: a range is two 64-bit words, [start, end)\n"
    )


def test_exported_item_28_l_the_descriptor_is_private_and_blocks(scene: Scene) -> None:
    served = scene.fresh()
    assert not os.get_inheritable(served.exported.fileno())
    assert not os.get_inheritable(served.exported.memory_fd)
    assert os.get_blocking(served.exported.fileno())


def test_exported_item_28_l_a_program_may_have_it_not_block(scene: Scene) -> None:
    served = scene.running()
    os.set_blocking(served.program.fd, False)
    with pytest.raises(BlockingIOError):
        os.read(served.program.fd, 8)

    (touch,) = served.touch(3)
    served.program.answer(served.program.fault(), 4)
    assert touch.result() == there(4)

    os.set_blocking(served.program.fd, True)
    assert served.info.refused == 0


def test_a_blocking_read_waits_for_a_fault(scene: Scene) -> None:
    served = scene.running()
    reading = scene.stage.call(os.read, served.program.fd, 8)
    touch = scene.stage.start_read(served.at(2))

    served.program.answer(int.from_bytes(reading.result(), "little"), 5)
    assert touch.result() == there(5)


def test_the_worker_rests_when_nobody_asks_anything(scene: Scene, ground: Ground) -> None:
    fresh, running = scene.fresh(), scene.running()
    running.touch(0, 1)
    running.program.fault()
    asked(fresh, VERSION, State.ACK_PROTOCOL)
    assert ground.rests(0.3)
    running.exported.close()


# -- renew: another program, the same descriptor --------------------------------------------------------------------


@pytest.mark.parametrize("state", list(State), ids=lambda state: state.name)
def test_another_program_begins_with_the_handshake(scene: Scene, state: State) -> None:
    served = scene.fresh()
    if state is State.RUNNING:
        served.program.handshake()
    elif state is not State.ASK_PROTOCOL:
        asked(served, VERSION if state is State.ACK_PROTOCOL else word(5), state)

    served.exported.renew()

    assert served.exported.state is State.ASK_PROTOCOL
    assert served.program.poll() == OUT
    served.program.write(word(6))
    assert served.program.read() == REFUSAL
    served.program.handshake()
    (touch,) = served.touch(0)
    served.program.answer(served.program.fault(), 8)
    assert touch.result() == there(8)
    assert served.info.refused == 0


def test_another_program_is_told_of_every_fault_that_is_not_resolved(scene: Scene) -> None:
    served = scene.running(4)
    answered, *touches = served.touch(0, 1, 2, 3)
    served.program.answer(served.program.fault(), 1)
    assert answered.result() == there(1)
    read = served.program.fault()
    served.waiting(2, 3)

    served.exported.renew()
    served.waiting(3, 3)
    assert served.info.answered == 1
    served.program.handshake()

    found = [served.program.fault() for _ in touches]
    assert read in found
    assert sorted(found) == [served.at(1), served.at(2), served.at(3)]
    served.waiting(0, 3)
    for page in (1, 2, 3):
        served.program.put(page, page + 1)
    served.program.announce(0, 4)
    assert [touch.result().byte for touch in touches] == [2, 3, 4]


def test_what_the_former_program_wrote_last_is_forgotten(scene: Scene) -> None:
    """Its writes may still lie in the socket: empty ones, ranges, and more than the worker has room to park behind."""
    for _ in range(30):
        served = scene.running(1)
        for data in (b"", bytes(16), b"", VERSION, bytes(1000)):
            served.program.write(data)
        served.exported.renew()
        refused = served.info.refused
        served.program.handshake()
        assert served.info.refused == refused
        served.exported.close()


def test_renewing_often_loses_nothing(scene: Scene) -> None:
    served = scene.fresh(2)
    touches = served.touch(0, 1)
    for number in range(100):
        if number % 4:
            served.program.handshake()
        if number % 4 > 1:
            served.program.fault()
        if number % 4 > 2:
            served.program.fault()
        served.exported.renew()
        assert served.program.poll() == OUT
    served.program.handshake()
    for _ in touches:
        served.program.answer(served.program.fault(), 6)
    assert [touch.result() for touch in touches] == [there(6)] * 2


def test_a_closed_one_cannot_be_renewed(scene: Scene) -> None:
    served = scene.running()
    served.exported.close()
    for call in (served.exported.renew, served.exported.fileno):
        with pytest.raises(ValueError, match="is closed"):
            call()
    assert served.exported.state is State.RUNNING, "its last"
    assert scene.stage.read(served.at(0)) == sigbus(served.at(0))


def test_a_socket_that_is_no_exported_descriptor_is_left_alone_by_drain() -> None:
    """`wire.drain` must end, also where a socket has been shut down and every recv returns nothing at once."""
    one, other = wire.pair()
    with one, other:
        for data in (b"", b"x", b""):
            one.send(data)
        wire.drain(other)
        assert not select.select([other], [], [], 0)[0]
        one.shutdown(2)
        wire.drain(other)
        wire.hang_up(one)
