"""Files that are memory: creation, seals, holes.

A memfd is the only memory that another process can fill, write back and drop. Descriptors made here are
close-on-exec. All functions may be called from any thread, and in any process that holds the descriptor.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from errno import ENXIO

from userfault.errors import KernelError
from userfault.kernel import abi
from userfault.kernel.syscalls import failed, libc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["DEFAULT_SEALS", "create", "data_extents", "punch_hole", "seal", "seals"]

# Its size is fixed and so are its seals; a write seal would forbid punching holes.
DEFAULT_SEALS = abi.F_SEAL_SHRINK | abi.F_SEAL_GROW | abi.F_SEAL_SEAL

libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def create(name: str, size: int = 0, *, seal: bool | int = True, hugetlb: bool | int = False) -> int:
    """Make a file in memory, and return its descriptor.

    Args:
        name: Shown in /proc, for people.
        size: Bytes, all holes. For hugetlb a multiple of its page.
        seal: Bits of `Seal` to set; `True` is `DEFAULT_SEALS`; `False` none, to be set later.
        hugetlb: `True` for huge pages of the default size, or their size in bytes. The administrator reserves
            them (`vm.nr_hugepages`); their absence shows when the file is mapped (ENOMEM).

    Raises:
        KernelError: ENODEV or EINVAL: no huge pages of this size. EMFILE, ENOMEM, EFBIG.
    """
    flags = abi.MFD_CLOEXEC | abi.MFD_ALLOW_SEALING
    if hugetlb:
        flags |= abi.MFD_HUGETLB
        if hugetlb is not True:
            flags |= (hugetlb.bit_length() - 1) << abi.MFD_HUGE_SHIFT
    try:
        fd = os.memfd_create(name, flags)
    except OSError as error:
        raise KernelError(error.errno or 0, "memfd_create", f"name {name!r}, flags {flags:#x}") from None
    try:
        _resize(fd, size)
        _seal(fd, DEFAULT_SEALS if seal is True else int(seal))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _resize(fd: int, size: int) -> None:
    if not size:
        return
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        raise KernelError(error.errno or 0, "ftruncate", f"size {size}") from None


def _seal(fd: int, bits: int) -> None:
    if not bits:
        return
    try:
        fcntl.fcntl(fd, abi.F_ADD_SEALS, bits)
    except OSError as error:
        raise KernelError(error.errno or 0, "fcntl(F_ADD_SEALS)", f"seals {bits:#x}") from None


def seal(fd: int, bits: int) -> None:
    """Forbid for ever what the bits of `Seal` say.

    Raises:
        KernelError: EPERM: sealed against more seals. EBUSY: a write seal while it is mapped writable.
    """
    _seal(fd, bits)


def seals(fd: int) -> int:
    """Return the bits of `Seal` that are set.

    Raises:
        KernelError: EINVAL: not such a file.
    """
    try:
        return fcntl.fcntl(fd, abi.F_GET_SEALS)
    except OSError as error:
        raise KernelError(error.errno or 0, "fcntl(F_GET_SEALS)") from None


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Drop a range of the file, in every process that maps it; whole pages are freed, parts of pages zeroed.

    A registered page of it is missing again at its next touch, in every mapping. No userfaultfd is told, not
    even with EVENT_REMOVE: that is for `madvise` only.

    Raises:
        KernelError: EPERM: sealed against writing.
    """
    if libc.fallocate(fd, abi.FALLOC_FL_PUNCH_HOLE | abi.FALLOC_FL_KEEP_SIZE, offset, length):
        raise failed("fallocate(PUNCH_HOLE)", f"offset {offset}, length {length}")


def data_extents(fd: int, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
    """Yield the parts of a file that are not holes, as pairs of start and end.

    Each step asks anew, so that a file that changes meanwhile gives a mixture. It moves the file's position,
    which all duplicates of the descriptor share: use `pread` beside it.

    Raises:
        KernelError: Not a file that can be asked.
    """
    end = os.fstat(fd).st_size if end is None else end
    while start < end:
        try:
            first = os.lseek(fd, start, os.SEEK_DATA)
            if first >= end:
                return
            start = os.lseek(fd, first, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == ENXIO:  # no data from here to the end
                return
            raise KernelError(error.errno or 0, "lseek(SEEK_DATA)", f"offset {start}") from None
        yield first, min(start, end)
