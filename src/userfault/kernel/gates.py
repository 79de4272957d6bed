"""Who refused a userfaultfd, and what to do about it.

There are two ways in, the system call and the device, and three gates that can refuse:

* **seccomp**, the filter of a container: it makes the system call fail with EPERM or ENOSYS, whatever rights
  one has. It does not see the device.
* **privilege**: to serve faults inside system calls takes CAP_SYS_PTRACE in the *initial* user namespace, or
  the sysctl `vm.unprivileged_userfaultfd`. With UFFD_USER_MODE_ONLY the kernel asks for nothing, so that a
  refusal of *that* is never privilege: this is how the two are told apart.
* **file mode** of `/dev/userfaultfd`, or the container's rules about devices.

And either may be **absent**: the kernel is too old or was built without it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from errno import EACCES, EINVAL, ENODEV, ENOENT, ENOSYS, ENXIO, EPERM, errorcode
from typing import TYPE_CHECKING, Literal, TypeAlias

from userfault.errors import KernelError, UnsupportedError
from userfault.kernel import abi, process
from userfault.kernel.opening import open_by_device, open_by_syscall

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Gate", "GateName", "device_gate", "explain_refusal", "syscall_gate"]

GateName: TypeAlias = Literal["seccomp", "privilege", "file mode", "absent"]

_SYSCTL = "/proc/sys/vm/unprivileged_userfaultfd"

_ALLOW_SECCOMP = (
    "Let the container's seccomp profile pass userfaultfd(2) (for a trial: --security-opt"
    " seccomp=unconfined), or give it the device, which no filter sees: --device /dev/userfaultfd."
)
_GAIN_PRIVILEGE = (
    "Run as root or with CAP_SYS_PTRACE, or set the sysctl vm.unprivileged_userfaultfd to 1, or get"
    " read and write permission on /dev/userfaultfd. With none of these, user-mode-only descriptors"
    " still work: they serve all faults but those inside system calls."
)
_LOOSEN_MODULE = "A security module such as SELinux refused; its policy must let the process create anon_inode files."
_GAIN_FILE = "Give the user read and write permission on /dev/userfaultfd (chgrp and chmod, or a udev rule)."
_GAIN_DEVICE = "Allow the container this device: --device /dev/userfaultfd (major 10, minor as in /proc/misc)."
_NO_DEVICE = "The device needs Linux 6.1 with CONFIG_USERFAULTFD; a container needs --device /dev/userfaultfd."
_NO_SYSCALL = "It needs Linux 4.3 or later with CONFIG_USERFAULTFD; sandboxes such as gVisor have none."
_NO_USER_MODE = "User-mode-only descriptors need Linux 5.11."
_SOMETHING_ELSE = "This is not a matter of rights; look at the error itself."


@dataclass(frozen=True, slots=True)
class Gate:
    """Whether one way in is open.

    Attributes:
        ok: It is.
        errno: The refusal, or 0.
        gate: Who refused; `None` when open, or when it failed for a reason that is not a gate (EMFILE).
        remedy: What to do, in a sentence; empty when open.
    """

    ok: bool
    errno: int = 0
    gate: GateName | None = None
    remedy: str = ""

    def __str__(self) -> str:
        if self.ok:
            return "open"
        name = errorcode.get(self.errno, str(self.errno))
        if self.gate == "absent":
            return f"{name}: it is absent"
        return f"{name}, refused by {self.gate}" if self.gate else name


def syscall_gate(*, user_mode_only: bool = False) -> Gate:
    """Try the system call, and tell who refuses it."""
    error = _attempt(open_by_syscall, user_mode_only)
    if error is None:
        return Gate(ok=True)
    if error.errno == EINVAL:
        return Gate(ok=False, errno=EINVAL, gate="absent", remedy=_NO_USER_MODE)
    return _judge_syscall(error.errno or 0, user_mode_only=user_mode_only)


def _judge_syscall(errno: int, *, user_mode_only: bool) -> Gate:
    if errno == ENOSYS:
        # The sysctl shows that the kernel has it: then a filter pretends that it has not.
        if os.path.exists(_SYSCTL):
            return Gate(ok=False, errno=errno, gate="seccomp", remedy=_ALLOW_SECCOMP)
        return Gate(ok=False, errno=errno, gate="absent", remedy=_NO_SYSCALL)
    if errno == EACCES:
        return Gate(ok=False, errno=errno, gate="privilege", remedy=_LOOSEN_MODULE)
    if errno != EPERM:
        return Gate(ok=False, errno=errno, remedy=_SOMETHING_ELSE)
    if not user_mode_only and _needs_privilege():
        return Gate(ok=False, errno=errno, gate="privilege", remedy=_GAIN_PRIVILEGE)
    if process.status().get("Seccomp", "0") == "0":
        return Gate(ok=False, errno=errno, gate="privilege", remedy=_LOOSEN_MODULE)
    return Gate(ok=False, errno=errno, gate="seccomp", remedy=_ALLOW_SECCOMP)


def _needs_privilege() -> bool:
    """Whether it was privilege that refused.

    It was if the call that needs none is let through; before 5.11 there is no such call, and we look at what
    we have.
    """
    error = _attempt(open_by_syscall, user_mode_only=True)
    if error is None:
        return True
    return error.errno == EINVAL and not process.has_capability(process.CAP_SYS_PTRACE)


def device_gate(*, user_mode_only: bool = False) -> Gate:
    """Try the device, and tell who refuses it."""
    error = _attempt(open_by_device, user_mode_only)
    if error is None:
        return Gate(ok=True)
    errno = error.errno or 0
    if not error.syscall.startswith("open("):
        gate: GateName | None = "seccomp" if errno in (EPERM, ENOSYS) else None
        return Gate(ok=False, errno=errno, gate=gate, remedy=_ALLOW_SECCOMP if gate else _SOMETHING_ELSE)
    if errno == EACCES:
        return Gate(ok=False, errno=errno, gate="file mode", remedy=_GAIN_FILE)
    if errno == EPERM:
        return Gate(ok=False, errno=errno, gate="file mode", remedy=_GAIN_DEVICE)
    if errno in (ENOENT, ENODEV, ENXIO):
        return Gate(ok=False, errno=errno, gate="absent", remedy=_NO_DEVICE)
    return Gate(ok=False, errno=errno, remedy=_SOMETHING_ELSE)


def _attempt(way: Callable[[int], int], user_mode_only: bool) -> KernelError | None:
    """Open and close a descriptor; return the error, if any."""
    try:
        os.close(way(os.O_CLOEXEC | (abi.UFFD_USER_MODE_ONLY if user_mode_only else 0)))
    except KernelError as error:
        return error
    return None


def explain_refusal(roads: Sequence[str], modes: Sequence[bool]) -> UnsupportedError:
    """Build the error for a userfaultfd that could not be had by these ways (`"syscall"`, `"device"`).

    Args:
        roads: The ways tried.
        modes: The modes tried, `True` for user-mode-only.
    """
    gates = {}
    if "syscall" in roads:
        gates["the system call"] = syscall_gate(user_mode_only=modes[-1])
    if "device" in roads:
        gates[abi.USERFAULTFD_DEVICE] = device_gate(user_mode_only=modes[-1])
    what = "userfaultfd" if modes[-1] else "userfaultfd for faults inside system calls"
    found = "; ".join(f"{way}: {gate}" for way, gate in gates.items())
    remedies = dict.fromkeys(gate.remedy for gate in gates.values() if gate.remedy)
    return UnsupportedError(what, " ".join(remedies), found)
