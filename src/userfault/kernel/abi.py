"""The numbers that userfaultfd and its neighbours have in common with the kernel.

Each constant carries the kernel's own name, so that a reader of `userfaultfd(2)`, `ioctl_userfaultfd(2)`,
`madvise(2)`, `memfd_create(2)` or `PAGEMAP_SCAN(2const)` finds it by searching, and the version that brought
it. They are written out here, never taken from headers of the machine that builds: a header knows what was
new when it was packaged, while the running kernel decides what works. A test compares all of them with the C
compiler.

The flag classes keep bits they do not know (a newer kernel may report some), and are integers: hot paths use
the plain constants. No policy and no system call lives here.
"""

from __future__ import annotations

import os
from enum import KEEP, IntEnum, IntFlag
from struct import Struct

# ------------------------------------------------------------------------------------------------------------
# ioctl request numbers, <asm-generic/ioctl.h>. Four old architectures divide the word differently.

_MACHINE = os.uname().machine
_ODD = _MACHINE.startswith(("ppc", "mips", "sparc", "alpha"))
_SIZE_BITS = 13 if _ODD else 14
_IOC_NONE, _IOC_READ, _IOC_WRITE = (1, 2, 4) if _ODD else (0, 2, 1)


def _IOC(direction: int, kind: int, number: int, size: int) -> int:  # noqa: N802 - the kernel's name
    """Build an ioctl request number as the kernel's macro of this name does."""
    return direction << (16 + _SIZE_BITS) | size << 16 | kind << 8 | number


def _IOR(kind: int, number: int, layout: Struct) -> int:  # noqa: N802
    return _IOC(_IOC_READ, kind, number, layout.size)


def _IOWR(kind: int, number: int, layout: Struct) -> int:  # noqa: N802
    return _IOC(_IOC_READ | _IOC_WRITE, kind, number, layout.size)


# ------------------------------------------------------------------------------------------------------------
# userfaultfd: structures. Result fields (the last of COPY, ZEROPAGE, MOVE, CONTINUE, POISON) are signed: the
#     kernel
# writes a negative errno there when nothing was done.

UFFDIO_API_STRUCT = Struct("=QQQ")  # api, features, ioctls
UFFDIO_RANGE_STRUCT = Struct("=QQ")  # start, len
UFFDIO_REGISTER_STRUCT = Struct("=QQQQ")  # start, len, mode, ioctls
UFFDIO_COPY_STRUCT = Struct("=QQQQq")  # dst, src, len, mode, copy
UFFDIO_ZEROPAGE_STRUCT = Struct("=QQQq")  # start, len, mode, zeropage
UFFDIO_MOVE_STRUCT = Struct("=QQQQq")  # dst, src, len, mode, move
UFFDIO_WRITEPROTECT_STRUCT = Struct("=QQQ")  # start, len, mode
UFFDIO_CONTINUE_STRUCT = Struct("=QQQq")  # start, len, mode, mapped
UFFDIO_POISON_STRUCT = Struct("=QQQq")  # start, len, mode, updated

UFFD_MSG_STRUCT = Struct("=B7xQQQ")  # event, then three words whose meaning depends on it
UFFD_MSG_PAGEFAULT_STRUCT = Struct("=B7xQQI4x")  # event, flags, address, thread id
UFFD_MSG_FORK_STRUCT = Struct("=B7xI20x")  # event, new descriptor
UFFD_MSG_REMAP_STRUCT = UFFD_MSG_STRUCT  # event, from, to, len
UFFD_MSG_RANGE_STRUCT = Struct("=B7xQQ8x")  # event, start, end: REMOVE and UNMAP
UFFD_MSG_SIZE = UFFD_MSG_STRUCT.size

# userfaultfd: the ways in

_SYSCALL_NUMBERS = {  # 4.3; architectures that came later share the generic table's 282
    "x86_64": 323,
    "i386": 374,
    "i686": 374,
    "armv7l": 388,
    "armv8l": 388,
    "ppc64le": 364,
    "ppc64": 364,
    "s390x": 355,
    "sparc64": 363,
    "mips64": 5317,
}
NR_userfaultfd = _SYSCALL_NUMBERS.get(_MACHINE, 282)
NR_process_madvise = 440  # 5.10, the same everywhere since system calls are numbered together

UFFD_USER_MODE_ONLY = 1  # 5.11; flag of userfaultfd(2)
USERFAULTFD_IOC_NEW = _IOC(_IOC_NONE, 0xAA, 0x00, 0)  # 6.1; on the device, the flags are its argument
USERFAULTFD_DEVICE = "/dev/userfaultfd"  # 6.1

