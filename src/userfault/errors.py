"""Every exception that userfault raises on purpose, as one small tree.

    Error                                everything here
    ├── KernelError (also OSError)       a system call failed: .syscall, .errno
    ├── UnsupportedError                 this machine cannot do it: .capability, .remedy
    ├── StoreError                       the data could not be had: .store, .offset, .length, .attempts, .cause
    ├── RegionClosedError (also ValueError)  you used a region after closing it
    ├── PagerLostError                   the world took the pager away
    └── ProtocolError                    a conversation left its protocol
        ├── LocalProtocolError (also OSError)  your mistake, as an errno: .syscall, .errno
        └── RemoteProtocolError              the peer's

Catch `Error` for all of them. Each one survives `pickle` and `copy` with its attributes, because errors
travel from the pager's processes to the application. Nothing else of userfault is imported here.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = [
    "Error",
    "KernelError",
    "LocalProtocolError",
    "PagerLostError",
    "ProtocolError",
    "RegionClosedError",
    "RemoteProtocolError",
    "StoreError",
    "UnsupportedError",
]


class Error(Exception):
    """Base of everything that userfault raises on purpose."""


class _CallError(OSError):
    """An `OSError` that names the call, and says more."""

    def __init__(self, errno: int, syscall: str, detail: str = "") -> None:
        OSError.__init__(self, errno, os.strerror(errno))
        self.syscall = syscall
        self.detail = detail

    def __str__(self) -> str:
        text = f"{self.syscall}: [Errno {self.errno}] {self.strerror}"
        return f"{text}: {self.detail}" if self.detail else text

    def __reduce__(self) -> tuple[Any, ...]:
        # OSError's own would call us with (errno, strerror), and the name of the call would become its
        # detail.
        return type(self), (self.errno, self.syscall, self.detail), self.__dict__


class KernelError(_CallError, Error):
    """A system call failed.

    It is an `OSError` in every respect (`errno`, `strerror`), and names the call besides.

    Args:
        errno: The error number that the kernel gave.
        syscall: The call as the manual writes it, such as `"ioctl(UFFDIO_COPY)"`.
        detail: What was being done, with the numbers, or what to do about it.
    """


class UnsupportedError(Error):
    """This kernel, or this process's rights, cannot do what was asked; the message ends with what to do.

    Args:
        capability: What is missing, such as `"userfaultfd feature MOVE"`.
        remedy: A sentence: how to get it.
        detail: What was found, in a few words.
    """

    def __init__(self, capability: str, remedy: str, detail: str = "") -> None:
        super().__init__(capability, remedy, detail)
        self.capability = capability
        self.remedy = remedy
        self.detail = detail
        self.kernel = os.uname().release

    def __str__(self) -> str:
        found = f": {self.detail}" if self.detail else ""
        return f"{self.capability} is not available on Linux {self.kernel}{found}. {self.remedy}"


class StoreError(Error):
    """A store could not give, or take, the bytes of a range.

    Args:
        message: What went wrong, in words.
        store: The store's own description.
        offset: First byte of the range, in the store.
        length: Bytes of the range; 0 when it is not about a range.
        attempts: How often it was tried.
        cause: The underlying error as text: the exception itself may not travel between processes.
        permanent: Asking again is of no use: it is not tried again, whatever the region's `RetryPolicy` says.
    """

    def __init__(
        self,
        message: str,
        *,
        store: str = "",
        offset: int = 0,
        length: int = 0,
        attempts: int = 1,
        cause: str = "",
        permanent: bool = False,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.store = store
        self.offset = offset
        self.length = length
        self.attempts = attempts
        self.cause = cause
        self.permanent = permanent

    def __str__(self) -> str:
        text = f"{self.store}: {self.message}" if self.store else self.message
        if self.length:
            text += f" (offset {self.offset}, length {self.length})"
        if self.attempts > 1:
            text += f" after {self.attempts} attempts"
        return f"{text}: {self.cause}" if self.cause else text


class RegionClosedError(Error, ValueError):
    """A region was used after it was closed. The mistake is the caller's, as with a closed file."""


class PagerLostError(Error):
    """The pager is gone and cannot be had again. The mistake is not the caller's."""


class ProtocolError(Error):
    """A conversation left its protocol."""


class LocalProtocolError(_CallError, ProtocolError):
    """This side was about to break the protocol: a programming error here.

    It is an `OSError` as well, with the `errno` that the protocol's specification gives it.

    Args:
        errno: EINVAL, ERANGE or ENOENT.
        syscall: What was called, such as `"write(userfaultfd)"`.
        detail: What was wrong, with the numbers.
    """


class RemoteProtocolError(ProtocolError):
    """The other side broke the protocol, or is not what it should be."""
