"""What this machine offers to this process, found by trying.

`probe` opens and closes a few descriptors and leaves nothing behind. Bits that this library does not know are
kept, so that a newer kernel's features can be seen, and asked for by number.
"""

from __future__ import annotations

import functools
import os
from dataclasses import asdict, dataclass
from errno import ENOSYS

from userfault.errors import KernelError, UnsupportedError
from userfault.kernel import abi, memfd, memory, process
from userfault.kernel.abi import Feature, Ioctl, RegisterMode
from userfault.kernel.gates import Gate, device_gate, syscall_gate
from userfault.kernel.opening import describe_features
from userfault.kernel.pagemap import Pagemap
from userfault.kernel.userfaultfd import Userfaultfd

__all__ = ["Capabilities", "Gate", "capabilities", "probe"]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What the kernel, and this process's rights, allow.

    Attributes:
        kernel: Its release, such as `"6.8.0-31-generic"`.
        page_size: Bytes.
        features: What userfaultfd offers, unknown bits included. EVENT_FORK is listed whether or not this
            process may ask for it: see `event_fork`.
        api_ioctls: Operations on a descriptor.
        anonymous_ioctls: Operations on a range of anonymous memory, registered in all modes that work.
        memfd_ioctls: The same for a memfd.
        syscall: Whether the system call gives a privileged descriptor, and if not, why.
        device: The same for /dev/userfaultfd.
        privileged: Whether a descriptor can be had that serves faults inside system calls.
        user_mode_only: Whether one can be had that serves the others.
        event_fork: Whether this process may follow forks.
        memfd: Whether there are files in memory with seals.
        memfd_hugetlb: Whether they may be of huge pages (which must be reserved besides).
        huge_pages_free: Reserved huge pages of the default size that nobody uses.
        process_madvise: Whether advice can be given for many ranges at once.
        pagemap_scan: Whether changed pages can be found in one call.
    """

    kernel: str
    page_size: int
    features: Feature
    api_ioctls: Ioctl
    anonymous_ioctls: Ioctl
    memfd_ioctls: Ioctl
    syscall: Gate
    device: Gate
    privileged: bool
    user_mode_only: bool
    event_fork: bool
    memfd: bool
    memfd_hugetlb: bool
    huge_pages_free: int
    process_madvise: bool
    pagemap_scan: bool

    @property
    def usable(self) -> bool:
        """Whether there is any userfaultfd for this process."""
        return self.privileged or self.user_mode_only

    @property
    def missing_faults(self) -> bool:
        """Whether missing pages of a memfd can be served: what regions are made of."""
        return self.usable and self.memfd and self.has(Feature.MISSING_SHMEM)

    @property
    def minor_faults(self) -> bool:
        """Whether pages that are in a memfd can be mapped by permission (CONTINUE)."""
        return self.has(Feature.MINOR_SHMEM) and bool(self.memfd_ioctls & Ioctl.CONTINUE)

    @property
    def write_protect(self) -> bool:
        """Whether the first write to a page of a memfd can be seen."""
        return self.has(Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM)

    @property
    def dirty_tracking(self) -> bool:
        """Whether changes can be tracked without stopping the writer."""
        return self.has(Feature.WP_ASYNC) and self.pagemap_scan

    @property
    def poison(self) -> bool:
        """Whether a page can be made to fail."""
        return self.has(Feature.POISON)

    @property
    def move(self) -> bool:
        """Whether pages can be moved without copying."""
        return self.has(Feature.MOVE)

    def has(self, features: int) -> bool:
        """Tell whether the kernel offers all of these features."""
        return not self.missing(features)

    def missing(self, features: int) -> Feature:
        """Return those of these features that the kernel does not offer."""
        return Feature(int(features) & ~int(self.features))

    def require(self, features: int) -> None:
        """Do nothing if the kernel offers all of these features.

        Raises:
            UnsupportedError: Naming those that are missing, and the kernel that has them.
        """
        missing = self.missing(features)
        if missing:
            names, remedy = describe_features(int(missing))
            raise UnsupportedError(f"userfaultfd feature {names}", remedy)

    def as_dict(self) -> dict[str, object]:
        """Return plain values, for JSON: flags as lists of names, unknown bits in hexadecimal."""
        plain = asdict(self)
        for name in ("features", "api_ioctls", "anonymous_ioctls", "memfd_ioctls"):
            plain[name] = _names(getattr(self, name))
        return plain


def _names(flags: Feature | Ioctl) -> list[str]:
    names = [flag.name or "" for flag in flags]
    unknown = int(flags) & ~sum(type(flags))
    return [*names, hex(unknown)] if unknown else names


def probe() -> Capabilities:
    """Find out, anew: rights may have changed since, by setuid for example.

    Raises:
        KernelError: Out of descriptors or memory.
    """
    syscall, device = syscall_gate(), device_gate()
    privileged = syscall.ok or device.ok
    user_mode_only = syscall_gate(user_mode_only=True).ok or device_gate(user_mode_only=True).ok
    available = api_ioctls = 0
    if privileged or user_mode_only:
        with Userfaultfd.open() as uffd:
            available, api_ioctls = uffd.available, uffd.ioctls
    return Capabilities(
        kernel=os.uname().release,
        page_size=memory.PAGE_SIZE,
        features=Feature(available),
        api_ioctls=Ioctl(api_ioctls),
        anonymous_ioctls=_range_ioctls(available, -1),
        memfd_ioctls=_memfd_ioctls(available),
        syscall=syscall,
        device=device,
        privileged=privileged,
        user_mode_only=user_mode_only,
        event_fork=_event_fork(available),
        memfd=_memfd(hugetlb=False),
        memfd_hugetlb=_memfd(hugetlb=True),
        huge_pages_free=process.huge_pages_free(),
        process_madvise=_process_madvise(),
        pagemap_scan=_pagemap_scan(),
    )


@functools.cache
def capabilities() -> Capabilities:
    """Return what was found the first time that this process asked. `probe` asks anew.

    Raises:
        KernelError: Out of descriptors or memory.
    """
    return probe()


def _range_ioctls(available: int, fd: int) -> Ioctl:
    """Return what may be done with a page of this file (or of none), over all modes that it can be in."""
    found = Ioctl(0)
    if not available:
        return found
    # These features concern only the kinds of memory that may be registered.
    kinds = available & (Feature.MISSING_SHMEM | Feature.MINOR_SHMEM | Feature.WP_HUGETLBFS_SHMEM)
    page = memory.map_memory(memory.PAGE_SIZE, fd=fd)
    try:
        with Userfaultfd.open(kinds) as uffd:
            for mode in RegisterMode:
                try:
                    found |= Ioctl(uffd.register(page, memory.PAGE_SIZE, mode))
                except KernelError:
                    continue
    finally:
        memory.unmap(page, memory.PAGE_SIZE)
    return found


def _memfd_ioctls(available: int) -> Ioctl:
    if not available or not _memfd(hugetlb=False):
        return Ioctl(0)
    fd = memfd.create("userfault-probe", memory.PAGE_SIZE)
    try:
        return _range_ioctls(available, fd)
    finally:
        os.close(fd)


def _event_fork(available: int) -> bool:
    if not available & Feature.EVENT_FORK:
        return False
    try:
        Userfaultfd.open(Feature.EVENT_FORK).close()
    except UnsupportedError:
        return False
    return True


def _memfd(*, hugetlb: bool) -> bool:
    try:
        os.close(memfd.create("userfault-probe", hugetlb=hugetlb))
    except KernelError:
        return False
    return True


def _process_madvise() -> bool:
    try:
        pidfd = process.pidfd_open(os.getpid())
    except KernelError:
        return False
    try:
        return memory.process_advise(pidfd, [(0, 0)], abi.MADV_COLD)[1] != ENOSYS
    finally:
        os.close(pidfd)


def _pagemap_scan() -> bool:
    try:
        with Pagemap() as pagemap:
            pagemap.scan(0, memory.PAGE_SIZE, category_mask=abi.PAGE_IS_PRESENT)
    except (KernelError, UnsupportedError):
        return False
    return True
