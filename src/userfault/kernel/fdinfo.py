"""What `/proc/self/fdinfo` says about a userfaultfd."""

from __future__ import annotations

from dataclasses import dataclass

from userfault.kernel.abi import Feature, Ioctl
from userfault.kernel.procfs import read_text

__all__ = ["FdInfo", "parse_fdinfo", "read_fdinfo"]

# The kernel marks a descriptor that has shaken hands with the highest bit of its own features word.
_INITIALIZED = 1 << 31


@dataclass(frozen=True, slots=True)
class FdInfo:
    """The state of a userfaultfd.

    Attributes:
        pending: Faults whose message has not been read.
        total: Faults whose thread waits, read or not.
        api: The protocol's number, 0xAA.
        features: What is enabled.
        ioctls: What the kernel can do at all.
        initialized: Whether UFFDIO_API has been done.
        flags: `O_` bits with which it is open, such as `os.O_NONBLOCK` and `os.O_CLOEXEC`. UFFD_USER_MODE_ONLY is not
            among them: /proc does not tell.
        inode: The same number for all copies of one userfaultfd, in whatever process, and another for every other
            one; 0 if unknown. Linux 5.14.
    """

    pending: int
    total: int
    api: int
    features: Feature
    ioctls: Ioctl
    initialized: bool
    flags: int = 0
    inode: int = 0


def parse_fdinfo(text: str) -> FdInfo:
    """Parse the text of a fdinfo file.

    Raises:
        ValueError: It is not that of a userfaultfd.
    """
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    if not {"pending", "total", "API"} <= fields.keys():
        raise ValueError("not the fdinfo of a userfaultfd")
    api, features, ioctls = (int(part, 16) for part in fields["API"].split(":"))
    return FdInfo(
        pending=int(fields["pending"]),
        total=int(fields["total"]),
        api=api,
        features=Feature(features & ~_INITIALIZED),
        ioctls=Ioctl(ioctls),
        initialized=bool(features & _INITIALIZED),
        flags=int(fields.get("flags", "0"), 8),
        inode=int(fields.get("ino", "0")),
    )


def read_fdinfo(fd: int, pid: int | str = "self") -> FdInfo:
    """Read the state of a userfaultfd, of this process or another.

    Raises:
        KernelError: No such descriptor, or not ours to look at.
        ValueError: The descriptor is something else.
    """
    return parse_fdinfo(read_text(f"/proc/{pid}/fdinfo/{fd}"))
