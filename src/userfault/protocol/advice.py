"""`madvise(MADV_USERFAULT)`: a page that is not there is not filled with zeros."""

from __future__ import annotations

from typing import TYPE_CHECKING

from userfault.protocol.constants import Advice
from userfault.protocol.marks import MARKS, extent

if TYPE_CHECKING:
    from userfault.protocol.marks import Memory


def madvise(memory_or_range: Memory, advice: Advice) -> None:
    """Mark memory, or take the mark away.

    In marked memory a missing page is reported to the descriptor that the range is registered with; without one a touch
    is a SIGBUS, and a system call that is given such memory fails with EFAULT. Pages that are there stay as they are.

    Any thread. A forked child does not inherit marked memory: a touch there is a SIGSEGV. Nor is it in a core dump.

    Args:
        memory_or_range: A buffer that begins at a page (an `mmap`, an array over one), which is held until it is
            neither marked nor registered: closing the `mmap` before that is a BufferError. Or a pair of address and
            length in bytes, which the caller keeps mapped. Anonymous, or a mapping of a memory file (memfd, tmpfs).
        advice: `protocol.MADV_USERFAULT` or `protocol.MADV_NOUSERFAULT`.

    Raises:
        TypeError: The advice is a number: 18 and 19 are other advice today.
        KernelError: EINVAL: it does not begin at a page, is empty, or is another kind of memory. EBUSY: a userfaultfd
            that is none of these has it, such as a region's. ENOMEM: not mapped.
        UnsupportedError: No userfaultfd for this process, or too old a kernel.
    """
    if not isinstance(advice, Advice):
        raise TypeError(
            f"the advice {advice!r} is not one of userfault.protocol.Advice: pass protocol.MADV_USERFAULT or "
            "protocol.MADV_NOUSERFAULT (the numbers 18 and 19 of 2014 are MADV_WIPEONFORK and MADV_KEEPONFORK today)"
        )
    start, end, kept = extent(memory_or_range)
    if advice is Advice.USERFAULT:
        MARKS.mark(start, end, kept)
    else:
        MARKS.unmark(start, end)
