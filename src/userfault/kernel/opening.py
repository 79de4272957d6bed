"""How a userfaultfd is had: the system call, the device, and the handshake that follows.

`Userfaultfd.open` is made of these. What is refused here is explained in `gates`, which is imported only
then.
"""

from __future__ import annotations

import os
from errno import EACCES, EINVAL, ENODEV, ENOENT, ENOSYS, ENXIO, EPERM
from fcntl import ioctl

from userfault.errors import KernelError, UnsupportedError
from userfault.kernel import abi
from userfault.kernel.syscalls import libc_syscall

__all__ = ["describe_features", "handshake", "open_by_device", "open_by_syscall", "open_first"]

# Refusals after which another way in is worth trying; anything else (EMFILE, ENOMEM) would be the same there.
# EINVAL: a kernel before 5.11 does not know UFFD_USER_MODE_ONLY.
_CLOSED_DOOR = frozenset({EPERM, EACCES, ENOSYS, ENOENT, ENODEV, ENXIO, EINVAL})


def open_by_syscall(flags: int) -> int:
    """Make a descriptor by `userfaultfd(2)`, without a handshake.

    Raises:
        KernelError: Refused.
    """
    return libc_syscall("userfaultfd", abi.NR_userfaultfd, flags)


def open_by_device(flags: int) -> int:
    """Make a descriptor by `/dev/userfaultfd`, without a handshake. Linux 6.1; the file's mode decides.

    Raises:
        KernelError: Refused; `syscall` tells whether by open or by the ioctl.
    """
    name = f"open({abi.USERFAULTFD_DEVICE})"
    try:
        device = os.open(abi.USERFAULTFD_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise KernelError(error.errno or 0, name) from None
    try:
        return ioctl(device, abi.USERFAULTFD_IOC_NEW, flags)
    except OSError as error:
        raise KernelError(error.errno or 0, "ioctl(USERFAULTFD_IOC_NEW)") from None
    finally:
        os.close(device)


_ROADS = {"syscall": open_by_syscall, "device": open_by_device}


def open_first(flags: int, user_mode_only: bool | None, via: str | None) -> tuple[int, bool, str]:
    """Try the ways in, the most able first; return the descriptor, whether user-mode-only, and the way."""
    if via not in (None, *_ROADS):
        raise ValueError(f"via must be 'syscall', 'device' or None, not {via!r}")
    roads = (via,) if via else tuple(_ROADS)
    modes = (False, True) if user_mode_only is None else (user_mode_only,)
    refused: list[KernelError] = []
    for only in modes:
        for road in roads:
            try:
                return _ROADS[road](flags | (abi.UFFD_USER_MODE_ONLY if only else 0)), only, road
            except KernelError as error:
                if error.errno not in _CLOSED_DOOR:
                    raise
                # Its traceback would hold this frame, and with it whatever the callers hold, in a circle.
                refused.append(error.with_traceback(None))
    from userfault.kernel.gates import explain_refusal

    raise explain_refusal(roads, modes) from refused[0]


def handshake(fd: int, features: int, road: str, only: bool) -> tuple[int, int]:
    """UFFDIO_API. Return the features that the kernel offers, and the operations."""
    arg = bytearray(abi.UFFDIO_API_STRUCT.pack(abi.UFFD_API, features, 0))
    try:
        ioctl(fd, abi.UFFDIO_API, arg)
    except OSError as error:
        if features:
            _explain_features(features, error.errno or 0, road, only)
        raise KernelError(error.errno or 0, "ioctl(UFFDIO_API)", f"features {features:#x}") from None
    _api, available, ioctls = abi.UFFDIO_API_STRUCT.unpack(arg)
    return available, ioctls


def _explain_features(features: int, errno: int, road: str, only: bool) -> None:
    """Raise UnsupportedError if UFFDIO_API refused the features; the kernel does not say which."""
    if errno == EPERM and features & abi.UFFD_FEATURE_EVENT_FORK:
        raise UnsupportedError(
            "userfaultfd feature EVENT_FORK",
            "Run as root or with CAP_SYS_PTRACE in the initial user namespace, or do without this feature.",
            "the kernel demands CAP_SYS_PTRACE for it, however the descriptor was opened",
        ) from None
    probe = _ROADS[road](os.O_CLOEXEC | (abi.UFFD_USER_MODE_ONLY if only else 0))
    try:
        missing = features & ~handshake(probe, 0, road, only)[0]
    finally:
        os.close(probe)
    if missing:
        names, remedy = describe_features(missing)
        raise UnsupportedError(f"userfaultfd feature {names}", remedy, "UFFDIO_API refused it") from None


def describe_features(bits: int) -> tuple[str, str]:
    """Name feature bits, and say in a sentence which kernel has them all."""
    known = [feature for feature in abi.Feature if feature & bits]
    names = [feature.name or "" for feature in known]
    unknown = bits & ~sum(known)
    if unknown:
        names.append(f"{unknown:#x} (no name known)")
        return ", ".join(names), "Do without it, or use a kernel that is newer than this library."
    versions = [abi.FEATURE_SINCE[feature] for feature in known]
    newest = max(versions, key=lambda version: [int(part) for part in version.split(".")])
    return ", ".join(names), f"It needs Linux {newest} or later, configured for it."