# userfaultfd: requests. UNREGISTER and WAKE are _IOR though the kernel reads: a mistake of 4.3 that stays.

_UFFD = 0xAA
UFFD_API = 0xAA

_UFFDIO_REGISTER = 0x00
_UFFDIO_UNREGISTER = 0x01
_UFFDIO_WAKE = 0x02
_UFFDIO_COPY = 0x03
_UFFDIO_ZEROPAGE = 0x04
_UFFDIO_MOVE = 0x05
_UFFDIO_WRITEPROTECT = 0x06
_UFFDIO_CONTINUE = 0x07
_UFFDIO_POISON = 0x08
_UFFDIO_API = 0x3F

UFFDIO_API = _IOWR(_UFFD, _UFFDIO_API, UFFDIO_API_STRUCT)  # 4.3
UFFDIO_REGISTER = _IOWR(_UFFD, _UFFDIO_REGISTER, UFFDIO_REGISTER_STRUCT)  # 4.3
UFFDIO_UNREGISTER = _IOR(_UFFD, _UFFDIO_UNREGISTER, UFFDIO_RANGE_STRUCT)  # 4.3
UFFDIO_WAKE = _IOR(_UFFD, _UFFDIO_WAKE, UFFDIO_RANGE_STRUCT)  # 4.3
UFFDIO_COPY = _IOWR(_UFFD, _UFFDIO_COPY, UFFDIO_COPY_STRUCT)  # 4.3
UFFDIO_ZEROPAGE = _IOWR(_UFFD, _UFFDIO_ZEROPAGE, UFFDIO_ZEROPAGE_STRUCT)  # 4.3
UFFDIO_MOVE = _IOWR(_UFFD, _UFFDIO_MOVE, UFFDIO_MOVE_STRUCT)  # 6.8
UFFDIO_WRITEPROTECT = _IOWR(_UFFD, _UFFDIO_WRITEPROTECT, UFFDIO_WRITEPROTECT_STRUCT)  # 5.7
UFFDIO_CONTINUE = _IOWR(_UFFD, _UFFDIO_CONTINUE, UFFDIO_CONTINUE_STRUCT)  # 5.13
UFFDIO_POISON = _IOWR(_UFFD, _UFFDIO_POISON, UFFDIO_POISON_STRUCT)  # 6.6


class Bits(IntFlag, boundary=KEEP):
    """An integer of bits with names, which keeps those that have none."""

    def __invert__(self) -> int:  # type: ignore[override]
        # The library's own would clear unknown bits in `flags & ~Feature.MOVE`.
        return ~int(self)


class Ioctl(Bits):
    """What may be done: the `ioctls` word of UFFDIO_API (descriptor) and of UFFDIO_REGISTER (range)."""

    REGISTER = 1 << _UFFDIO_REGISTER
    UNREGISTER = 1 << _UFFDIO_UNREGISTER
    WAKE = 1 << _UFFDIO_WAKE
    COPY = 1 << _UFFDIO_COPY
    ZEROPAGE = 1 << _UFFDIO_ZEROPAGE
    MOVE = 1 << _UFFDIO_MOVE
    WRITEPROTECT = 1 << _UFFDIO_WRITEPROTECT
    CONTINUE = 1 << _UFFDIO_CONTINUE
    POISON = 1 << _UFFDIO_POISON
    API = 1 << _UFFDIO_API


# userfaultfd: features

UFFD_FEATURE_PAGEFAULT_FLAG_WP = 1 << 0  # 5.7
UFFD_FEATURE_EVENT_FORK = 1 << 1  # 4.11; needs CAP_SYS_PTRACE since 5.4
UFFD_FEATURE_EVENT_REMAP = 1 << 2  # 4.11
UFFD_FEATURE_EVENT_REMOVE = 1 << 3  # 4.11
UFFD_FEATURE_MISSING_HUGETLBFS = 1 << 4  # 4.11
UFFD_FEATURE_MISSING_SHMEM = 1 << 5  # 4.11
UFFD_FEATURE_EVENT_UNMAP = 1 << 6  # 4.11
UFFD_FEATURE_SIGBUS = 1 << 7  # 4.14
UFFD_FEATURE_THREAD_ID = 1 << 8  # 4.14
UFFD_FEATURE_MINOR_HUGETLBFS = 1 << 9  # 5.13
UFFD_FEATURE_MINOR_SHMEM = 1 << 10  # 5.14
UFFD_FEATURE_EXACT_ADDRESS = 1 << 11  # 5.18
UFFD_FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12  # 5.19
UFFD_FEATURE_WP_UNPOPULATED = 1 << 13  # 6.4
UFFD_FEATURE_POISON = 1 << 14  # 6.6
UFFD_FEATURE_WP_ASYNC = 1 << 15  # 6.7; turns WP_UNPOPULATED on as well
UFFD_FEATURE_MOVE = 1 << 16  # 6.8


