"""The userfaultfd descriptor: one method for each operation of `ioctl_userfaultfd(2)`, under its name.

What the kernel does, as far as the code here and its callers rely on it; each statement has a test:

* **A descriptor belongs to the address space that created it**, not to the process that holds it. It may be
  passed with `SCM_RIGHTS`; COPY and its kin then take their *destination* in the creator's memory and their
  *source* in the caller's. MOVE alone has both in the creator's memory, and works in the creating process
  only (EINVAL elsewhere).
* **The last close is silent corruption**: when no copy of the descriptor is left, waiting threads go on and
  find zeros. Whoever cares keeps a copy. A message read by a reader that died is not sent again, until
  UFFDIO_WAKE makes the thread fault anew.
* **Results are signed and may be partial.** COPY, ZEROPAGE, MOVE, CONTINUE and POISON write the bytes done
  into their structure, or a negative errno if there were none; after a partial result the ioctl fails with
  EAGAIN, whatever the reason was, and the next call tells it. An exception would lose the count, so these
  methods return `(done, errno)` and never raise for an errno of the kernel. `fcntl.ioctl` copies its buffer
  back when the call fails too, which is what makes that possible.
* **EAGAIN means a queued event.** While a FORK, REMAP, REMOVE or UNMAP message waits to be read, the kernel
  refuses to change the memory map under its reader: read, then try again. A read hands out faults before
  these messages, whichever came first: read all that is queued before acting.
* **EEXIST means that somebody was first**, often one's own answer to another thread's fault on that page. It
  does not wake anybody: wake the range.
* **UFFDIO_API decides once.** The descriptor is useless before it and refuses a second one (EINVAL). Its
  answer lists everything the kernel knows, its question is what gets enabled. To probe, use another
  descriptor.
* **poll needs O_NONBLOCK**: for a blocking descriptor the kernel reports POLLERR. Blocking reads are for
  threads that do nothing else.
* **A forked child** shares none of this: without EVENT_FORK its copy of a registered range is ordinary
  memory, whose missing pages read as zeros. With it, fork() waits until somebody reads the message.
* **The GIL.** Every call here releases it while the kernel works. That does not help a thread that *touches*
  missing memory from Python while it holds the GIL: a reader in the same interpreter then never runs.

Any method may be called from any thread, and in any process that holds the descriptor. `close` is the
exception, as for any descriptor: another thread's call may then hit a new file of the same number.
"""

from __future__ import annotations

import os
from errno import EINVAL
from fcntl import ioctl
from struct import Struct

from userfault.errors import KernelError
from userfault.kernel import abi
from userfault.kernel.abi import (
    UFFD_MSG_SIZE,
    UFFDIO_CONTINUE,
    UFFDIO_COPY,
    UFFDIO_MOVE,
    UFFDIO_POISON,
    UFFDIO_WAKE,
    UFFDIO_WRITEPROTECT,
    UFFDIO_ZEROPAGE,
)
from userfault.kernel.opening import handshake, open_first

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from userfault.kernel.events import Event
    from userfault.kernel.fdinfo import FdInfo

__all__ = ["Userfaultfd"]

_pack_copy = abi.UFFDIO_COPY_STRUCT.pack
_pack_range_mode = abi.UFFDIO_ZEROPAGE_STRUCT.pack  # ZEROPAGE, CONTINUE and POISON are laid out alike
_pack_write_protect = abi.UFFDIO_WRITEPROTECT_STRUCT.pack
_pack_range = abi.UFFDIO_RANGE_STRUCT.pack
_result_at_24 = Struct("=24xq").unpack
_result_at_32 = Struct("=32xq").unpack


