"""The five messages of a userfaultfd, as typed objects.

`parse` takes what one read returned, many messages at a time. The kernel hands out faults before all other
messages, whichever came first, and each kind in its order; so read everything that is queued, and look for a
REMOVE or UNMAP before answering a fault. A message of a kind that is not known here becomes `Unknown` with
its bytes: a newer kernel must not stop a loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from userfault.kernel import abi
from userfault.kernel.abi import FaultFlag

__all__ = ["Event", "Fork", "PageFault", "Remap", "Remove", "Unknown", "Unmap", "parse"]


@dataclass(frozen=True, slots=True)
class PageFault:
    """A thread waits at a page.

    Attributes:
        address: The page; the exact byte with the EXACT_ADDRESS feature.
        flags: What kind of fault.
        thread_id: Who waits, with the THREAD_ID feature, as numbered in the pid namespace of the reader;
            otherwise 0. (0 as well for a thread that this namespace does not see.)
    """

    address: int
    flags: FaultFlag
    thread_id: int = 0

    @property
    def is_write(self) -> bool:
        """Whether the thread was about to write."""
        return bool(self.flags & abi.UFFD_PAGEFAULT_FLAG_WRITE)

    @property
    def is_wp(self) -> bool:
        """Whether the page is there, and write-protected."""
        return bool(self.flags & abi.UFFD_PAGEFAULT_FLAG_WP)

    @property
    def is_minor(self) -> bool:
        """Whether the page is in the file, and not mapped yet."""
        return bool(self.flags & abi.UFFD_PAGEFAULT_FLAG_MINOR)

    @property
    def is_missing(self) -> bool:
        """Whether the page is not there at all."""
        return not self.flags & (abi.UFFD_PAGEFAULT_FLAG_WP | abi.UFFD_PAGEFAULT_FLAG_MINOR)


@dataclass(frozen=True, slots=True)
class Fork:
    """The process forked, and waits for this message to be read.

    Attributes:
        fd: A new userfaultfd, of this process now: faults of the child's copies of the registered ranges.
            Whoever reads the event closes it; until then the child's memory waits.
    """

    fd: int


@dataclass(frozen=True, slots=True)
class Remap:
    """`mremap(2)` moved registered memory, which stays registered at its new place.

    Attributes:
        old: Its address before.
        new: Its address now.
        length: Bytes moved: the old length.
    """

    old: int
    new: int
    length: int


@dataclass(frozen=True, slots=True)
class Remove:
    """Registered memory is being dropped; its next touch faults anew.

    By MADV_DONTNEED, MADV_FREE or MADV_REMOVE; a hole punched with `fallocate` sends nothing. The message
    precedes the dropping: until it has been read, COPY and its kin fail with EAGAIN.

    Attributes:
        start: First byte.
        end: The byte after the last.
    """

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Unmap:
    """Registered memory was unmapped, by `munmap(2)`, `mremap(2)` or something mapped over it.

    Attributes:
        start: First byte.
        end: The byte after the last.
    """

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Unknown:
    """A message of a kind that this library does not know.

    Attributes:
        code: Its first byte.
        raw: All of it, 32 bytes.
    """

    code: int
    raw: bytes


Event: TypeAlias = PageFault | Fork | Remap | Remove | Unmap | Unknown


def parse(data: bytes) -> list[Event]:
    """Turn messages into events.

    Raises:
        ValueError: The length is not a multiple of that of a message.
    """
    size = abi.UFFD_MSG_SIZE
    if len(data) % size:
        raise ValueError(f"{len(data)} bytes are not a whole number of messages of {size} bytes")
    return [_event(data[start : start + size]) for start in range(0, len(data), size)]


def _event(raw: bytes) -> Event:
    code = raw[0]
    if code == abi.UFFD_EVENT_PAGEFAULT:
        _code, flags, address, thread_id = abi.UFFD_MSG_PAGEFAULT_STRUCT.unpack(raw)
        return PageFault(address, FaultFlag(flags), thread_id)
    if code == abi.UFFD_EVENT_FORK:
        return Fork(abi.UFFD_MSG_FORK_STRUCT.unpack(raw)[1])
    first, second, third = abi.UFFD_MSG_STRUCT.unpack(raw)[1:]
    if code == abi.UFFD_EVENT_REMAP:
        return Remap(first, second, third)
    if code == abi.UFFD_EVENT_REMOVE:
        return Remove(first, second)
    if code == abi.UFFD_EVENT_UNMAP:
        return Unmap(first, second)
    return Unknown(code, raw)
