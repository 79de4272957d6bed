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

import re
import time
from errno import EAGAIN, EEXIST, EINVAL, ENOMEM
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
        for first, stop in accessible(start, end):
            for at in range(first, stop, CHUNK):
                find = _unmapped if unmapped else _missing
                for hole in find(at, min(at + CHUNK, stop)):
                    poisoned += _poison(uffd, *hole)
    except BaseException:
        cure(poisoned)
        raise
    return poisoned


def cure(poisoned: list[tuple[int, int]]) -> None:
    """Make poisoned parts holes again."""
    for start, end in poisoned:
        try:
            memory.advise(start, end - start, abi.MADV_DONTNEED)
        except KernelError as error:
            if error.errno != EINVAL:
                raise
            memory.advise(start, end - start, abi.MADV_DONTNEED_LOCKED)  # mlock(2)ed; Linux 5.18


def accessible(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the parts of a range that are mapped and may be touched, one for each mapping."""
    for first, stop, permissions in query_maps(start, end):
        if permissions != "---":
            yield max(start, first), min(end, stop)


def _missing(start: int, end: int) -> Iterator[tuple[int, int]]:
    for run in _ZEROS.finditer(memory.mincore(start, end - start)):
        yield start + run.start() * PAGE_SIZE, start + run.end() * PAGE_SIZE


def _unmapped(start: int, end: int) -> Iterator[tuple[int, int]]:
    with Pagemap() as pagemap:
        words = pagemap.words(start, end - start)
    there = bytes(1 if word >> 62 else 0 for word in words)  # present, or swapped: the two highest bits
    for run in _ZEROS.finditer(there):
        yield start + run.start() * PAGE_SIZE, start + run.end() * PAGE_SIZE


def _poison(uffd: Userfaultfd, at: int, end: int) -> Iterator[tuple[int, int]]:
    impatience = 0
    while at < end:
        done, error = uffd.poison(at, end - at)
        if done:
            yield at, at + done
            at += done  # whatever stopped it, the next call will say
        elif error == EEXIST:
            at += PAGE_SIZE
        elif error in (EAGAIN, ENOMEM) and impatience < PATIENCE:
            impatience += 1
            time.sleep(0.001)  # both pass, and only the kernel can say when
        else:
            raise KernelError(error, "ioctl(UFFDIO_POISON)", f"address {at:#x}, length {end - at}")
