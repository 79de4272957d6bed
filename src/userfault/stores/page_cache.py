"""What of a file is in the page cache, so that reading it would not wait.

Some facts about the page cache
-------------------------------
* ``mincore(2)`` needs a mapping, walks it page by page, and **says yes to everything** if the caller neither
  owns the file nor may write to it (since Linux 5.2, against side channels). Not used.
* ``cachestat(2)`` (Linux 6.5) counts the cached pages of a range of a descriptor, large folios in one step.
  It says EPERM where mincore would lie (since 6.14). It counts pages that are still being read.
* ``preadv2(2)`` with ``RWF_NOWAIT`` (Linux 4.14) tells the truth, page being read included, and needs no
  right but to read. Asked about pages that are not there it **starts to read them**, and submitting that
  takes the caller 10 to 100 µs, now and then milliseconds. Not every file system can; tmpfs cannot.

What this means for us
----------------------
Ask ``cachestat`` first where it may be asked; believe a "no"; have a "yes" confirmed by ``RWF_NOWAIT``. Where
the kernel does not say, ``RWF_NOWAIT`` alone is right, and slower on cold files. Where the file system does
not know ``RWF_NOWAIT``, nothing is hot, but for tmpfs: its pages are never being read, unless they were
swapped out, and then they do not count. `benchmarks/hot_or_cold.py` measures all of them.
"""

from __future__ import annotations

import ctypes
import os
from errno import EOPNOTSUPP
from mmap import PAGESIZE

__all__ = ["CANNOT", "NOWAIT", "PLAIN", "cached", "reading_mode", "try_read"]

_NR_CACHESTAT = 451
_TMPFS_MAGIC = 0x01021994  # linux/magic.h

NOWAIT = os.RWF_NOWAIT
"""Reading mode: the file system tells by itself when it would wait."""
PLAIN = 0
"""Reading mode: what is cached can be read without waiting (tmpfs)."""
CANNOT = -1
"""Reading mode: nothing can be read here without perhaps waiting."""

# PyDLL keeps the GIL: the call takes a few microseconds, and getting the GIL back from another thread might
# take 5 ms.
_syscall = ctypes.PyDLL(None).syscall
_syscall.restype = ctypes.c_long
_NUMBER = ctypes.c_long(_NR_CACHESTAT)
_NO_FLAGS = ctypes.c_long(0)
_Call = ctypes.c_uint64 * 7  # struct cachestat_range: off, len; then struct cachestat: nr_cache and four more
_ANSWER = 16  # where the second begins


def cached(fd: int, offset: int, length: int) -> bool | None:
    """Tell whether all pages of a range, inside the file, are in the page cache or on their way there.

    Returns:
        ``None`` when the kernel does not say: before Linux 6.5, under some seccomp filters, on hugetlbfs, and
        for files that the caller neither owns nor may write.
    """
    call = _Call(offset, length)
    if _syscall(_NUMBER, fd, call, ctypes.byref(call, _ANSWER), _NO_FLAGS):
        return None
    pages = (offset + length - 1) // PAGESIZE - offset // PAGESIZE + 1
    return int(call[2]) == pages


def try_read(fd: int, buffer: memoryview | bytearray, offset: int, mode: int) -> int:
    """Read what can be read without waiting.

    Args:
        fd: The file.
        buffer: What to fill.
        offset: First byte, in the file.
        mode: ``NOWAIT``, or ``PLAIN`` for a range that ``cached`` has just said yes to.

    Returns:
        Bytes read; 0 when it would have to wait. -1: the file system does not know ``RWF_NOWAIT``.
    """
    try:
        return os.preadv(fd, (buffer,), offset, mode)
    except BlockingIOError:
        return 0
    except OSError as error:
        return -1 if error.errno == EOPNOTSUPP else 0


def reading_mode(fd: int) -> int:
    """Return how to read from this file without waiting: ``NOWAIT``, ``PLAIN`` or ``CANNOT``."""
    if try_read(fd, bytearray(1), 0, NOWAIT) >= 0:
        return NOWAIT
    return PLAIN if _is_tmpfs(fd) else CANNOT


def _is_tmpfs(fd: int) -> bool:
    answer = (ctypes.c_long * 32)()  # struct statfs is 120 bytes, of which f_type is the first word
    failed = ctypes.CDLL(None).fstatfs(ctypes.c_int(fd), answer)
    return not failed and int(answer[0]) == _TMPFS_MAGIC
