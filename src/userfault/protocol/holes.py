"""Finding the pages of a range that are not there, and making each a SIGBUS for a while.

A range that passes from one userfaultfd to another belongs to neither in between, and a page that is missing then is
filled with zeros by whoever touches it.  So its holes are poisoned before and cured after: in between a touch is a
SIGBUS, never a zero.  (UFFDIO_POISON, Linux 6.6; a marker outlives the registration, and MADV_DONTNEED takes it away.)

What a hole is depends on how the range was registered.  With MISSING alone a page of a memfd that is in the file is no
hole, mapped here or not: mincore(2) tells.  With MINOR a page that is not mapped would have been a fault: the page
table tells.  Poison is refused (EEXIST) where a page is, so that neither answer can do harm when it is out of date.
Memory that is not accessible has nothing to hide.  What another thread drops in just these microseconds is not seen.
"""

from __future__ import annotations

import os
import re
import time
from errno import EAGAIN, EEXIST, EFAULT, EINVAL, EMFILE, ENFILE, ENOMEM
from typing import TYPE_CHECKING

from userfault.errors import KernelError
from userfault.kernel import abi, memory
from userfault.kernel.maps import query_maps
from userfault.kernel.memory import PAGE_SIZE
from userfault.kernel.pagemap import Pagemap

if TYPE_CHECKING:
    from collections.abc import Iterator

    from userfault.kernel.userfaultfd import Userfaultfd

CHUNK = 1 << 30
CURE = 1 << 24
"""Bytes between two looks when poison is taken away."""
PATIENCE = 1000
_ZEROS = re.compile(rb"\0+")


def poison_holes(uffd: Userfaultfd, start: int, end: int, *, unmapped: bool) -> list[tuple[int, int]]:
    """Make a touch of each hole a SIGBUS; return the parts that were poisoned, for `cure`.

    Args:
        uffd: Whose range it is.
        start: First byte, a page's.
        end: The byte after the last.
        unmapped: Whether pages that are in the file and not mapped are holes too.

    Raises:
        KernelError: ENOMEM, for page tables; what was poisoned is cured.
    """
    poisoned: list[tuple[int, int]] = []
    try:
        for hole in _holes(start, end, unmapped=unmapped):
            poisoned += _poison(uffd, *hole)
    except BaseException:
        cure(poisoned)
        raise
    return poisoned


def _holes(start: int, end: int, *, unmapped: bool) -> Iterator[tuple[int, int]]:
    try:
        for first, stop, is_file in accessible(start, end):
            for at in range(first, stop, CHUNK):
                end_of_chunk = min(at + CHUNK, stop)
                yield from _unmapped(at, end_of_chunk) if unmapped else _missing(at, end_of_chunk, is_file)
    except KernelError as error:
        if error.errno not in (EMFILE, ENFILE):
            raise
        yield start, end  # no descriptor to look with: the kernel skips what is there


def cure(poisoned: list[tuple[int, int]]) -> None:
    """Make poisoned parts holes again, but for pages that have been placed there meanwhile."""
    for first, stop in poisoned:
        for at in range(first, stop, CURE):
            _cure(at, min(at + CURE, stop))


def _cure(at: int, stop: int) -> None:
    for start, end in _markers(at, stop):
        try:
            memory.advise(start, end - start, abi.MADV_DONTNEED)
        except KernelError as error:
            if error.errno != EINVAL:
                raise
            memory.advise(start, end - start, abi.MADV_DONTNEED_LOCKED)  # mlock(2)ed; Linux 5.18


def accessible(start: int, end: int) -> Iterator[tuple[int, int, bool]]:
    """Yield the parts of a range that are mapped and may be touched, by mappings, and whether that is a file's."""
    for first, stop, permissions, inode in query_maps(start, end):
        if permissions != "---":
            yield max(start, first), min(end, stop), bool(inode)


def _missing(start: int, end: int, is_file: bool) -> Iterator[tuple[int, int]]:
    there = memory.mincore(start, end - start)
    if is_file and os.geteuid() and b"\0" not in there:
        # Of a file that the caller neither owns nor may write by its mode, mincore(2) says that all is there.
        yield from _unmapped(start, end)
    else:
        yield from _runs(start, there)


def _unmapped(start: int, end: int) -> Iterator[tuple[int, int]]:
    with Pagemap() as pagemap:
        words = pagemap.words(start, end - start)
    # Present, or swapped, are the two highest bits.
    yield from _runs(start, bytes(1 if word >> 62 else 0 for word in words))


def _markers(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Find what is still poisoned: for the page table a marker is a swapped page, and not present."""
    try:
        with Pagemap() as pagemap:
            words = pagemap.words(start, end - start)
    except KernelError:  # no descriptor to look with
        yield start, end
        return
    yield from _runs(start, bytes(1 if word & abi.PM_PRESENT else 0 for word in words))


def _runs(start: int, there: bytes) -> Iterator[tuple[int, int]]:
    for run in _ZEROS.finditer(there):
        yield start + run.start() * PAGE_SIZE, start + run.end() * PAGE_SIZE


def _poison(uffd: Userfaultfd, at: int, end: int) -> Iterator[tuple[int, int]]:
    impatience = 0
    while at < end:
        done, error = uffd.poison(at, end - at)
        if done:
            yield at, at + done
            at += done  # whatever stopped it, the next call will say
        elif error in (EEXIST, EFAULT):  # a page is there; or it lies beyond the end of its file, a SIGBUS anyway
            at += PAGE_SIZE
        elif error in (EAGAIN, ENOMEM) and impatience < PATIENCE:
            impatience += 1
            time.sleep(0.001)  # both pass, and only the kernel can say when
        else:
            raise KernelError(error, "ioctl(UFFDIO_POISON)", f"address {at:#x}, length {end - at}")
