"""What the processes of a pager say to each other: packets whole, descriptors private, nonsense refused."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from userfault.pager import wire
from userfault.pager.wire import HEAD, MAX_FDS, MAX_MESSAGE, Message

u8, u64 = st.integers(0, 255), st.integers(0, (1 << 64) - 1)
NUMBERS = {name: value for name, value in vars(wire).items() if name.isupper() and isinstance(value, int)}


def same(left: Message, right: Message) -> bool:
    names = [name for name in Message.__slots__ if name != "fds"]
    return all(getattr(left, name) == getattr(right, name) for name in names)


@given(kind=u8, flags=u8, id_=u64, region=u64, a=u64, b=u64, text=st.binary(max_size=300))
def test_a_message_comes_out_as_it_went_in(
    kind: int, flags: int, id_: int, region: int, a: int, b: int, text: bytes
) -> None:
    message = Message(kind, id_, region, a, b, flags=flags, text=text)
    data = message.encode()
    assert len(data) == HEAD.size + len(text)
    assert same(wire.decode(data), message)


def test_the_head_is_forty_bytes_without_holes() -> None:
    assert HEAD.size == 40
    head = Message(1, 0x0102030405060708, 2, 3, 4, flags=9).encode()
    assert head[:8] == bytes([1, 9, 0, 0, 0, 0, 0, 0])
    assert int.from_bytes(head[8:16], "little") == 0x0102030405060708


def test_a_truncated_packet_is_refused() -> None:
    data = Message(wire.OPEN, 1, 2, 3, 4).encode()
    for length in range(HEAD.size):
        with pytest.raises(ValueError, match=f"packet of {length} bytes"):
            wire.decode(data[:length])


def test_kinds_have_numbers_of_their_own() -> None:
    numbers = [
        NUMBERS[name]
        for name in NUMBERS
        if name
        not in {"WRITE", "NO_ANSWER", "FORCE", "WRITTEN", "SEQUENTIAL", "MAX_MESSAGE", "MAX_FDS", "EXPORT_FDS", "TRIES"}
    ]
    assert len(set(numbers)) == len(numbers) >= 16
    assert all(0 < number < 256 for number in numbers)
    assert wire.WRITE & wire.NO_ANSWER == wire.FORCE & wire.WRITTEN == 0


def test_numbers_that_do_not_fit_are_refused_here_not_there() -> None:
    with pytest.raises(Exception, match=r"argument|range|format"):
        Message(wire.OPEN, a=1 << 64).encode()
    with pytest.raises(Exception, match=r"argument|range|format"):
        Message(wire.OPEN, a=-1).encode()


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = wire.pair()
    with left, right:
        yield left, right


def test_both_ends_are_private_and_keep_packets_whole(ends: tuple[socket.socket, socket.socket]) -> None:
    left, right = ends
    for end in ends:
        assert end.type == socket.SOCK_SEQPACKET
        assert not end.get_inheritable()
    for number in range(50):
        wire.send(left, Message(wire.OK, number, text=b"x" * number))
    for number in range(50):
        message = wire.receive(right)
        assert message is not None
        assert (message.id, message.text) == (number, b"x" * number)


def test_descriptors_arrive_with_their_message_and_close_on_exec(ends: tuple[socket.socket, socket.socket]) -> None:
    left, right = ends
    pipe = os.pipe()
    wire.send(left, Message(wire.KEEP, region=7, fds=pipe))
    wire.send(left, Message(wire.DROP, region=7))
    for fd in pipe:
        os.close(fd)
    message, bare = wire.receive(right), wire.receive(right)
    assert message is not None
    assert bare is not None
    assert bare.fds == ()
    assert len(message.fds) == 2
    assert all(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in message.fds)
    os.write(message.fds[1], b"through")
    assert os.read(message.fds[0], 10) == b"through"
    for fd in message.fds:
        os.close(fd)


def test_more_descriptors_than_agreed_do_not_leak_and_none_arrives(ends: tuple[socket.socket, socket.socket]) -> None:
    left, right = ends
    before = len(os.listdir("/proc/self/fd"))
    null = os.open(os.devnull, os.O_RDONLY)
    socket.send_fds(left, [Message(wire.KEEP).encode()], [null] * (MAX_FDS + 4))
    os.close(null)
    message = wire.receive(right)
    assert message is not None
    assert message.fds == ()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_packet_that_is_too_long_is_refused(ends: tuple[socket.socket, socket.socket]) -> None:
    left, right = ends
    wire.send(left, Message(wire.FAILED, text=bytes(MAX_MESSAGE)))
    with pytest.raises(ValueError, match="cut off"):
        wire.receive(right)


def test_the_end_of_the_other_side_is_none(ends: tuple[socket.socket, socket.socket]) -> None:
    left, right = ends
    wire.send(left, Message(wire.BYE))
    left.close()
    message = wire.receive(right)
    assert message is not None
    assert message.kind == wire.BYE
    assert wire.receive(right) is None
    assert wire.receive(right) is None


def test_a_reset_is_the_end_too(ends: tuple[socket.socket, socket.socket]) -> None:
    left, right = ends
    wire.send(right, Message(wire.HELLO))
    left.close()  # with a packet that it never read
    assert wire.receive(right) is None


def test_what_was_said_before_a_reset_is_heard(ends: tuple[socket.socket, socket.socket]) -> None:
    """A worker that is killed before it has read its supervisor's greeting has told of its regions all the same."""
    ours, theirs = ends
    wire.send(ours, Message(wire.INTRODUCE))
    for region in (1, 2):
        wire.send(theirs, Message(wire.KEEP, region=region))
    theirs.close()
    heard = [wire.receive(ours), wire.receive(ours)]
    assert [message and message.region for message in heard] == [1, 2]
    assert wire.receive(ours) is None


def test_sending_to_nobody_raises_and_kills_nobody(ends: tuple[socket.socket, socket.socket]) -> None:
    left, right = ends
    right.close()
    with pytest.raises(BrokenPipeError):
        wire.send(left, Message(wire.OK))


def test_without_waiting_means_without_waiting(ends: tuple[socket.socket, socket.socket]) -> None:
    left, right = ends
    for end in ends:  # so that waiting is a failure, not a hang
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 5, 0))
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", 5, 0))
    began = time.monotonic()
    with pytest.raises(BlockingIOError):
        wire.receive(right, socket.MSG_DONTWAIT)
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            wire.send(left, Message(wire.OK, sent), socket.MSG_DONTWAIT)
            sent += 1
    assert sent > 10
    assert time.monotonic() - began < 5
    received = 0
    while received < sent:
        message = wire.receive(right, socket.MSG_DONTWAIT)
        assert message is not None
        assert message.id == received
        received += 1


def test_a_short_packet_is_an_error_to_the_receiver(ends: tuple[socket.socket, socket.socket]) -> None:
    left, right = ends
    left.send(b"\1\2\3")
    with pytest.raises(ValueError, match="packet of 3 bytes"):
        wire.receive(right)


def test_the_longest_text_arrives_whole(ends: tuple[socket.socket, socket.socket]) -> None:
    left, right = ends
    text = os.urandom(MAX_MESSAGE - HEAD.size)
    wire.send(left, Message(wire.FAILED, text=text))
    message = wire.receive(right)
    assert message is not None
    assert message.text == text


def test_a_message_shows_what_it_is() -> None:
    assert repr(Message(wire.ENSURE, 1, 2, 3, 4)) == f"Message(kind={wire.ENSURE}, id=1, region=2, a=3, b=4)"
