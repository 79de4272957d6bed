"""Giant reservations: terabytes of addresses, of which pieces become memory as they are needed.

The review of the proposal asked for it: a library claims a range of addresses once, gives out pieces, and every piece
has its descriptor, without any other library ever getting in between.

* A range that is mapped PROT_NONE and MAP_NORESERVE costs nothing but addresses, of which a process has 128 TiB on most
  machines: room for one of 64 TiB.
* Each piece that differs from its neighbours, in protection or in registration, is a mapping of its own, and the rest
  of the reservation is cut in two by it: two of `vm.max_map_count` (65530 unless the administrator says otherwise),
  about 32,700 separate pieces.  So pieces are given out from the bottom, side by side; the kernel joins neighbours that
  are alike.
* A piece is registered before it becomes accessible, and inaccessible before it is unregistered.  So nobody reads a
  zero.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
import weakref
from bisect import bisect_left, insort
from errno import ENOMEM
from threading import RLock
from typing import TYPE_CHECKING, Any

from userfault.errors import KernelError
from userfault.kernel import abi, memory
from userfault.kernel.memory import PAGE_SIZE, PROT_NONE, PROT_READ, PROT_WRITE
from userfault.protocol.marks import MARKS
from userfault.protocol.verdicts import explain_limit

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from userfault.protocol.descriptor import Descriptor

_ACCESS = PROT_READ | PROT_WRITE
_NOWHERE = memory.MAP_PRIVATE | memory.MAP_ANONYMOUS | abi.MAP_NORESERVE


class Piece:
    """A part of a reservation that is memory: anonymous, marked, and registered with a descriptor if there is one.

    Made by `Reservation.piece`. Any thread.

    Attributes:
        address: First byte.
        size: Bytes, whole pages.
    """

    def __init__(self, reservation: Reservation, address: int, size: int) -> None:
        self._reservation = reservation
        self._views: list[weakref.ref[Any]] = []
        self.address = address
        self.size = size
        self.closed = False

    @property
    def memory(self) -> memoryview:
        """A view of the piece, writable. While one lives, the piece cannot be closed.

        Raises:
            ValueError: It is closed.
        """
        if self.closed:
            raise ValueError("the piece is closed")
        # ctypes knows no owner of such memory; the view keeps this object, and so this object tells of views.
        window: Any = (ctypes.c_ubyte * self.size).from_address(self.address)
        window.piece = self
        self._views = [view for view in self._views if view() is not None] + [weakref.ref(window)]
        return memoryview(window).cast("B")

    def close(self) -> None:
        """Give it back: a touch is a SIGSEGV from then on, and its addresses may be given out again.

        Raises:
            BufferError: A view of it is alive; nothing is changed.
            KernelError: ENOMEM: `vm.max_map_count` is reached, and a mapping would have to be cut; nothing is changed.
        """
        self._reservation.take_back(self)

    @property
    def exported(self) -> bool:
        """Whether a view of it is alive."""
        return any(view() is not None for view in self._views)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Piece [{self.address:#x}, {self.address + self.size:#x}){' closed' if self.closed else ''}>"


class Reservation:
    """A range of addresses that nobody else gets.

    Any thread. A forked child inherits the addresses, and of the pieces nothing: a touch there is a SIGSEGV.

    Args:
        size: Bytes, rounded up to whole pages; 64 TiB is possible.

    Attributes:
        address: First byte.
        size: Bytes.

    Raises:
        ValueError: The size is not positive.
        KernelError: ENOMEM: there is no room for it.
    """

    def __init__(self, size: int) -> None:
        self.closed = True
        if size <= 0:
            raise ValueError(f"a reservation has at least one byte, not {size}")
        self.size = -(-size // PAGE_SIZE) * PAGE_SIZE
        self._lock = RLock()
        self._pieces: dict[int, Piece] = {}
        self._order: list[int] = []
        """Their addresses, ascending."""
        self._full = 0
        """How many of these stand side by side from the bottom: there is no room before them."""
        self._pid = os.getpid()
        try:
            self.address = memory.map_memory(self.size, prot=PROT_NONE, flags=_NOWHERE)
        except (KernelError, OverflowError, ctypes.ArgumentError) as error:
            detail = f"{self.size} bytes of addresses: a process has 128 TiB on most machines, in one part or several"
            raise KernelError(ENOMEM, "mmap", detail) from error
        self.closed = False

    @property
    def pieces(self) -> list[Piece]:
        """The pieces given out, by address."""
        with self._lock:
            return [self._pieces[address] for address in self._order]

    def piece(self, size: int, descriptor: Descriptor | None = None, *, address: int | None = None) -> Piece:
        """Turn a part of it into memory: zeros nowhere, every page missing.

        Args:
            size: Bytes, rounded up to whole pages.
            descriptor: Who is told of its faults. None: a touch is a SIGBUS, until it is registered.
            address: Where; by default the lowest place with room, side by side with the others.

        Raises:
            ValueError: Not inside the reservation, not free, not at a page; or no room. Nothing is changed.
            KernelError: ENOMEM: `vm.max_map_count` is reached. EBADF: the descriptor is closed.
        """
        size = -(-size // PAGE_SIZE) * PAGE_SIZE
        self._check_open()  # before the lock too: whoever held it at a fork is not in the child
        with self._lock:
            self._check_open()
            at = self._find(size) if address is None else self._check_place(address, size)
            self._give_out(at, size, descriptor)
            piece = self._pieces[at] = Piece(self, at, size)
            insort(self._order, at)
        return piece

    def _find(self, size: int) -> int:
        if size <= 0:
            raise ValueError(f"a piece has at least one byte, not {size}")
        at = self._end_of_full()
        for address in self._order[self._full :]:
            if address - at >= size:
                break
            at = address + self._pieces[address].size
        if at + size > self.address + self.size:
            raise ValueError(f"no room for {size} bytes in {self!r}; close pieces, or reserve more")
        return at

    def _check_place(self, address: int, size: int) -> int:
        end = address + size
        if address % PAGE_SIZE or size <= 0 or address < self.address or end > self.address + self.size:
            raise ValueError(f"{size} bytes at {address:#x} are not whole pages inside {self!r}")
        following = bisect_left(self._order, address)
        for other in self._order[max(following - 1, 0) : following + 1]:
            piece = self._pieces[other]
            if piece.address < end and address < piece.address + piece.size:
                raise ValueError(f"{size} bytes at {address:#x} overlap with {piece!r}")
        return address

    def _end_of_full(self) -> int:
        """Return where the first room may be."""
        last = self._pieces[self._order[self._full - 1]] if self._full else None
        at = last.address + last.size if last else self.address
        while self._full < len(self._order) and self._order[self._full] == at:
            at += self._pieces[at].size
            self._full += 1
        return at

    def _give_out(self, at: int, size: int, descriptor: Descriptor | None) -> None:
        try:
            if descriptor is not None:
                descriptor.register((at, size))  # before the mark: then it never has to change hands
            MARKS.mark(at, at + size, None)
            memory.protect(at, size, _ACCESS)
        except BaseException as error:
            self._undo(at, size)
            if isinstance(error, KernelError) and error.errno == ENOMEM:
                raise explain_limit(error, f"{len(self._pieces)} pieces are given out") from error
            raise

    def _undo(self, at: int, size: int) -> None:
        """Make addresses again of what has not become a piece."""
        try:
            self._withdraw(at, size)
        except KernelError:  # no mapping is left to cut the reservation with; then nothing is accessible yet
            MARKS.unmark(at, at + size)
            MARKS.forget(at, at + size)

    def _withdraw(self, at: int, size: int) -> None:
        """Make addresses of a piece again: inaccessible in one step, with whatever was there."""
        with MARKS.lock:  # or who closes the descriptor meanwhile would give the guard what is no piece any more
            memory.map_memory(size, prot=PROT_NONE, flags=_NOWHERE | abi.MAP_FIXED, address=at)
            MARKS.forget(at, at + size)

    def take_back(self, piece: Piece) -> None:
        """Close a piece: what `Piece.close` does."""
        if self._pid != os.getpid():
            piece.closed = True
            return
        with self._lock:
            if piece.closed:
                return
            if piece.exported:
                raise BufferError(f"a view of {piece!r} is alive: release it first")
            piece.closed = True
            try:
                self._withdraw(piece.address, piece.size)
            except KernelError as error:
                piece.closed = False
                raise explain_limit(error, f"{len(self._pieces)} pieces are given out") from error
            del self._pieces[piece.address]
            place = bisect_left(self._order, piece.address)
            del self._order[place]
            self._full = min(self._full, place)

    def close(self) -> None:
        """Give all of it back. Closing twice is fine; in a forked child it does nothing.

        Raises:
            BufferError: A view of a piece is alive; nothing is changed.
        """
        if self._pid != os.getpid():
            self.closed = True
            return
        with self._lock:
            if self.closed:
                return
            alive = [piece for piece in self._pieces.values() if piece.exported]
            if alive:
                raise BufferError(f"views of {len(alive)} pieces are alive, one of {alive[0]!r}: release them first")
            for piece in self._pieces.values():
                piece.closed = True
            self._pieces.clear()
            self._order.clear()
            self.closed = True
            with MARKS.lock:  # nobody marks what is mapped there next before this is forgotten
                memory.unmap(self.address, self.size)
                MARKS.forget(self.address, self.address + self.size)

    def _check_open(self) -> None:
        if self.closed or self._pid != os.getpid():
            raise ValueError("the reservation is closed, or belongs to the process that this one was forked from")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not self.closed and self._pid == os.getpid() and not sys.is_finalizing():
            try:
                warnings.warn(f"{self!r} was never closed", ResourceWarning, source=self, stacklevel=2)
            finally:  # where warnings are errors too
                self.close()  # views keep their piece, and a piece keeps this: there are none

    def __repr__(self) -> str:
        return f"<Reservation [{self.address:#x}, {self.address + self.size:#x}) {len(self._pieces)} pieces>"