class Feature(Bits):
    """What a userfaultfd can do, asked for and answered by UFFDIO_API."""

    PAGEFAULT_FLAG_WP = UFFD_FEATURE_PAGEFAULT_FLAG_WP
    EVENT_FORK = UFFD_FEATURE_EVENT_FORK
    EVENT_REMAP = UFFD_FEATURE_EVENT_REMAP
    EVENT_REMOVE = UFFD_FEATURE_EVENT_REMOVE
    MISSING_HUGETLBFS = UFFD_FEATURE_MISSING_HUGETLBFS
    MISSING_SHMEM = UFFD_FEATURE_MISSING_SHMEM
    EVENT_UNMAP = UFFD_FEATURE_EVENT_UNMAP
    SIGBUS = UFFD_FEATURE_SIGBUS
    THREAD_ID = UFFD_FEATURE_THREAD_ID
    MINOR_HUGETLBFS = UFFD_FEATURE_MINOR_HUGETLBFS
    MINOR_SHMEM = UFFD_FEATURE_MINOR_SHMEM
    EXACT_ADDRESS = UFFD_FEATURE_EXACT_ADDRESS
    WP_HUGETLBFS_SHMEM = UFFD_FEATURE_WP_HUGETLBFS_SHMEM
    WP_UNPOPULATED = UFFD_FEATURE_WP_UNPOPULATED
    POISON = UFFD_FEATURE_POISON
    WP_ASYNC = UFFD_FEATURE_WP_ASYNC
    MOVE = UFFD_FEATURE_MOVE


# The first kernel with each feature, lowest bit first.
_SINCE = "5.7 4.11 4.11 4.11 4.11 4.11 4.11 4.14 4.14 5.13 5.14 5.18 5.19 6.4 6.6 6.7 6.8"
FEATURE_SINCE = dict(zip(Feature, _SINCE.split(" "), strict=True))

# userfaultfd: modes

UFFDIO_REGISTER_MODE_MISSING = 1 << 0  # 4.3
UFFDIO_REGISTER_MODE_WP = 1 << 1  # 5.7
UFFDIO_REGISTER_MODE_MINOR = 1 << 2  # 5.13
UFFDIO_COPY_MODE_DONTWAKE = 1 << 0  # 4.3
UFFDIO_COPY_MODE_WP = 1 << 1  # 5.7
UFFDIO_ZEROPAGE_MODE_DONTWAKE = 1 << 0  # 4.3
UFFDIO_MOVE_MODE_DONTWAKE = 1 << 0  # 6.8
UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES = 1 << 1  # 6.8
UFFDIO_WRITEPROTECT_MODE_WP = 1 << 0  # 5.7; without it the protection is taken away
UFFDIO_WRITEPROTECT_MODE_DONTWAKE = 1 << 1  # 5.7; not together with WP
UFFDIO_CONTINUE_MODE_DONTWAKE = 1 << 0  # 5.13
UFFDIO_CONTINUE_MODE_WP = 1 << 1  # 6.4
UFFDIO_POISON_MODE_DONTWAKE = 1 << 0  # 6.6


class RegisterMode(Bits):
    """Which faults of a range are reported."""

    MISSING = UFFDIO_REGISTER_MODE_MISSING
    WP = UFFDIO_REGISTER_MODE_WP
    MINOR = UFFDIO_REGISTER_MODE_MINOR


class CopyMode(Bits):
    """How UFFDIO_COPY installs."""

    DONTWAKE = UFFDIO_COPY_MODE_DONTWAKE
    WP = UFFDIO_COPY_MODE_WP


class ZeropageMode(Bits):
    """How UFFDIO_ZEROPAGE installs."""

    DONTWAKE = UFFDIO_ZEROPAGE_MODE_DONTWAKE


class MoveMode(Bits):
    """How UFFDIO_MOVE moves."""

    DONTWAKE = UFFDIO_MOVE_MODE_DONTWAKE
    ALLOW_SRC_HOLES = UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES


