"""What the kernel knows of each page of a process: /proc/PID/pagemap and PAGEMAP_SCAN.

The file answers page by page; `PAGEMAP_SCAN` (Linux 6.7) answers in ranges, skips what is not there, and can
write-protect what it reports in the same step, so that no write falls between report and protection. Together
with userfaultfd's `WP_ASYNC` that is how changes are tracked: 0.2 ms for an unchanged GiB.

A page of a memfd that is in the file, but not mapped by this process, counts as not present here: these are
facts of page tables, not of files.
"""

from __future__ import annotations

import ctypes
import os
from array import array
from dataclasses import dataclass
from errno import EINVAL, ENOTTY
from fcntl import ioctl
from typing import TYPE_CHECKING, NamedTuple

from userfault.errors import KernelError, UnsupportedError
from userfault.kernel import abi
from userfault.kernel.memory import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Self

__all__ = ["PageEntry", "PageRange", "Pagemap", "ScanResult"]

_MAX_RANGES = 4096  # ranges asked for in one scan unless told otherwise: 96 KiB


@dataclass(frozen=True, slots=True)
class PageEntry:
    """One page's entry.

    Attributes:
        raw: All 64 bits. The page frame number in it is zero without CAP_SYS_ADMIN.
    """

    raw: int

    @property
    def present(self) -> bool:
        """Whether it is mapped to memory."""
        return bool(self.raw & abi.PM_PRESENT)

    @property
    def swapped(self) -> bool:
        """Whether it is swapped out, or stands for something that is not memory, such as a poison marker."""
        return bool(self.raw & abi.PM_SWAP)

    @property
    def file(self) -> bool:
        """Whether it is a page of a file, or shared anonymous."""
        return bool(self.raw & abi.PM_FILE)

    @property
    def uffd_wp(self) -> bool:
        """Whether a userfaultfd protects it against writing."""
        return bool(self.raw & abi.PM_UFFD_WP)

    @property
    def soft_dirty(self) -> bool:
        """Whether it was written since soft-dirty bits were cleared; never where the kernel lacks them."""
        return bool(self.raw & abi.PM_SOFT_DIRTY)

    @property
    def exclusive(self) -> bool:
        """Whether only this process maps it."""
        return bool(self.raw & abi.PM_MMAP_EXCLUSIVE)

    @property
    def guard(self) -> bool:
        """Whether it is a guard region (MADV_GUARD_INSTALL)."""
        return bool(self.raw & abi.PM_GUARD_REGION)


class PageRange(NamedTuple):
    """Pages in a row with the same categories.

    Attributes:
        start: First byte.
        end: The byte after the last.
        categories: Bits of `PageCategory`, of those that were asked for.
    """

    start: int
    end: int
    categories: int


class ScanResult(NamedTuple):
    """What a scan found.

    Attributes:
        ranges: In the order of addresses.
        walk_end: How far it came: less than the end asked for when `max_ranges` or `max_pages` stopped it.
    """

    ranges: list[PageRange]
    walk_end: int


