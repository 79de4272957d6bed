"""System calls that wait for somebody's leave: seccomp's user notification (seccomp_unotify(2), Linux 5.0).

A process lays a filter upon itself, which its threads and its children inherit, through fork and exec.  Where the
filter says so, a call stops before it is made, and whoever holds the filter's *listener* hears of it: which thread,
which call, which arguments.  It answers "go on", or with an errno, and then the call is not made at all.

* A filter cannot be taken back, and looks at numbers only, not at memory.
* A listener whose last copy is closed lets every waiting call fail with ENOSYS; one whose filter has no process left
  says POLLHUP: so it tells when all of them are gone.
* A call that waits and gets a signal is taken back and made anew, unless the filter says otherwise (WAIT_KILLABLE_RECV,
  Linux 5.19): then it would be counted twice.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import struct
import time
from fcntl import ioctl
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

MACHINES = {"x86_64": (0xC000003E, 317), "aarch64": (0xC00000B7, 277)}
"""AUDIT_ARCH_ of <linux/audit.h>, and the number of seccomp(2)."""
MACHINE = platform.machine()
ACTIONS = "/proc/sys/kernel/seccomp/actions_avail"

_SET_MODE_FILTER, _NEW_LISTENER, _WAIT_KILLABLE_RECV = 1, 1 << 3, 1 << 5
_RET_ALLOW, _RET_USER_NOTIF = 0x7FFF0000, 0x7FC00000
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06  # <linux/bpf_common.h>
_INSTRUCTION = struct.Struct("=HBBI")
_NR, _ARCH = 0, 4  # offsets in struct seccomp_data
_PR_SET_NO_NEW_PRIVS = 38
_PIDFD_GETFD = 438

_NOTIFICATION = struct.Struct("=QIIiIQ6Q")
_ANSWER = struct.Struct("=QqiI")
_ADDFD = struct.Struct("=QIIII")
_RECV, _SEND, _ADD, _FLAGS = 0xC0502100, 0xC0182101, 0x40182103, 0x40082104
_CONTINUE, _SETFD, _SYNC_WAKE_UP = 1, 1, 1

_libc = ctypes.CDLL(None, use_errno=True)


def why_not() -> str:
    """Say why this cannot be done here; empty if it can."""
    if MACHINE not in MACHINES:
        return f"no table of system call numbers for {MACHINE}"
    try:
        with open(ACTIONS, encoding="ascii") as file:
            return "" if "user_notif" in file.read().split() else "this kernel's seccomp knows no user notification"
    except OSError as error:
        return f"no seccomp: {error}"


def lay(numbers: Iterable[int], *, others: bool = False) -> int:
    """Lay a filter upon the calling thread, for ever; return its listener.

    Args:
        numbers: The system calls that wait for leave.
        others: All the others do, and these do not.
    """
    listed, unlisted = (_RET_ALLOW, _RET_USER_NOTIF) if others else (_RET_USER_NOTIF, _RET_ALLOW)
    audit, seccomp = MACHINES[MACHINE]
    program = [(_LOAD, 0, 0, _ARCH), (_JUMP_IF_EQUAL, 1, 0, audit), (_RETURN, 0, 0, _RET_ALLOW), (_LOAD, 0, 0, _NR)]
    for number in numbers:
        program += [(_JUMP_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, listed)]
    program.append((_RETURN, 0, 0, unlisted))
    code = ctypes.create_string_buffer(b"".join(_INSTRUCTION.pack(*instruction) for instruction in program))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS)")
    for flags in (_NEW_LISTENER | _WAIT_KILLABLE_RECV, _NEW_LISTENER):
        listener: int = _libc.syscall(seccomp, _SET_MODE_FILTER, flags, header)
        if listener >= 0 or ctypes.get_errno() != errno.EINVAL:
            break
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp(SET_MODE_FILTER)")
    return listener


def fetch(pid: int, fd: int, within: float = 10.0) -> int:
    """Take a copy of a descriptor of another process, as soon as it is there (pidfd_getfd(2), Linux 5.6)."""
    deadline = time.monotonic() + within
    pidfd = os.pidfd_open(pid)
    try:
        while (copy := _libc.syscall(_PIDFD_GETFD, pidfd, fd, 0)) < 0:
            error = ctypes.get_errno()
            if error != errno.EBADF or time.monotonic() > deadline:
                raise OSError(error, f"pidfd_getfd of {fd} in {pid}")
        return int(copy)
    finally:
        os.close(pidfd)


class Call(NamedTuple):
    """A system call that waits for leave."""

    id: int
    thread: int
    number: int
    arguments: tuple[int, ...]


class Listener:
    """Who is told of the calls."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        with contextlib.suppress(OSError):  # Linux 6.6: whoever waits and whoever answers take turns on one core
            ioctl(fd, _FLAGS, _SYNC_WAKE_UP)

    def fileno(self) -> int:
        return self.fd

    def hear(self) -> Call | None:
        """Take the next call; None if it was taken back, or its thread was killed."""
        argument = bytearray(_NOTIFICATION.size)
        try:
            ioctl(self.fd, _RECV, argument)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINTR):
                return None
            raise
        number, thread, _, nr, _, _, *arguments = _NOTIFICATION.unpack(argument)
        return Call(number, thread, nr, tuple(arguments))

    def go_on(self, call: Call) -> None:
        """Let it be made."""
        self._answer(call, 0, _CONTINUE)

    def fail(self, call: Call, error: int) -> None:
        """Have it fail, without being made."""
        self._answer(call, -error, 0)

    def replace(self, call: Call, fd: int) -> None:
        """Put another file in the place of the descriptor that a call is about, as dup2 does: the other is closed."""
        argument = _ADDFD.pack(call.id, _SETFD, fd, call.arguments[0] & 0xFFFFFFFF, os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # its thread was killed
            ioctl(self.fd, _ADD, argument)

    def _answer(self, call: Call, error: int, flags: int) -> None:
        with contextlib.suppress(FileNotFoundError):  # taken back, or its thread was killed
            ioctl(self.fd, _SEND, _ANSWER.pack(call.id, 0, error, flags))

    def close(self) -> None:
        os.close(self.fd)
