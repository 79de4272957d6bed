"""Why a range was refused, in the words and the numbers of the proposal: the kernel of today says EINVAL to most."""

from __future__ import annotations

import contextlib
from errno import EBUSY, EINVAL, ENOMEM, EPERM

from userfault.errors import KernelError
from userfault.kernel import memory
from userfault.kernel.maps import read_maps
from userfault.kernel.memory import PAGE_SIZE
from userfault.kernel.userfaultfd import Userfaultfd

_SYSCTL = "vm.max_map_count may be reached: each separate piece costs two mappings; use adjacent pieces, or raise it"


def explain(error: KernelError, call: str, start: int, end: int) -> KernelError:
    """Turn what the kernel of today says of a range into what the proposal's did."""
    number, where = error.errno or EINVAL, f"[{start:#x}, {end:#x})"
    if number == EBUSY:
        detail = f"{where}: another userfaultfd has it"
    elif number in (EINVAL, EPERM):  # the latter for a shared mapping of a file that was not opened for writing
        number, detail = _judge(start, end, where)
        if call.startswith("madvise") and _nothing_there(start, end):
            number = ENOMEM  # as madvise(2) says it of any advice
    elif number == ENOMEM and memory.is_mapped(start, end - start):
        return explain_limit(error, where)
    else:
        detail = f"{where}: part of it is not mapped" if number == ENOMEM else f"{where}: {error}"
    return KernelError(number, call, detail)


def explain_limit(error: KernelError, what: str) -> KernelError:
    """Say what ENOMEM means when it is about mappings."""
    return KernelError(ENOMEM, error.syscall, f"{what}; {_SYSCTL}")


def _judge(start: int, end: int, where: str) -> tuple[int, str]:
    """Say what is wrong with a range that the kernel calls invalid, as the proposal's code would have."""
    missing = _nothing_there(start, end)
    if missing:
        return missing[0], f"{where}: {missing[1]}"
    return EINVAL, f"{where}: it takes anonymous memory, or a shared mapping of a memory file (memfd, tmpfs, hugetlbfs)"


def check_there(start: int, end: int, call: str) -> None:
    """Refuse a range without any memory; the kernel of today is not asked when the range is not marked.

    Holes between mappings are accepted, as they were in the proposal.
    """
    with contextlib.suppress(KernelError):
        memory.mincore(start, PAGE_SIZE)  # most have a beginning, and to read all mappings takes long
        if within_task(start, end):
            return
    missing = _nothing_there(start, end)
    if missing:
        raise KernelError(missing[0], call, f"[{start:#x}, {end:#x}): {missing[1]}")


def _nothing_there(start: int, end: int) -> tuple[int, str] | None:
    """Return error number and reason if no memory of this process lies in a range."""
    following = [entry for entry in read_maps() if entry.end > start]
    if not following or not within_task(start, end):
        return ENOMEM, "beyond all memory of this process"
    if following[0].start >= end:
        return EINVAL, "nothing is mapped there"
    return None


def within_task(start: int, end: int) -> bool:
    """Whether these can be addresses of a process at all: UFFDIO_WAKE looks at nothing else."""
    try:
        with Userfaultfd.open() as uffd:
            uffd.wake(start, end - start)
    except KernelError as error:
        return error.errno != EINVAL
    return True