class WriteProtectMode(Bits):
    """What UFFDIO_WRITEPROTECT does."""

    WP = UFFDIO_WRITEPROTECT_MODE_WP
    DONTWAKE = UFFDIO_WRITEPROTECT_MODE_DONTWAKE


class ContinueMode(Bits):
    """How UFFDIO_CONTINUE maps."""

    DONTWAKE = UFFDIO_CONTINUE_MODE_DONTWAKE
    WP = UFFDIO_CONTINUE_MODE_WP


class PoisonMode(Bits):
    """How UFFDIO_POISON marks."""

    DONTWAKE = UFFDIO_POISON_MODE_DONTWAKE


# userfaultfd: messages

UFFD_EVENT_PAGEFAULT = 0x12  # 4.3
UFFD_EVENT_FORK = 0x13  # 4.11
UFFD_EVENT_REMAP = 0x14  # 4.11
UFFD_EVENT_REMOVE = 0x15  # 4.11
UFFD_EVENT_UNMAP = 0x16  # 4.11

UFFD_PAGEFAULT_FLAG_WRITE = 1 << 0  # 4.3
UFFD_PAGEFAULT_FLAG_WP = 1 << 1  # 5.7
UFFD_PAGEFAULT_FLAG_MINOR = 1 << 2  # 5.13


class EventKind(IntEnum):
    """The first byte of a message."""

    PAGEFAULT = UFFD_EVENT_PAGEFAULT
    FORK = UFFD_EVENT_FORK
    REMAP = UFFD_EVENT_REMAP
    REMOVE = UFFD_EVENT_REMOVE
    UNMAP = UFFD_EVENT_UNMAP


class FaultFlag(Bits):
    """What kind of fault a PAGEFAULT message reports. Missing is the absence of WP and MINOR."""

    WRITE = UFFD_PAGEFAULT_FLAG_WRITE
    WP = UFFD_PAGEFAULT_FLAG_WP
    MINOR = UFFD_PAGEFAULT_FLAG_MINOR


# ------------------------------------------------------------------------------------------------------------
# Mappings and advice, <asm-generic/mman-common.h>. mmap(2)'s own flags are in the standard library's mmap
# module, but # for these.

_MIPS, _OLD = _MACHINE.startswith("mips"), _MACHINE.startswith(("ppc", "sparc"))
MAP_NORESERVE = 0x400 if _MIPS else 0x40 if _OLD else 0x4000
MAP_FIXED = 0x10
MAP_FIXED_NOREPLACE = 0x100000  # 4.17
MAP_HUGETLB = 0x80000 if _MIPS else 0x40000  # 2.6.32
EHWPOISON = 168 if _MIPS else 135 if _MACHINE == "sparc64" else 133  # errno of a poisoned page; Python has no name
MREMAP_MAYMOVE = 1
MREMAP_FIXED = 2
MREMAP_DONTUNMAP = 4  # 5.7

MADV_NORMAL = 0
MADV_RANDOM = 1
MADV_SEQUENTIAL = 2
MADV_WILLNEED = 3
MADV_DONTNEED = 4
MADV_FREE = 8  # 4.5
MADV_REMOVE = 9
MADV_DONTFORK = 10
MADV_DOFORK = 11
MADV_MERGEABLE = 12
MADV_UNMERGEABLE = 13
MADV_HUGEPAGE = 14
MADV_NOHUGEPAGE = 15
MADV_DONTDUMP = 16
MADV_DODUMP = 17
MADV_WIPEONFORK = 18  # 4.14
MADV_KEEPONFORK = 19  # 4.14
MADV_COLD = 20  # 5.4
MADV_PAGEOUT = 21  # 5.4
MADV_POPULATE_READ = 22  # 5.14
MADV_POPULATE_WRITE = 23  # 5.14
MADV_DONTNEED_LOCKED = 24  # 5.18
MADV_COLLAPSE = 25  # 6.1
MADV_HWPOISON = 100
MADV_SOFT_OFFLINE = 101
MADV_GUARD_INSTALL = 102  # 6.13
MADV_GUARD_REMOVE = 103  # 6.13

# memfd_create(2), <linux/memfd.h>; fcntl(2) seals, fallocate(2)

MFD_CLOEXEC = 1 << 0  # 3.17
MFD_ALLOW_SEALING = 1 << 1  # 3.17
MFD_HUGETLB = 1 << 2  # 4.14
MFD_NOEXEC_SEAL = 1 << 3  # 6.3
MFD_EXEC = 1 << 4  # 6.3
MFD_HUGE_SHIFT = 26

