"""The numbers and words of the protocol, under the names that the proposal gave them.

They lived in `fs/userfaultfd.c` and in the manual text of the mails; no header ever had them.  The kernel of today has
other things in some of these places, so two of them are not what they were:

* The advice was 18 and 19.  Those are `MADV_WIPEONFORK` and `MADV_KEEPONFORK` now, and a program that mixed them up
  would lose its memory in a child.  So the advice is an enum of its own, and `madvise` refuses a plain integer.
* The system calls had numbers of their own; here they are functions.
"""

from __future__ import annotations

import os
from enum import Enum

from userfault.kernel import abi

USERFAULTFD_PROTOCOL = 0xAA
"""The one version there was; `UFFD_API` of today is the same number."""
USERFAULTFD_UNKNOWN_PROTOCOL = (1 << 64) - 1
"""Read back by who asked for any other."""

USERFAULTFD_RANGE_REGISTER = 1 << 0
USERFAULTFD_RANGE_UNREGISTER = 1 << 1
USERFAULTFD_RANGE_MASK = ((1 << 64) - 1) & ~(USERFAULTFD_RANGE_REGISTER | USERFAULTFD_RANGE_UNREGISTER)

UFFD_CLOEXEC = os.O_CLOEXEC
UFFD_NONBLOCK = os.O_NONBLOCK

RAP_ALLOW_SRC_HOLES = 1 << 0


class Advice(Enum):
    """What `userfault.madvise` can be told of a range."""

    USERFAULT = "MADV_USERFAULT"
    """A page that is not there is not filled with zeros: it is reported to a descriptor, or is a SIGBUS without one."""
    NOUSERFAULT = "MADV_NOUSERFAULT"
    """Ordinary memory again."""


MADV_USERFAULT = Advice.USERFAULT
MADV_NOUSERFAULT = Advice.NOUSERFAULT

FEATURES = (
    abi.UFFD_FEATURE_EXACT_ADDRESS
    | abi.UFFD_FEATURE_THREAD_ID
    | abi.UFFD_FEATURE_MISSING_SHMEM
    | abi.UFFD_FEATURE_MINOR_SHMEM
    | abi.UFFD_FEATURE_POISON
)
"""What a descriptor needs of the kernel: all of it since Linux 6.6. MOVE (6.8) is asked for besides, if it is there."""
GUARD_FEATURES = FEATURES & ~abi.UFFD_FEATURE_THREAD_ID | abi.UFFD_FEATURE_SIGBUS
"""The same for the one behind marked memory that no descriptor has: it reports nothing, a touch is a SIGBUS."""