class Userfaultfd:
    """A userfaultfd descriptor, owned by this object.

    The constructor adopts a descriptor that exists already, received over a socket or from a FORK event, and
    asks the kernel nothing. `Userfaultfd.open` makes a new one. Using a closed one raises `ValueError`.

    Args:
        fd: The descriptor. `close` and the garbage collector will close it.
        features: The features enabled by its handshake.
        ioctls: The descriptor-level operations that its handshake reported.
        user_mode_only: Whether it was opened with UFFD_USER_MODE_ONLY: faults inside system calls then fail
            with EFAULT.
        via: How it was had: `"syscall"`, `"device"` or `"adopted"`.

    Attributes:
        features: Bits of `Feature` that are enabled.
        available: Bits of `Feature` that the kernel offers, 0 when adopted.
        ioctls: Bits of `Ioctl`.
    """

    __slots__ = ("__weakref__", "_fd", "available", "features", "ioctls", "user_mode_only", "via")

    def __init__(
        self,
        fd: int,
        *,
        features: int = 0,
        ioctls: int = 0,
        user_mode_only: bool = False,
        via: str = "adopted",
    ) -> None:
        self._fd = fd
        self.features = int(features)
        self.available = 0
        self.ioctls = int(ioctls)
        self.user_mode_only = user_mode_only
        self.via = via

    @classmethod
    def open(
        cls,
        features: int = 0,
        *,
        nonblock: bool = False,
        user_mode_only: bool | None = None,
        via: str | None = None,
    ) -> Self:
        """Make a new descriptor for this process's memory, and shake hands (UFFDIO_API).

        Args:
            features: Bits of `Feature` to enable; all of them or none.
            nonblock: Whether `read` returns at once when nothing is queued. `poll` needs it.
            user_mode_only: `False`: serve faults inside system calls too, which takes privilege. `True`:
                never. `None`: with privilege if it can be had, else without.
            via: `"syscall"` or `"device"` to use just this way in; `None` to try the system call, then the
                device.

        Raises:
            UnsupportedError: A feature is unknown to this kernel, or every way in is closed; then the message
                says for each way which gate refused (seccomp, privilege, file mode), and the remedy.
            KernelError: Anything else, such as EMFILE.
        """
        flags = os.O_CLOEXEC | (os.O_NONBLOCK if nonblock else 0)
        fd, only, road = open_first(flags, user_mode_only, via)
        try:
            available, ioctls = handshake(fd, int(features), road, only)
        except BaseException:
            os.close(fd)
            raise
        self = cls(fd, features=features, ioctls=ioctls, user_mode_only=only, via=road)
        if self.features & abi.UFFD_FEATURE_WP_ASYNC:
            self.features |= abi.UFFD_FEATURE_WP_UNPOPULATED  # the kernel enables it along with WP_ASYNC
        self.available = available
        return self

    def adopt(self, fd: int) -> Userfaultfd:
        """Wrap the descriptor of a FORK event: the child's, with the features of this one."""
        return Userfaultfd(
            fd, features=self.features, ioctls=self.ioctls, user_mode_only=self.user_mode_only, via="adopted"
        )

    # -- the descriptor --------------------------------------------------------------------------------------

    @property
    def fd(self) -> int:
        """The descriptor; -1 when closed."""
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether `close` or `detach` has been called."""
        return self._fd < 0

    def fileno(self) -> int:
        """Return the descriptor, for `select`, `socket.send_fds` and the like.

        Raises:
            ValueError: It is closed.
        """
        if self._fd < 0:
            raise ValueError("the userfaultfd is closed")
        return self._fd

    def detach(self) -> int:
        """Give the descriptor away, without closing it, and count as closed."""
        fd, self._fd = self.fileno(), -1
        return fd

    def close(self) -> None:
        """Close the descriptor. Closing twice is fine.

        Threads that wait in a fault are let go, and find zeros, if no other copy of the descriptor exists.
        """
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # No ResourceWarning: the pager drops these at exit, and an unclosed one harms nobody but its own
        # memory.
        fd, self._fd = getattr(self, "_fd", -1), -1
        if fd >= 0:
            try:
                os.close(fd)
            except OSError:
                pass

    def __repr__(self) -> str:
        state = "closed" if self._fd < 0 else f"fd={self._fd}"
        return f"<Userfaultfd {state} via={self.via} features={self.features:#x}>"

    # -- ranges ----------------------------------------------------------------------------------------------

    def register(self, address: int, length: int, mode: int) -> int:
        """UFFDIO_REGISTER: report faults of `[address, address + length)` from now on.

        Args:
            address: Start, a multiple of the page size.
            length: Bytes, a multiple of the page size.
            mode: Bits of `RegisterMode`.

        Returns:
            Bits of `Ioctl`: what may be done in this range.

        Raises:
            KernelError: EBUSY: another userfaultfd has it. EINVAL: not aligned, no mapping, a kind of memory
                or a mode that is not possible. EPERM: a shared mapping of a file not opened for writing.
        """
        arg = bytearray(abi.UFFDIO_REGISTER_STRUCT.pack(address, length, mode, 0))
        try:
            ioctl(self._fd, abi.UFFDIO_REGISTER, arg)
        except OSError as error:
            raise _range_error(error, "UFFDIO_REGISTER", address, length) from None
        ioctls: int = abi.UFFDIO_REGISTER_STRUCT.unpack(arg)[3]
        return ioctls

    def unregister(self, address: int, length: int) -> None:
        """UFFDIO_UNREGISTER: report no more faults of this range; threads that wait in it are woken.

        Holes that are touched later are filled with zeros by the kernel. Poison markers stay.

        Raises:
            KernelError: EINVAL: not aligned, or no mapping.
        """
        try:
            ioctl(self._fd, abi.UFFDIO_UNREGISTER, _pack_range(address, length))
        except OSError as error:
            raise _range_error(error, "UFFDIO_UNREGISTER", address, length) from None

    def wake(self, address: int, length: int) -> None:
        """UFFDIO_WAKE: let the threads that wait in this range look again.

        A thread whose page is still not there faults anew, and sends a new message.

        Raises:
            KernelError: EINVAL: not aligned.
        """
        try:
            ioctl(self._fd, UFFDIO_WAKE, _pack_range(address, length))
        except OSError as error:
            raise _range_error(error, "UFFDIO_WAKE", address, length) from None

    # -- resolving faults: (bytes done, errno) ---------------------------------------------------------------

    def copy(self, dst: int, src: int, length: int, mode: int = 0) -> tuple[int, int]:
        """UFFDIO_COPY: install pages copied from this process's memory at `src`; none is seen half-filled.

        Args:
            dst: Start of the range in the creator's memory, page-aligned.
            src: Start of the data in this process's memory; any address.
            length: Bytes, a multiple of the page size.
            mode: Bits of `CopyMode`.

        Returns:
            Bytes installed, and an errno: 0 (all done); EAGAIN (stopped on the way: go on from there to learn
            why,
                but read first if nothing was done, for then an event is queued); EEXIST (the page is there);
                ENOENT (no such registered range); EFAULT (the source is not readable); EINVAL (not aligned,
                an unknown mode); ESRCH (the process is gone); ENOMEM, ENOSPC.
        """
        arg = bytearray(_pack_copy(dst, src, length, mode, 0))
        try:
            ioctl(self._fd, UFFDIO_COPY, arg)
        except OSError as error:
            return max(_result_at_32(arg)[0], 0), error.errno or EINVAL
        return length, 0

    def move(self, dst: int, src: int, length: int, mode: int = 0) -> tuple[int, int]:
        """UFFDIO_MOVE: take pages from `src` and install them at `dst`, without copying. Linux 6.8.

        Both ranges lie in the memory of the calling process, which must be the creator; both private and
        anonymous. The source may be registered too: its next touch is then a missing fault.

        Returns:
            Bytes moved, and an errno as for `copy`; besides EBUSY (a source page is shared with a forked
            process, or pinned) and ENOENT (a hole in the source, without ALLOW_SRC_HOLES).
        """
        arg = bytearray(_pack_copy(dst, src, length, mode, 0))
        try:
            ioctl(self._fd, UFFDIO_MOVE, arg)
        except OSError as error:
            return max(_result_at_32(arg)[0], 0), error.errno or EINVAL
        return length, 0

    def zeropage(self, address: int, length: int, mode: int = 0) -> tuple[int, int]:
        """UFFDIO_ZEROPAGE: install pages of zeros.

        Returns:
            Bytes installed, and an errno as for `copy`. EINVAL for hugetlb memory, which has no zero page.
        """
        return self._resolve(UFFDIO_ZEROPAGE, address, length, mode)

    def continue_(self, address: int, length: int, mode: int = 0) -> tuple[int, int]:
        """UFFDIO_CONTINUE: map pages that are in the memory file already. Answers minor faults.

        Returns:
            Bytes mapped, and an errno as for `copy`; EFAULT when the page is not in the file.
        """
        return self._resolve(UFFDIO_CONTINUE, address, length, mode)

    def poison(self, address: int, length: int, mode: int = 0) -> tuple[int, int]:
        """UFFDIO_POISON: make every later touch of pages that are not there a SIGBUS. Linux 6.6.

        In a system call it is EFAULT. COPY replaces the marker; it outlives unregistration.

        Returns:
            Bytes marked, and an errno as for `copy`.
        """
        return self._resolve(UFFDIO_POISON, address, length, mode)

    def _resolve(self, request: int, address: int, length: int, mode: int) -> tuple[int, int]:
        arg = bytearray(_pack_range_mode(address, length, mode, 0))
        try:
            ioctl(self._fd, request, arg)
        except OSError as error:
            return max(_result_at_24(arg)[0], 0), error.errno or EINVAL
        return length, 0

    def write_protect(self, address: int, length: int, mode: int) -> int:
        """UFFDIO_WRITEPROTECT: protect a range (`WriteProtectMode.WP`), or end its protection (0) and wake.

        Returns:
            0, or an errno: ENOENT (not registered for it), EAGAIN (an event is queued: read, then call again;
            doing twice what was done before does no harm), EINVAL, ESRCH (the process is gone).
        """
        try:
            ioctl(self._fd, UFFDIO_WRITEPROTECT, _pack_write_protect(address, length, mode))
        except OSError as error:
            return error.errno or EINVAL
        return 0

    # -- messages --------------------------------------------------------------------------------------------

    def read_raw(self, max_messages: int = 64) -> bytes:
        """Read queued messages, 32 bytes each, as they are; wait for the first if the descriptor blocks.

        Returns:
            A multiple of 32 bytes; none when nothing is queued on a non-blocking descriptor.

        Raises:
            KernelError: The read failed.
        """
        try:
            return os.read(self._fd, UFFD_MSG_SIZE * max_messages)
        except BlockingIOError:
            return b""
        except OSError as error:
            self.fileno()  # ValueError when it is closed
            raise KernelError(error.errno or 0, "read(userfaultfd)") from None

    def read(self, max_messages: int = 64) -> list[Event]:
        """Read queued messages as events; wait for the first if the descriptor blocks.

        The descriptor in a `Fork` event is the caller's to close; `adopt` wraps it.

        Returns:
            Events, faults first, each kind in its order; none when nothing is queued on a non-blocking
            descriptor.

        Raises:
            KernelError: The read failed.
        """
        from userfault.kernel.events import parse

        return parse(self.read_raw(max_messages))

    def fdinfo(self) -> FdInfo:
        """Read what /proc says about this descriptor: messages pending, threads waiting, features enabled.

        Raises:
            KernelError: /proc is not there or not ours to read.
        """
        from userfault.kernel.fdinfo import read_fdinfo

        return read_fdinfo(self.fileno())


def _range_error(error: OSError, request: str, address: int, length: int) -> KernelError:
    return KernelError(error.errno or 0, f"ioctl({request})", f"address {address:#x}, length {length}")
