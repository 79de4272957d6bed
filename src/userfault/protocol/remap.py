"""`remap_anon_pages`: moving pages into place without copying.

In 2014 it was a system call; its heir is UFFDIO_MOVE (Linux 6.8), with nearly the same errors.  Differences, and what
is done about them:

* MOVE works through a userfaultfd that the destination is registered with.  The 2014 call needed neither that nor an
  advice.  So a destination that is nobody's is registered for just that long.
* MOVE wakes; the 2014 call did not.  So it is told not to (DONTWAKE): the range write wakes.
* After a part MOVE says EAGAIN; the 2014 call returned the short count, and the next call told why.  The same here.
* MOVE gives up with EAGAIN what it cannot lock at once; the 2014 call tried again by itself.  So does this, for a
  second.
* For memory that is not mapped MOVE says ENOENT, as for a hole; the 2014 call said EINVAL.  So does this.
* The shared page of zeros that reading a hole maps was EBUSY in 2014, and MOVE moves it.  That is left as it is.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from errno import EAGAIN, EBUSY, EINVAL, ENOENT
from typing import TYPE_CHECKING

from userfault.errors import KernelError, UnsupportedError
from userfault.kernel import abi, memory
from userfault.kernel.memory import PAGE_SIZE
from userfault.kernel.userfaultfd import Userfaultfd
from userfault.protocol.constants import RAP_ALLOW_SRC_HOLES
from userfault.protocol.marks import MARKS

if TYPE_CHECKING:
    from collections.abc import Iterator

_CALL = "remap_anon_pages"
_TOP = 1 << 64
PATIENCE_S = 1.0


def remap_anon_pages(dst: int, src: int, length: int, flags: int = 0) -> int:
    """Move anonymous pages from one range of this process to another, by their page tables alone. Wakes nobody.

    Any thread; the pages must not be shared with a forked child.

    Args:
        dst: Where they go: an address, a page's. Nothing may be there.
        src: Where they are: private anonymous memory. Keep it from being forked (MADV_DONTFORK).
        length: Bytes, whole pages; inside one mapping on either side.
        flags: `protocol.RAP_ALLOW_SRC_HOLES`: pages that are not there are skipped, and counted.

    Returns:
        Bytes moved, never 0. Less than `length`: it stopped there; call again for the rest to learn why.

    Raises:
        KernelError: EINVAL: not aligned, nothing to move, another flag, not inside one mapping of private anonymous
            memory, different protection or locking. ENOENT: the source has a hole. EEXIST: a page is at the
            destination. EBUSY: a source page is shared or pinned. EFAULT, ENOMEM: as the kernel finds.
        UnsupportedError: Linux before 6.8.
    """
    _check(dst, src, length, flags)
    mode = abi.UFFDIO_MOVE_MODE_DONTWAKE
    if flags & RAP_ALLOW_SRC_HOLES:
        mode |= abi.UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES
    with MARKS.lock, _keeper(dst, length) as uffd:
        if not uffd.features & abi.UFFD_FEATURE_MOVE:
            raise UnsupportedError(_CALL, "It needs Linux 6.8 or later.", "userfaultfd cannot MOVE")
        done, error = _move(uffd, dst, src, length, mode)
    if done:
        return done
    if error == ENOENT and not memory.is_mapped(src, length):
        error = EINVAL
    raise KernelError(error, _CALL, _where(dst, src, length))


def _check(dst: int, src: int, length: int, flags: int) -> None:
    if flags & ~RAP_ALLOW_SRC_HOLES:
        raise KernelError(EINVAL, _CALL, f"flags {flags:#x}: RAP_ALLOW_SRC_HOLES is all there is")
    if (dst | src | length) % PAGE_SIZE or min(dst, src, length) < 0:
        raise KernelError(EINVAL, _CALL, f"{_where(dst, src, length)}: all three must be multiples of {PAGE_SIZE}")
    if not length or max(dst, src) + length > _TOP:
        raise KernelError(EINVAL, _CALL, f"{_where(dst, src, length)}: nothing to move, or beyond all addresses")


def _where(dst: int, src: int, length: int) -> str:
    return f"{length} bytes from {src:#x} to {dst:#x}"


@contextmanager
def _keeper(dst: int, length: int) -> Iterator[Userfaultfd]:
    """Give the userfaultfd that the destination is registered with; one for just this if there is none."""
    found = MARKS.keepers(dst, dst + length)
    if any(keeper is not found[0] for keeper in found):
        detail = f"[{dst:#x}, {dst + length:#x}) is not one mapping: its parts differ in mark or registration"
        raise KernelError(EINVAL, _CALL, detail)
    if found[0] is not None:
        yield found[0]
        return
    with Userfaultfd.open(abi.UFFD_FEATURE_MOVE) as uffd:
        try:
            uffd.register(dst, length, abi.UFFDIO_REGISTER_MODE_MISSING)
        except KernelError as error:
            detail = "another userfaultfd has it" if error.errno == EBUSY else "not private anonymous memory"
            raise KernelError(EINVAL, _CALL, f"[{dst:#x}, {dst + length:#x}): {detail}") from None
        try:
            yield uffd
        finally:
            uffd.unregister(dst, length)


def _move(uffd: Userfaultfd, dst: int, src: int, length: int, mode: int) -> tuple[int, int]:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        done, error = uffd.move(dst, src, length, mode)
        if done or error != EAGAIN or time.monotonic() > deadline:
            return done, error
        time.sleep(0.001)  # a page is being looked at by somebody else; only the kernel can say when that is over