class Pagemap:
    """The page map of a process.

    One descriptor, closed by `close`. Any thread may use it, several at a time. After a fork the child's copy
    still looks at the parent.

    Args:
        pid: The process; this one by default. Another takes the right to trace it.

    Raises:
        KernelError: No such process, or no right.
    """

    __slots__ = ("_fd",)

    def __init__(self, pid: int | str = "self") -> None:
        self._fd = -1
        path = f"/proc/{pid}/pagemap"
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise KernelError(error.errno or 0, f"open({path})") from None

    def close(self) -> None:
        """Close the descriptor. Closing twice is fine."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def fileno(self) -> int:
        """Return the descriptor.

        Raises:
            ValueError: It is closed.
        """
        if self._fd < 0:
            raise ValueError("the page map is closed")
        return self._fd

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def words(self, address: int, length: int) -> array[int]:
        """Return the 64-bit entries of a range's pages, as they are: `abi.PM_...`.

        Raises:
            KernelError: The read failed.
        """
        first, last = address // PAGE_SIZE, -(-(address + length) // PAGE_SIZE)
        try:
            data = os.pread(self.fileno(), 8 * (last - first), 8 * first)
        except OSError as error:
            raise KernelError(error.errno or 0, "pread(pagemap)", f"address {address:#x}") from None
        return array("Q", data)

    def entries(self, address: int, length: int) -> list[PageEntry]:
        """Return the entries of a range's pages.

        Raises:
            KernelError: The read failed.
        """
        return [PageEntry(word) for word in self.words(address, length)]

    def scan(
        self,
        address: int,
        length: int,
        *,
        category_mask: int = 0,
        category_anyof_mask: int = 0,
        category_inverted: int = 0,
        return_mask: int = 0,
        flags: int = 0,
        max_pages: int = 0,
        max_ranges: int = _MAX_RANGES,
    ) -> ScanResult:
        """PAGEMAP_SCAN: find pages by category, and, if asked, protect what is found. Linux 6.7.

        A page is chosen if it has all categories of `category_mask` and, unless that is 0, any of
        `category_anyof_mask`, after those of `category_inverted` have been turned round.

        Args:
            address: Start, page-aligned.
            length: Bytes.
            category_mask: Bits of `PageCategory` that a page must have.
            category_anyof_mask: Bits of which it must have one; 0: does not matter.
            category_inverted: Bits that are turned round before these two are looked at.
            return_mask: Bits to report. Neighbours that are equal in these are one range. 0 means all that
                were asked about in the three others.
            flags: Bits of `ScanFlag`. `WP_MATCHING` write-protects each chosen page (of ranges registered for
                it with the WP_ASYNC feature) in the same step; `CHECK_WPASYNC` makes a range that is not so
                an error.
            max_pages: Stop after this many chosen pages; 0: no limit.
            max_ranges: Stop after this many ranges. 0 with `WP_MATCHING`: protect without reporting.

        Raises:
            UnsupportedError: An older kernel.
            KernelError: EINVAL: not aligned, or unknown bits. EPERM: `CHECK_WPASYNC` found another kind of
                range.
                EFAULT: the address is not one.
        """
        if not return_mask:
            return_mask = category_mask | category_anyof_mask | category_inverted
        size = abi.PAGE_REGION_STRUCT.size
        vector = ctypes.create_string_buffer(size * max_ranges) if max_ranges else None
        arg = bytearray(
            abi.PM_SCAN_ARG_STRUCT.pack(
                abi.PM_SCAN_ARG_STRUCT.size,
                flags,
                address,
                address + length,
                0,
                ctypes.addressof(vector) if vector else 0,
                max_ranges,
                max_pages,
                category_inverted,
                category_mask,
                category_anyof_mask,
                return_mask if vector else 0,
            )
        )
        found = self._scan(arg, f"address {address:#x}, length {length}")
        data = vector.raw[: found * size] if vector else b""
        ranges = [PageRange(*fields) for fields in abi.PAGE_REGION_STRUCT.iter_unpack(data)]
        return ScanResult(ranges, abi.PM_SCAN_ARG_STRUCT.unpack(arg)[4])

    def _scan(self, arg: bytearray, detail: str) -> int:
        try:
            found: int = ioctl(self.fileno(), abi.PAGEMAP_SCAN, arg)
        except OSError as error:
            if error.errno == ENOTTY:
                raise UnsupportedError("ioctl(PAGEMAP_SCAN)", "It needs Linux 6.7 or later.") from None
            raise KernelError(error.errno or EINVAL, "ioctl(PAGEMAP_SCAN)", detail) from None
        return found

    def written(
        self, address: int, length: int, *, protect: bool = False, max_ranges: int = _MAX_RANGES
    ) -> Iterator[tuple[int, int]]:
        """Yield the parts of a range written since it was protected, as pairs of start and end.

        The range must be registered for write protection with the WP_ASYNC feature. As many scans are made as
        it takes, each when the pairs of the one before have been taken.

        Args:
            address: Start, page-aligned.
            length: Bytes.
            protect: Whether to protect anew what is yielded, in the same step.
            max_ranges: Pairs asked for at a time.

        Raises:
            KernelError: EPERM: the range is not registered so.
            UnsupportedError: An older kernel.
        """
        end = address + length
        flags = abi.PM_SCAN_CHECK_WPASYNC | (abi.PM_SCAN_WP_MATCHING if protect else 0)
        while address < end:
            found = self.scan(
                address,
                end - address,
                category_mask=abi.PAGE_IS_WRITTEN,
                flags=flags,
                max_ranges=max_ranges,
            )
            yield from ((start, stop) for start, stop, _ in found.ranges)
            address = found.walk_end
