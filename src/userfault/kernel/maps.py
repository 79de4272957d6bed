"""The mappings of a process, as `/proc/PID/maps` and `/proc/PID/smaps` tell them.

`read_maps` is cheap. `read_smaps` makes the kernel count every page of the process, and tells the flags besides:
which ranges are registered with a userfaultfd, for what. It does not tell with which one; nothing in /proc does.

A process that changes its mappings while they are read is seen between the changes: no two ranges overlap, and one
that was there all the time is not missed (the kernel's `filesystems/proc.rst`).
"""

from __future__ import annotations

import os
from collections import namedtuple
from errno import ENOENT, ENOTTY
from fcntl import ioctl

from userfault.errors import KernelError
from userfault.kernel import abi
from userfault.kernel.procfs import read_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "UFFD_MINOR",
    "UFFD_MISSING",
    "UFFD_WP",
    "MapEntry",
    "parse_maps",
    "parse_smaps",
    "query_maps",
    "read_maps",
    "read_smaps",
]

# Words of the VmFlags line, proc_pid_smaps(5).
UFFD_MISSING = "um"  # 4.3
UFFD_WP = "uw"  # 5.7
UFFD_MINOR = "ui"  # 5.13

_HEX = "0123456789abcdef"
_NO_FLAGS: frozenset[str] = frozenset()


# typing.NamedTuple would load typing into the pager's processes.
class MapEntry(namedtuple("_Fields", "start end permissions offset device inode path flags")):  # noqa: PYI024
    """One mapping.

    Attributes:
        start: First byte.
        end: The byte after the last.
        permissions: Four characters: `r`, `w`, `x` or `-` for each that is not so, and `s` shared or `p` private.
        offset: Where in the file it begins.
        device: The file's device, to be compared with `os.stat_result.st_dev` (some file systems, such as btrfs,
            say another one there); 0 without a file.
        inode: The file's inode; 0 without a file.
        path: As the kernel writes it: a path, with ` (deleted)` behind it if it has been unlinked;
            `/memfd:NAME (deleted)`; `[heap]`, `[stack]`, `[anon:NAME]`; empty for anonymous memory. Bytes that are no
            UTF-8 are surrogates, as in `os.fsdecode`.
        flags: Two-letter words such as `UFFD_MISSING`; empty unless they come from smaps.
    """

    __slots__ = ()

    start: int
    end: int
    permissions: str
    offset: int
    device: int
    inode: int
    path: str
    flags: frozenset[str]

    @property
    def size(self) -> int:
        """Its length in bytes."""
        return self.end - self.start


def read_maps(pid: int | str = "self") -> list[MapEntry]:
    """Return the mappings of a process in the order of addresses; none for one that has ended or is the kernel's.

    Raises:
        KernelError: No such process, or not ours to look at (EACCES): it takes the right to trace it.
    """
    return list(parse_maps(read_text(f"/proc/{pid}/maps")))


def read_smaps(pid: int | str = "self") -> list[MapEntry]:
    """Return the mappings of a process with their flags.

    Raises:
        KernelError: As `read_maps`; ENOENT also for a kernel without CONFIG_PROC_PAGE_MONITOR.
    """
    return list(parse_smaps(read_text(f"/proc/{pid}/smaps")))


def parse_maps(text: str) -> Iterator[MapEntry]:
    """Yield the mappings in the text of a maps file.

    Raises:
        ValueError: It is none.
    """
    return (_parse_line(line, _NO_FLAGS) for line in text.split("\n") if line)


def parse_smaps(text: str) -> Iterator[MapEntry]:
    """Yield the mappings in the text of a smaps file; lines that newer kernels add to it do not matter.

    Raises:
        ValueError: It is none.
    """
    header, flags = "", _NO_FLAGS
    for line in text.split("\n"):
        if line and line[0] in _HEX:  # all other lines begin with a capital
            if header:
                yield _parse_line(header, flags)
            header, flags = line, _NO_FLAGS
        elif line.startswith("VmFlags:"):
            flags = frozenset(line.split()[1:])
    if header:
        yield _parse_line(header, flags)


def query_maps(start: int, end: int) -> Iterator[tuple[int, int, str, int]]:
    """Yield the mappings of this process that a range touches: start, end, permissions such as `"rw-"`, and inode.

    One is asked for after the other (PROCMAP_QUERY, Linux 6.11): there may be 65530 of them, and then it takes long to
    read them all, and more memory than can still be had. Before 6.11 they are all read.

    Raises:
        KernelError: /proc is not there.
    """
    try:
        maps = os.open("/proc/self/maps", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise KernelError(error.errno or 0, "open(/proc/self/maps)") from None
    try:
        while start < end and (found := _query(maps, start)) is not None and found[0] < end:
            yield found
            start = found[1]
    except OSError as error:
        if error.errno != ENOTTY:
            raise KernelError(error.errno or 0, "ioctl(PROCMAP_QUERY)", f"address {start:#x}") from None
        overlapping = (entry for entry in read_maps() if entry.start < end and start < entry.end)
        yield from ((entry.start, entry.end, entry.permissions[:3], entry.inode) for entry in overlapping)
    finally:
        os.close(maps)


def _query(maps: int, address: int) -> tuple[int, int, str, int] | None:
    """Ask for the mapping at an address, or the next; None if there is none."""
    head = (abi.PROCMAP_QUERY_STRUCT.size, abi.PROCMAP_QUERY_COVERING_OR_NEXT_VMA, address)
    arg = bytearray(abi.PROCMAP_QUERY_STRUCT.pack(*head, *[0] * 12))
    try:
        ioctl(maps, abi.PROCMAP_QUERY, arg)
    except OSError as error:
        if error.errno == ENOENT:
            return None
        raise
    _, _, _, first, stop, flags, _, _, inode, *_ = abi.PROCMAP_QUERY_STRUCT.unpack(arg)
    bits = (abi.PROCMAP_QUERY_VMA_READABLE, abi.PROCMAP_QUERY_VMA_WRITABLE, abi.PROCMAP_QUERY_VMA_EXECUTABLE)
    permissions = "".join(letter if flags & bit else "-" for letter, bit in zip("rwx", bits, strict=True))
    return first, stop, permissions, inode


def _parse_line(line: str, flags: frozenset[str]) -> MapEntry:
    """Parse `start-end perms offset major:minor inode path`, where the path may hold spaces or be missing."""
    span, permissions, offset, device, inode, *path = line.split(maxsplit=5)
    start, end = span.split("-")
    major, minor = device.split(":")
    return MapEntry(
        int(start, 16),
        int(end, 16),
        permissions,
        int(offset, 16),
        os.makedev(int(major, 16), int(minor, 16)),
        int(inode),
        # The kernel writes a newline as \012 and leaves a backslash as it is: that of a name like "a\012b" is lost.
        path[0].replace("\\012", "\n") if path else "",
        flags,
    )
