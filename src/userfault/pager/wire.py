"""What the application, the supervisor and the worker say to each other, and how descriptors travel.

Every socket here is one half of an unnamed `SOCK_SEQPACKET` pair: a message is one packet, its descriptors come with
it or not at all (unix(7), SCM_RIGHTS), and there is no path that anyone else could connect to.

A message is a fixed head of 40 bytes and, for a few kinds, some text behind it.  Requests carry an id that the answer
repeats.  All of them may be sent twice: when a worker dies the application sends again whatever is unanswered, so
each request means "make it so", never "do it once more".
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import time

HEAD = struct.Struct("=BBHIQQQQ")
MAX_MESSAGE = 32 << 10
EXPORT_FDS = 5
"""Of an export: its record, the userfaultfd, our end, the program's end, the memory."""
MAX_FDS = EXPORT_FDS
TRIES = 8
NO_MEMORY = (errno.ENOMEM, errno.ENOBUFS, errno.ETOOMANYREFS)
"""Errnos of a message for which the kernel has no room at the moment."""
_FD = struct.Struct("=i")
_ROOM_FOR_FDS = socket.CMSG_SPACE(MAX_FDS * _FD.size)

# Requests of the application.
OPEN, CLOSE, ENSURE, EVICT, RETRY, SYNC, BYE, EXPORT, RENEW, FLUSH, BUDGET, ADVISE, UNMAPPED = range(1, 14)
# Answers and news of the pager.
OK, FAILED, HELLO, LOST, BLOCK_FAILED, READ_FAILED, WRITE_FAILED, BUDGET_FULL, UNMAP = range(16, 25)
# Between supervisor and worker.
INTRODUCE, KEEP, DROP, PROGRESS, GOODBYE, WRITING = range(32, 38)

# Flags of ENSURE.
WRITE, NO_ANSWER = 1, 2
# Flags of CLOSE: what cannot be written back is lost; it has been written back already.
FORCE, WRITTEN = 4, 8
# A flag of ADVISE; without it the range is used in no order.
SEQUENTIAL = 16


class Message:
    """One packet: `kind`, `flags`, an `id`, three numbers whose meaning depends on the kind, `text`, `fds`.

    Requests: `region` is the region's id, `a` and `b` an offset and a length in blocks.
    """

    __slots__ = ("a", "b", "fds", "flags", "id", "kind", "region", "text")

    def __init__(
        self,
        kind: int,
        id: int = 0,  # noqa: A002  # the word of every RPC
        region: int = 0,
        a: int = 0,
        b: int = 0,
        *,
        flags: int = 0,
        text: bytes = b"",
        fds: tuple[int, ...] = (),
    ) -> None:
        self.kind = kind
        self.id = id
        self.region = region
        self.a = a
        self.b = b
        self.flags = flags
        self.text = text
        self.fds = fds

    def encode(self) -> bytes:
        """Return the packet without its descriptors."""
        return HEAD.pack(self.kind, self.flags, 0, 0, self.id, self.region, self.a, self.b) + self.text

    def __repr__(self) -> str:
        return f"Message(kind={self.kind}, id={self.id}, region={self.region}, a={self.a}, b={self.b})"


def decode(data: bytes, fds: tuple[int, ...] = ()) -> Message:
    """Parse a packet.

    Raises:
        ValueError: if it is shorter than a head.
    """
    if len(data) < HEAD.size:
        raise ValueError(f"a packet of {len(data)} bytes is no message")
    kind, flags, _, _, id_, region, a, b = HEAD.unpack_from(data)
    return Message(kind, id_, region, a, b, flags=flags, text=data[HEAD.size :], fds=fds)


def pair() -> tuple[socket.socket, socket.socket]:
    """Return a private, close-on-exec socket pair that keeps packets whole."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(sock: socket.socket, message: Message, flags: int = 0) -> None:
    """Send one message with its descriptors.

    Raises:
        OSError: as sendmsg(2); BlockingIOError with MSG_DONTWAIT if the peer does not read.
    """
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, _pack_fds(message.fds))] if message.fds else []
    sock.sendmsg([message.encode()], rights, flags | socket.MSG_NOSIGNAL)


def deliver(sock: socket.socket, message: Message) -> None:
    """Send a message that must not be lost as long as its reader lives; try again what passes.

    Raises:
        BlockingIOError: if the reader does not read (SO_SNDTIMEO).
        BrokenPipeError, ConnectionResetError: if there is no reader any more.
        OSError: as sendmsg(2), if it does not pass.
    """
    for attempt in range(TRIES):
        try:
            send(sock, message)
            return
        except OSError as error:
            if error.errno not in NO_MEMORY or attempt == TRIES - 1:
                raise
        time.sleep(0.001 * 2**attempt)  # no memory for a packet: back-off


def receive(sock: socket.socket, flags: int = 0) -> Message | None:
    """Receive one message; None at end-of-file. Descriptors arrive close-on-exec, all of them or none.

    `socket.recv_fds` of the standard library would do, but ignores its flags (CPython 3.11).  Of a peer that has ended
    with something of ours unread the kernel tells first (ECONNRESET, once); what it had said comes after that.

    Raises:
        OSError: as recvmsg(2); BlockingIOError with MSG_DONTWAIT if nothing is there.
        ValueError: if the packet is no message, or was cut off.
    """
    try:
        data, rights, state = _receive(sock, flags)
    except ConnectionResetError:
        return None
    fds = tuple(fd for _, _, text in rights for (fd,) in _FD.iter_unpack(text[: len(text) & -_FD.size]))
    if state & (socket.MSG_TRUNC | socket.MSG_CTRUNC):  # the latter also where this process can have no more of them
        close_all(fds)
        fds = ()
    if state & socket.MSG_TRUNC:
        raise ValueError(f"a packet was cut off after {len(data)} bytes")
    return decode(data, fds) if data else None


def _receive(sock: socket.socket, flags: int) -> tuple[bytes, list[tuple[int, int, bytes]], int]:
    try:
        return sock.recvmsg(MAX_MESSAGE, _ROOM_FOR_FDS, flags | socket.MSG_CMSG_CLOEXEC)[:3]
    except ConnectionResetError:  # said once
        return sock.recvmsg(MAX_MESSAGE, _ROOM_FOR_FDS, flags | socket.MSG_CMSG_CLOEXEC)[:3]


def close_all(fds: tuple[int, ...]) -> None:
    """Close descriptors that came with a message."""
    for fd in fds:
        os.close(fd)


def drain(sock: socket.socket) -> None:
    """Take out what lies unread on a socket, and forget it."""
    with contextlib.suppress(OSError):
        for _ in range(512):  # an empty packet looks like the end; and a buffer of the usual size has room for less
            sock.recv(1, socket.MSG_DONTWAIT)


def hang_up(sock: socket.socket) -> None:
    """End a conversation, whoever else holds copies of the socket: the other end reads the end of the file.

    With something of the other end's unread it would be ECONNRESET.
    """
    drain(sock)
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    drain(sock)


def _pack_fds(fds: tuple[int, ...]) -> bytes:
    return b"".join(map(_FD.pack, fds))
