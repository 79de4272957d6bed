"""The C library, for the few system calls that Python does not wrap.

`ctypes.CDLL` releases the GIL during the call, and keeps `errno` for each thread.
"""

from __future__ import annotations

import ctypes

from userfault.errors import KernelError

__all__ = ["failed", "libc", "libc_syscall"]

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


def libc_syscall(name: str, number: int, *arguments: int) -> int:
    """Make a system call by number; the arguments are integers and addresses.

    Raises:
        KernelError: It failed.
    """
    result: int = libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments))
    if result < 0:
        raise failed(name)
    return result


def failed(name: str, detail: str = "") -> KernelError:
    """Return the error of the call that this thread has just made."""
    return KernelError(ctypes.get_errno(), name, detail)
