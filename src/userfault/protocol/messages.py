"""What goes over the descriptor: 64-bit words in native byte order, on 32-bit machines too.

A pager writes a `Version` (one word), then ranges (two words, `[start, end)`, the command in the low bits of the
first). It reads an `Acknowledgement` or a `Refusal`, then `Fault`s (one word each).  Every message can be turned into
bytes (`encode`), so that this module serves both ends; `parse_range` is what the descriptor does with what was written.
"""

from __future__ import annotations

from dataclasses import dataclass
from errno import EINVAL, ERANGE
from struct import Struct
from typing import TypeAlias

from userfault.errors import LocalProtocolError
from userfault.kernel.memory import PAGE_SIZE
from userfault.protocol.constants import (
    USERFAULTFD_RANGE_MASK,
    USERFAULTFD_RANGE_REGISTER,
    USERFAULTFD_RANGE_UNREGISTER,
    USERFAULTFD_UNKNOWN_PROTOCOL,
)

WORD = Struct("=Q")
RANGE = Struct("=QQ")


@dataclass(frozen=True, slots=True)
class Version:
    """The first thing a pager writes: which protocol it speaks."""

    number: int

    def encode(self) -> bytes:
        """Return the 8 bytes to write."""
        return WORD.pack(self.number)


@dataclass(frozen=True, slots=True)
class Wake:
    """The pages of `[start, end)` are there: let the threads go on whose faults have been read."""

    start: int
    end: int

    def encode(self) -> bytes:
        """Return the 16 bytes to write. ValueError if the start is no page's: its low bits would be a command."""
        return _encode(self.start, self.end, 0)


@dataclass(frozen=True, slots=True)
class Register:
    """Report the faults of `[start, end)` to this descriptor (October 2014)."""

    start: int
    end: int

    def encode(self) -> bytes:
        """Return the 16 bytes to write. ValueError as for `Wake`."""
        return _encode(self.start, self.end, USERFAULTFD_RANGE_REGISTER)


@dataclass(frozen=True, slots=True)
class Unregister:
    """Report them no longer."""

    start: int
    end: int

    def encode(self) -> bytes:
        """Return the 16 bytes to write. ValueError as for `Wake`."""
        return _encode(self.start, self.end, USERFAULTFD_RANGE_UNREGISTER)


@dataclass(frozen=True, slots=True)
class Acknowledgement:
    """What a pager reads when its version is known: the same 64 bits."""

    version: int

    def encode(self) -> bytes:
        """Return the 8 bytes that are read."""
        return WORD.pack(self.version)


@dataclass(frozen=True, slots=True)
class Refusal:
    """What it reads when its version is not known: all ones. It may ask for another."""

    def encode(self) -> bytes:
        """Return the 8 bytes that are read."""
        return WORD.pack(USERFAULTFD_UNKNOWN_PROTOCOL)


@dataclass(frozen=True, slots=True)
class Fault:
    """A thread waits at this address.

    Attributes:
        address: Where it touched: not aligned to a page.
        thread: Which one, as the kernel numbers it; 0 if unknown. It does not travel.
    """

    address: int
    thread: int = 0

    @property
    def page(self) -> int:
        """The page that is missing."""
        return self.address & -PAGE_SIZE

    def encode(self) -> bytes:
        """Return the 8 bytes that are read."""
        return WORD.pack(self.address)


Range: TypeAlias = Wake | Register | Unregister
Command: TypeAlias = Version | Range
_COMMANDS: dict[int, type[Range]] = {
    0: Wake,
    USERFAULTFD_RANGE_REGISTER: Register,
    USERFAULTFD_RANGE_UNREGISTER: Unregister,
}


def _encode(start: int, end: int, command: int) -> bytes:
    if start & ~USERFAULTFD_RANGE_MASK:
        raise ValueError(f"the start {start:#x} has command bits: mask a fault's address, address & -PAGE_SIZE")
    return RANGE.pack(start | command, end)


def parse_range(data: bytes, page_size: int = PAGE_SIZE) -> Range:
    """Parse what was written while RUNNING. The order of the checks is the specification's; extra bytes are ignored.

    Raises:
        LocalProtocolError: EINVAL: less than 16 bytes, both command bits, an address that is not a page's. ERANGE:
            the range is empty or ends before it begins.
    """
    if len(data) < RANGE.size:
        raise _refused(EINVAL, f"{len(data)} bytes: a range is two 64-bit words, [start, end)")
    start, end = RANGE.unpack_from(data)
    bits, page = start & ~USERFAULTFD_RANGE_MASK, start & USERFAULTFD_RANGE_MASK
    if page % page_size:
        raise _refused(EINVAL, f"the start {page:#x} is not a multiple of the page size {page_size}")
    if bits not in _COMMANDS:
        raise _refused(EINVAL, f"{start:#x} says both register (bit 0) and unregister (bit 1)")
    if end % page_size:
        raise _refused(EINVAL, f"the end {end:#x} is not a multiple of the page size {page_size}")
    if page >= end:
        raise _refused(ERANGE, f"[{page:#x}, {end:#x}) is empty: the end is the byte after the last")
    return _COMMANDS[bits](page, end)


def _refused(errno: int, detail: str) -> LocalProtocolError:
    return LocalProtocolError(errno, "write(userfaultfd)", detail)
