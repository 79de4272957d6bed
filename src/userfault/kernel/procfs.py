"""Reading files of /proc and /sys."""

from __future__ import annotations

from errno import EAGAIN
from io import FileIO

from userfault.errors import KernelError


def read_text(path: str) -> str:
    """Return such a file as text; whatever no UTF-8 stands for is escaped, as Python does in file names.

    These are generated as they are read: a big read is a snapshot.

    Raises:
        KernelError: naming the call and the file.
    """
    call, parts = "open", []
    try:
        with FileIO(path) as file:  # not a bare descriptor, which a signal's exception would leave open; nor `open`,
            call = "read"  # which is gone when the interpreter ends
            while part := file.read(65536):
                parts.append(part)
    except OSError as error:
        raise KernelError(error.errno or 0, f"{call}({path})") from None
    if part is None:  # what Python makes of EAGAIN
        raise KernelError(EAGAIN, f"read({path})")
    return b"".join(parts).decode("utf-8", "surrogateescape")
