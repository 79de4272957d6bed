"""Memory by address: mapping, advice, and views of what is there.

Addresses are plain integers, as everywhere in userfault. **Nothing here owns memory**: whoever maps a range
unmaps it, and a view of a range that has been unmapped kills the process at its next use.

All functions may be called from any thread; the GIL is released while the kernel works.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from errno import ENOMEM
from struct import pack

from userfault.errors import KernelError
from userfault.kernel import abi
from userfault.kernel.syscalls import failed, libc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

__all__ = [
    "MAP_ANONYMOUS",
    "MAP_PRIVATE",
    "MAP_SHARED",
    "PAGE_SIZE",
    "PROT_NONE",
    "PROT_READ",
    "PROT_WRITE",
    "address_of",
    "advise",
    "fetch",
    "is_mapped",
    "map_memory",
    "memmove",
    "mincore",
    "populate",
    "process_advise",
    "protect",
    "remap",
    "unmap",
    "view",
]

PAGE_SIZE = mmap.PAGESIZE
PROT_NONE = 0
PROT_READ = mmap.PROT_READ
PROT_WRITE = mmap.PROT_WRITE
MAP_SHARED = mmap.MAP_SHARED
MAP_PRIVATE = mmap.MAP_PRIVATE
MAP_ANONYMOUS = mmap.MAP_ANONYMOUS

_MS_ASYNC = 1
_IOV_MAX = 1024  # ranges that the kernel takes in one call

_size, _pointer, _int = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
libc.mmap.argtypes = (_pointer, _size, _int, _int, _int, ctypes.c_int64)
libc.mmap.restype = ctypes.c_ssize_t
libc.munmap.argtypes = (_pointer, _size)
libc.mprotect.argtypes = libc.madvise.argtypes = (_pointer, _size, _int)
libc.mremap.argtypes = (_pointer, _size, _size, _int, _pointer)
libc.mremap.restype = ctypes.c_ssize_t
_process_madvise = ctypes.CDLL(None, use_errno=True).syscall  # an object of its own, with types of its own
_process_madvise.argtypes = (ctypes.c_long, _int, ctypes.c_char_p, _size, _int, ctypes.c_uint)
_process_madvise.restype = ctypes.c_long
libc.msync.argtypes = (_pointer, _size, _int)
libc.write.argtypes = (_int, _pointer, _size)
libc.write.restype = ctypes.c_ssize_t
libc.mincore.argtypes = (_pointer, _size, ctypes.c_char_p)


def map_memory(
    length: int,
    *,
    fd: int = -1,
    offset: int = 0,
    prot: int = PROT_READ | PROT_WRITE,
    flags: int | None = None,
    address: int = 0,
) -> int:
    """Map memory, and return its address (`mmap(2)`).

    Args:
        length: Bytes.
        fd: The file to map; none by default.
        offset: Where in the file, a multiple of the page size.
        prot: `PROT_` bits of the `mmap` module.
        flags: `MAP_` bits. By default shared for a file, and private, anonymous and unreserved without one.
        address: Where; a hint unless the flags say MAP_FIXED or MAP_FIXED_NOREPLACE.

    Raises:
        KernelError: Refused.
    """
    if flags is None:
        flags = MAP_SHARED if fd >= 0 else MAP_PRIVATE | MAP_ANONYMOUS | abi.MAP_NORESERVE
    if fd < 0:
        flags |= MAP_ANONYMOUS
    result: int = libc.mmap(address or None, length, prot, flags, fd, offset)
    if result == -1:
        raise failed("mmap", f"length {length}, fd {fd}, offset {offset}")
    return result


def unmap(address: int, length: int) -> None:
    """Unmap a range (`munmap(2)`). Every view of it is deadly from now on.

    Raises:
        KernelError: Not aligned, or too many mappings would remain.
    """
    if libc.munmap(address, length):
        raise failed("munmap", f"address {address:#x}, length {length}")


def protect(address: int, length: int, prot: int) -> None:
    """Change what may be done with a range (`mprotect(2)`).

    Raises:
        KernelError: Refused; ENOMEM when `vm.max_map_count` is reached.
    """
    if libc.mprotect(address, length, prot):
        raise failed("mprotect", f"address {address:#x}, length {length}, prot {prot}")


def remap(address: int, old_length: int, new_length: int, *, flags: int = abi.MREMAP_MAYMOVE, to: int = 0) -> int:
    """Move or resize a mapping, and return its new address (`mremap(2)`).

    A registered range stays registered only with the EVENT_REMAP feature.

    Raises:
        KernelError: Refused.
    """
    result: int = libc.mremap(address, old_length, new_length, flags, to or None)
    if result == -1:
        raise failed("mremap", f"address {address:#x}, length {old_length} to {new_length}")
    return result


def advise(address: int, length: int, advice: int) -> None:
    """Tell the kernel something about a range (`madvise(2)`); `abi.MADV_...`.

    Raises:
        KernelError: Refused, or not known to this kernel.
    """
    if libc.madvise(address, length, advice):
        raise failed("madvise", f"address {address:#x}, length {length}, advice {advice}")


def process_advise(pidfd: int, ranges: Sequence[tuple[int, int]], advice: int) -> tuple[int, int]:
    """Tell the kernel something about many ranges of a process at once (`process_madvise(2)`). Linux 5.10.

    Args:
        pidfd: The process. Advice that destroys data (DONTNEED, FREE) is taken for the caller itself only.
        ranges: Pairs of address and length; any number.
        advice: `abi.MADV_...`.

    Returns:
        Bytes done, and the errno that stopped it or 0.
    """
    done = 0
    for start in range(0, len(ranges), _IOV_MAX):
        batch = ranges[start : start + _IOV_MAX]
        vector = pack(f"@{2 * len(batch)}N", *(number for pair in batch for number in pair))
        result = _process_madvise(abi.NR_process_madvise, pidfd, vector, len(batch), advice, 0)
        if result < 0:
            return done, ctypes.get_errno()
        done += result
        if result < sum(length for _, length in batch):
            return done, _errno_of_rest(pidfd, batch, result, advice)
    return done, 0


def _errno_of_rest(pidfd: int, batch: Sequence[tuple[int, int]], done: int, advice: int) -> int:
    """Ask again for the range that stopped a call: a partial result of process_madvise hides its errno."""
    for address, length in batch:
        if done < length:
            return process_advise(pidfd, [(address + done, length - done)], advice)[1]
        done -= length
    return 0


def populate(address: int, length: int, *, write: bool = False) -> None:
    """Bring in all pages of a range, as reads or as writes would (MADV_POPULATE_READ or _WRITE). Linux 5.14.

    Faults of registered ranges are reported, and waited for, unless the userfaultfd is user-mode-only: then
    EFAULT.

    Raises:
        KernelError: EFAULT; `abi.EHWPOISON` for a poisoned page; ENOMEM where nothing is mapped.
    """
    advise(address, length, abi.MADV_POPULATE_WRITE if write else abi.MADV_POPULATE_READ)


def mincore(address: int, length: int) -> bytes:
    """Tell which pages are in memory: one byte for each page, odd if so (`mincore(2)`).

    For a file's mapping this asks the page cache, whether or not the page is mapped; only for files that the
    caller may write or owns. Otherwise every page counts as in memory.

    Raises:
        KernelError: Not aligned, or not mapped.
    """
    answer = ctypes.create_string_buffer(-(-length // PAGE_SIZE))
    if libc.mincore(address, length, answer):
        raise failed("mincore", f"address {address:#x}, length {length}")
    return answer.raw


def is_mapped(address: int, length: int) -> bool:
    """Whether every page of a range is mapped: with MS_ASYNC that is all that msync(2) looks at.

    Raises:
        KernelError: Not aligned.
    """
    if not libc.msync(address, length, _MS_ASYNC):
        return True
    error = failed("msync", f"address {address:#x}, length {length}")
    if error.errno == ENOMEM:
        return False
    raise error


def memmove(dst: int, src: int, length: int) -> None:
    """Copy memory by address, with the GIL released.

    So it is the one way to touch memory that a thread of the same interpreter serves. A wrong address kills
    the process.
    """
    ctypes.memmove(dst, src, length)


def fetch(address: int, length: int) -> bytes:
    """Copy a few bytes of memory through the kernel: what cannot be read is an error instead of a signal.

    Args:
        address: Where; whatever it may be.
        length: Bytes, at most 4096 (PIPE_BUF).

    Raises:
        KernelError: EFAULT: not all of it can be read. EMFILE: it takes two descriptors.
    """
    if not length:
        return b""
    try:
        reader, writer = os.pipe2(os.O_CLOEXEC)
    except OSError as error:
        raise KernelError(error.errno or 0, "pipe2") from None
    try:
        if libc.write(writer, address, length) != length:
            raise failed("write", f"address {address:#x}, length {length}")
        return _read(reader, length)
    finally:
        os.close(reader)
        os.close(writer)


def _read(fd: int, length: int) -> bytes:
    try:
        return os.read(fd, length)
    except OSError as error:
        raise KernelError(error.errno or 0, "read", f"length {length}") from None


# -- buffers -------------------------------------------------------------------------------------------------

_PyBUF_READ, _PyBUF_WRITE = 0x100, 0x200
_PyBUF_ANY_CONTIGUOUS = 0x80 | 0x10 | 0x08

_memory_view = ctypes.pythonapi.PyMemoryView_FromMemory
_memory_view.argtypes = (_pointer, ctypes.c_ssize_t, _int)
_memory_view.restype = ctypes.py_object


class _PyBuffer(ctypes.Structure):
    """`Py_buffer`: part of the stable ABI since Python 3.11."""

    _fields_ = (
        ("buf", _pointer),
        ("obj", _pointer),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", _int),
        ("ndim", _int),
        ("format", _pointer),
        ("shape", _pointer),
        ("strides", _pointer),
        ("suboffsets", _pointer),
        ("internal", _pointer),
    )


_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = (ctypes.py_object, ctypes.POINTER(_PyBuffer), _int)
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = (ctypes.POINTER(_PyBuffer),)
_release_buffer.restype = None


def view(address: int, length: int, readonly: bool = False) -> memoryview:
    """Look at memory as a `memoryview` of unsigned bytes.

    **It does not own the memory, and nobody counts it.** It is good for as long as the range is mapped; after
    that, any use of it, or of anything made from it, kills the process or hits what has been mapped there
    since. Keep it where the mapping is kept, and `release()` it before unmapping.
    """
    result: memoryview = _memory_view(address, length, _PyBUF_READ if readonly else _PyBUF_WRITE)
    return result


def address_of(buffer: Buffer) -> int:
    """Return the address of a buffer's bytes; read-only buffers too.

    It is good for as long as the object lives and is not resized: the caller keeps it.

    Raises:
        TypeError: Not a buffer.
        BufferError: Not contiguous.
    """
    found = _PyBuffer()
    _get_buffer(buffer, found, _PyBUF_ANY_CONTIGUOUS)
    address: int | None = found.buf
    _release_buffer(found)
    return address or 0