F_ADD_SEALS = 1033  # 3.17
F_GET_SEALS = 1034  # 3.17
F_SEAL_SEAL = 1 << 0  # 3.17
F_SEAL_SHRINK = 1 << 1  # 3.17
F_SEAL_GROW = 1 << 2  # 3.17
F_SEAL_WRITE = 1 << 3  # 3.17; forbids punching holes too
F_SEAL_FUTURE_WRITE = 1 << 4  # 5.1
F_SEAL_EXEC = 1 << 5  # 6.3

FALLOC_FL_KEEP_SIZE = 1 << 0
FALLOC_FL_PUNCH_HOLE = 1 << 1


class Seal(Bits):
    """What can never again be done to a memfd."""

    SEAL = F_SEAL_SEAL
    SHRINK = F_SEAL_SHRINK
    GROW = F_SEAL_GROW
    WRITE = F_SEAL_WRITE
    FUTURE_WRITE = F_SEAL_FUTURE_WRITE
    EXEC = F_SEAL_EXEC


# ------------------------------------------------------------------------------------------------------------
# /proc/PID/pagemap and PAGEMAP_SCAN, 6.7, <linux/fs.h>

PAGE_REGION_STRUCT = Struct("=QQQ")  # start, end, categories
# size, flags, start, end, walk_end, vec, vec_len, max_pages, category_inverted, _mask, _anyof_mask,
# return_mask
PM_SCAN_ARG_STRUCT = Struct("=12Q")
PAGEMAP_SCAN = _IOWR(ord("f"), 16, PM_SCAN_ARG_STRUCT)

# size, query_flags, query_addr, vma_start, vma_end, vma_flags, vma_page_size, vma_offset, inode, dev_major, dev_minor,
# vma_name_size, build_id_size, vma_name_addr, build_id_addr
PROCMAP_QUERY_STRUCT = Struct("=9Q4I2Q")
PROCMAP_QUERY = _IOWR(ord("f"), 17, PROCMAP_QUERY_STRUCT)  # 6.11; on /proc/PID/maps
PROCMAP_QUERY_VMA_READABLE = 0x01
PROCMAP_QUERY_VMA_WRITABLE = 0x02
PROCMAP_QUERY_VMA_EXECUTABLE = 0x04
PROCMAP_QUERY_COVERING_OR_NEXT_VMA = 0x10

PM_SCAN_WP_MATCHING = 1 << 0
PM_SCAN_CHECK_WPASYNC = 1 << 1

PAGE_IS_WPALLOWED = 1 << 0
PAGE_IS_WRITTEN = 1 << 1
PAGE_IS_FILE = 1 << 2
PAGE_IS_PRESENT = 1 << 3
PAGE_IS_SWAPPED = 1 << 4
PAGE_IS_PFNZERO = 1 << 5
PAGE_IS_HUGE = 1 << 6
PAGE_IS_SOFT_DIRTY = 1 << 7
PAGE_IS_GUARD = 1 << 8  # 6.15

PM_SOFT_DIRTY = 1 << 55
PM_MMAP_EXCLUSIVE = 1 << 56  # 4.2
PM_UFFD_WP = 1 << 57  # 5.13
PM_GUARD_REGION = 1 << 58  # 6.15
PM_FILE = 1 << 61
PM_SWAP = 1 << 62
PM_PRESENT = 1 << 63


class PageCategory(Bits):
    """What PAGEMAP_SCAN can say of a page, and be asked to select by."""

    WPALLOWED = PAGE_IS_WPALLOWED
    WRITTEN = PAGE_IS_WRITTEN
    FILE = PAGE_IS_FILE
    PRESENT = PAGE_IS_PRESENT
    SWAPPED = PAGE_IS_SWAPPED
    PFNZERO = PAGE_IS_PFNZERO
    HUGE = PAGE_IS_HUGE
    SOFT_DIRTY = PAGE_IS_SOFT_DIRTY
    GUARD = PAGE_IS_GUARD


class ScanFlag(Bits):
    """What PAGEMAP_SCAN does besides reporting."""

    WP_MATCHING = PM_SCAN_WP_MATCHING
    CHECK_WPASYNC = PM_SCAN_CHECK_WPASYNC


# The library gives every class of flags an inversion of its own, over the one that it inherits.
for _kind in Bits.__subclasses__():
    _kind.__invert__ = Bits.__invert__  # type: ignore[method-assign]
