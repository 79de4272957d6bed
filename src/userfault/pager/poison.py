"""Failing a range loudly: a touch becomes a SIGBUS, instead of a wait without end or a zero."""

from __future__ import annotations

import errno
import time

from userfault.blocks.geometry import PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from userfault.kernel.userfaultfd import Userfaultfd

CHUNK = 1 << 30
PATIENCE = 1000


def poison(uffd: Userfaultfd, address: int, length: int) -> int:
    """Poison the holes of a range and wake whoever waits in it; pages that are there stay as they are.

    Returns:
        0, or the errno at which it had to stop (ESRCH: the process is gone; ENOENT: nothing is registered there).
    """
    end, impatience = address + length, 0
    while address < end:
        done, error = uffd.poison(address, min(CHUNK, end - address))
        address += done
        if done:  # whatever stopped it, the next call will say
            continue
        if error == errno.EEXIST:  # a page is there: skip it, but not whoever waits for it
            uffd.wake(address, PAGE_SIZE)
            address += PAGE_SIZE
        elif error in (errno.EAGAIN, errno.ENOMEM) and impatience < PATIENCE:  # both pass: nobody may be left asleep
            impatience += 1
            time.sleep(0.001)
        elif error:
            return error
    return 0
