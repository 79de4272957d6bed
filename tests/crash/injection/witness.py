"""Who makes a system call, and which: a role and a label, from what /proc tells of the thread that waits for leave.

A label is the call's name, and what tells its uses apart: an operation (`ioctl(UFFDIO_COPY)`), or the kind of file that
it is about (`read(userfaultfd)`).  What Python does for itself, with its own files, is told apart by their place.
"""

from __future__ import annotations

import os
import sys
from fnmatch import fnmatch
from pathlib import Path

from tests.crash.injection.numbers import FILES, NAMES, OPERATIONS, PATHS
from tests.crash.injection.seccomp import MACHINE, Call

import userfault

APPLICATION, LAUNCHER, PROGRAM, OTHER = "application", "launcher", "program", "other"
STARTS = "'s start"
PYTHONS = "python's own"
"""The label of what Python does with its own files."""
STANDARD = range(3)
_HOMES = (
    *("/usr/", "/lib", "/etc/", "/sys/devices/", sys.prefix, sys.base_prefix, os.path.realpath(sys.base_prefix)),
    *(os.path.dirname(os.path.dirname(os.path.realpath(userfault.__file__))), str(Path(__file__).parents[3])),
)
_PYTHONS_FILES = {"", "/dev/urandom", os.path.dirname(sys.executable)}
_KINDS = (
    ("anon_inode:?userfaultfd]", "userfaultfd"),
    ("anon_inode:?eventfd]", "eventfd"),
    ("anon_inode:?eventpoll]", "epoll"),
    ("anon_inode:?pidfd]", "pidfd"),
    ("pidfd:*", "pidfd"),
    ("/memfd:*", "memfd"),
    ("socket:*", "socket"),
    ("pipe:*", "pipe"),
    ("/proc/*", "proc"),
    ("/sys/fs/cgroup*", "cgroup"),
    ("/dev/userfaultfd", "userfaultfd's device"),
    ("/dev/null", "null"),
    ("/", "root"),
)
_NO_FILE = 1 << 31


class Witness:
    """Remembers which thread has which role, as long as it executes no other program."""

    def __init__(self) -> None:
        self._roles: dict[int, str] = {}
        self.threads: set[int] = set()
        """All that were seen."""

    def role(self, call: Call) -> str:
        """Return the role of a call's thread."""
        role = self._roles.get(call.thread)
        if role is None:
            self.threads.add(call.thread)
            role = _find_role(call.thread)
            if not role.endswith(STARTS):
                self._roles[call.thread] = role
        if NAMES.get(call.number) == "execve":
            self._roles.pop(call.thread, None)
        return role


def _find_role(thread: int) -> str:
    words = _read(thread, "cmdline").split(b"\0")
    name = _read(thread, "comm").strip().decode()
    if name == PROGRAM:
        return PROGRAM
    if len(words) < 4 or not any(b"userfault.pager.boot" in word for word in words):
        return APPLICATION if any(b"tests.crash.programs" in word for word in words) else OTHER
    role = words[-3].decode()
    if ":" in role:
        return LAUNCHER
    return f"{role}{STARTS}" if name.startswith("python") else role


def label(call: Call) -> str:
    """Return what a call is."""
    name = NAMES.get(call.number, f"number {call.number}")
    kind = _kind(name, call)
    if kind == PYTHONS:
        return PYTHONS
    if name in OPERATIONS:
        at, operations = OPERATIONS[name]
        operation = call.arguments[at] & 0xFFFFFFFF
        kind = operations.get(operation, f"{operation:#x}")
    return f"{name}({kind})" if kind else name


def _kind(name: str, call: Call) -> str:
    """Return what kind of file a call is about; empty if it is about none."""
    if name in PATHS and (path := _path(call, PATHS[name])):
        return _kind_of(path)
    if name not in FILES:
        return ""
    fd = call.arguments[FILES[name]] & 0xFFFFFFFF
    if fd in STANDARD:
        return "standard error" if name == "write" else PYTHONS
    return "anonymous" if fd >= _NO_FILE else _kind_of(_link(call.thread, fd))


def _kind_of(path: str) -> str:
    if path.startswith(_HOMES) or path.endswith((".py", ".pyc", ".zip", ".pth")) or path in _PYTHONS_FILES:
        return PYTHONS
    return next((kind for pattern, kind in _KINDS if fnmatch(path, pattern)), "file")


def _path(call: Call, at: int) -> str:
    """Return the path that a call names, from its thread's memory."""
    older = NAMES[call.number] in ("readlink", "access", "rename", "mkdir")
    address = call.arguments[at + (older and MACHINE == "aarch64")]
    if not address:
        return ""
    try:
        fd = os.open(f"/proc/{call.thread}/mem", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.pread(fd, 1024, address).partition(b"\0")[0].decode("utf-8", "replace")
        finally:
            os.close(fd)
    except OSError:
        return ""


def _link(thread: int, fd: int) -> str:
    try:
        return os.readlink(f"/proc/{thread}/fd/{fd}")
    except OSError:
        return "closed"


def _read(thread: int, name: str) -> bytes:
    try:
        with open(f"/proc/{thread}/{name}", "rb", buffering=0) as file:
            return file.read()
    except OSError:
        return b""
