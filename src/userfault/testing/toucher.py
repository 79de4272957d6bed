"""Touching memory by address with the GIL released.

``a[0]`` and nearly everything else holds the GIL while it is stopped in a fault. That must work, as the pager
is another process; but a test that is itself the pager, in a thread of its own, needs a touch that lets that
thread run.
"""

from __future__ import annotations

import ctypes

from userfault.kernel.memory import address_of, memmove

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["poke", "touch"]


def touch(address: int, length: int = 1) -> bytes:
    """Read memory. Stops in a fault like any other access; other threads of Python run meanwhile.

    A wrong address kills the process. Any thread; also in a forked child, where the memory of a region is not
    there.
    """
    buffer = ctypes.create_string_buffer(length)
    memmove(address_of(buffer), address, length)
    return buffer.raw


def poke(address: int, data: Buffer) -> None:
    """Write memory; otherwise as ``touch``."""
    memmove(address, address_of(data), memoryview(data).nbytes)
