"""The C library, for the few system calls that Python does not wrap.

`ctypes.CDLL` releases the GIL during the call, and keeps `errno` for each thread.
"""

from __future__ import annotations

import contextlib
import ctypes

from userfault.errors import KernelError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["failed", "libc", "libc_syscall", "naming"]

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


@contextlib.contextmanager
def naming(call: str, detail: str = "") -> Iterator[None]:
    """Have an error of Python's own functions say which system call it was.

    Raises:
        KernelError: In the place of an OSError that is none.
    """
    try:
        yield
    except KernelError:
        raise
    except OSError as error:
        raise KernelError(error.errno or 0, call, detail) from None


def failed(name: str, detail: str = "") -> KernelError:
    """Return the error of the call that this thread has just made."""
    return KernelError(ctypes.get_errno(), name, detail)
