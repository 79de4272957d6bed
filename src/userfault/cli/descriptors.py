"""The userfaultfds of a process, who else holds them, and its registered ranges: the facts behind `userfault fdinfo`.

Everything comes from /proc, and nothing is disturbed by looking.  A userfaultfd has an inode of its own there: that is
how its copies are found, in this process and in others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from errno import EACCES, ENOENT, EPERM, ESRCH

from userfault.cli.command import CommandError
from userfault.errors import KernelError
from userfault.kernel import process
from userfault.kernel.fdinfo import FdInfo, read_fdinfo
from userfault.kernel.maps import UFFD_MINOR, UFFD_MISSING, UFFD_WP, MapEntry, read_smaps

REGISTERED = frozenset([UFFD_MISSING, UFFD_WP, UFFD_MINOR])
_DEAD = ("Z", "X")
# The kernel cuts a process's name off after 15 bytes.
_ROLES = {f"userfault-{role}"[:15]: role for role in ("worker", "supervisor")}


@dataclass(frozen=True, slots=True)
class Process:
    """A process.

    Attributes:
        pid: Its number.
        name: As `ps` shows it; 15 bytes at most.
        state: In the kernel's word: `"running"`, `"sleeping"`, `"disk sleep"`, `"stopped"`, `"tracing stop"`.
    """

    pid: int
    name: str
    state: str

    @property
    def role(self) -> str:
        """What it does in a pager of this library: `"worker"` or `"supervisor"`; empty if it is no such process."""
        return _ROLES.get(self.name, "")


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A descriptor of the process that is a userfaultfd.

    Attributes:
        fd: Its number.
        info: What the kernel says of it.
        others: The other processes that hold the same userfaultfd, of those that may be looked at.
    """

    fd: int
    info: FdInfo
    others: tuple[Process, ...] = ()


@dataclass(frozen=True, slots=True)
class Situation:
    """What was found.

    Attributes:
        process: The one asked about.
        descriptors: Its userfaultfds.
        ranges: Its mappings that are registered, with whichever userfaultfd.
    """

    process: Process
    descriptors: tuple[Descriptor, ...]
    ranges: tuple[MapEntry, ...]

    @property
    def registrars(self) -> list[Descriptor]:
        """One descriptor for each userfaultfd with which ranges may be registered: without a handshake none can."""
        first: dict[int, Descriptor] = {}
        for descriptor in self.descriptors:
            if descriptor.info.initialized:
                first.setdefault(descriptor.info.inode or -1 - descriptor.fd, descriptor)
        return list(first.values())

    def copies(self, descriptor: Descriptor) -> list[int]:
        """Return the other descriptors of the process that are the same userfaultfd."""
        alike = (one.fd for one in self.descriptors if one.info.inode == descriptor.info.inode != 0)
        return [fd for fd in alike if fd != descriptor.fd]


def look(pid: int) -> Situation:
    """Find everything out.

    Raises:
        CommandError: There is no such process, or it may not be looked at.
    """
    try:
        pid = int(process.status(pid)["Tgid"])  # /proc/N is there for threads too, though not listed
        infos = dict(_infos(pid))
        ranges = tuple(entry for entry in read_smaps(pid) if entry.flags & REGISTERED)
        found = _process(pid)
    except KernelError as error:
        raise CommandError(_refusal(pid, error)) from error
    if found is None:
        raise CommandError(f"process {pid} has ended")
    others = _others(pid, {info.inode for info in infos.values()} - {0})
    descriptors = (Descriptor(fd, info, others.get(info.inode, ())) for fd, info in infos.items())
    return Situation(found, tuple(descriptors), ranges)


def _infos(pid: int) -> Iterator[tuple[int, FdInfo]]:
    for fd in process.userfaultfds(pid):
        try:
            yield fd, read_fdinfo(fd, pid)
        except ValueError:  # closed meanwhile, and its number is something else's
            continue
        except KernelError as error:
            if error.errno != ENOENT:
                raise


def _process(pid: int) -> Process | None:
    """Return a process by its number; `None` for one that is dead and not yet waited for."""
    fields = process.status(pid)
    letter, _, word = fields["State"].partition(" ")
    return None if letter in _DEAD else Process(pid, fields["Name"], word.strip("()"))


def _refusal(pid: int, error: KernelError) -> str:
    """Say in a line why a process cannot be looked at."""
    if error.errno in (ENOENT, ESRCH):
        return f"there is no process {pid}; ps -e lists those that there are"
    if error.errno in (EACCES, EPERM):
        # Root of a container, too, may lack the right to trace what has more rights than it.
        return f"process {pid} is not yours to look at: run as the process's owner, or as root with CAP_SYS_PTRACE"
    return str(error)


def _others(pid: int, inodes: set[int]) -> dict[int, tuple[Process, ...]]:
    """Return the other processes that hold a copy of these userfaultfds, by inode."""
    found: dict[int, tuple[Process, ...]] = {}
    pids = (int(name) for name in os.listdir("/proc") if name.isdecimal()) if inodes else ()
    for other in sorted(pids):
        held = _held(other) & inodes if other != pid else set()
        try:
            holder = _process(other) if held else None
        except KernelError:
            continue
        if holder is not None:
            found |= {inode: (*found.get(inode, ()), holder) for inode in held}
    return found


def _held(pid: int) -> set[int]:
    try:
        return {info.inode for _, info in _infos(pid)}
    except KernelError:  # gone, or another user's
        return set()
