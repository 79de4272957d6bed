"""Which ranges of this process are marked, which descriptor has them, and what the kernel has been told.

In the proposal a mapping had two properties of its own: the advice `MADV_USERFAULT`, and the descriptor it was
registered with.  Both together mean: faults are reported.  The advice alone: a touch is a SIGBUS.  Registration alone:
nothing, a missing page is zeros.  The kernel of today has registration only, so both are kept here, and each range
is registered with its *keeper*:

    =========  ============  =====================================================================================
    marked     registered    keeper
    =========  ============  =====================================================================================
    yes        yes           the descriptor
    yes        no            the *guard*, one userfaultfd of this process with UFFD_FEATURE_SIGBUS, which nobody reads
    no         yes or no     none: ordinary memory
    =========  ============  =====================================================================================

What may never happen is a moment without a keeper between two: see `holes`.

Facts that follow from this being a table beside the kernel's own:

* The kernel forgets a mapping when it is unmapped; this table does not notice.  An address that is used again would
  then be treated as what was there before.  So a buffer that is passed in is held until its range is neither marked nor
  registered: closing an `mmap` before that is a BufferError.  Who passes plain numbers sees to it himself.
* A forked child would find zeros where pages are missing.  So marked memory is not inherited (MADV_DONTFORK), and its
  addresses are reserved in the child: a touch is a SIGSEGV.  Nor is it dumped: that would fault all of it in.
"""

from __future__ import annotations

import contextlib
import functools
import os
from dataclasses import dataclass, replace
from errno import EBUSY, EINVAL, ENOMEM
from threading import RLock, get_ident
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeAlias, TypeVar

from userfault.errors import KernelError, UnsupportedError
from userfault.kernel import abi, memory
from userfault.kernel.maps import query_maps
from userfault.kernel.memory import PAGE_SIZE
from userfault.kernel.userfaultfd import Userfaultfd
from userfault.protocol import holes
from userfault.protocol.constants import GUARD_FEATURES
from userfault.protocol.forked import ForkLock
from userfault.protocol.ranges import RangeMap
from userfault.protocol.verdicts import check_there, explain
from userfault.shield import to_the_end

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer

    Memory: TypeAlias = Buffer | tuple[int, int]

P = ParamSpec("P")
T = TypeVar("T")

_MISSING, _MINOR = abi.UFFDIO_REGISTER_MODE_MISSING, abi.UFFDIO_REGISTER_MODE_MINOR
_REGISTER, _UNREGISTER = "ioctl(UFFDIO_REGISTER)", "ioctl(UFFDIO_UNREGISTER)"
_TOP = 1 << 64


# Compared by identity: to compare what is in `memory` would touch it.
@dataclass(frozen=True, slots=True, eq=False)
class Holding:
    """What is known of a range.

    Attributes:
        marked: MADV_USERFAULT was given.
        owner: The kernel descriptor it is registered with.
        minor: Pages that are in the file must be allowed one by one (a range that was exported).
        memory: What keeps it mapped.
    """

    marked: bool = False
    owner: Userfaultfd | None = None
    minor: bool = False
    memory: object = None

    @property
    def mode(self) -> int:
        """Bits of RegisterMode."""
        return _MISSING | (_MINOR if self.minor else 0)


def _alike(one: Holding, other: Holding) -> bool:
    same = one.owner is other.owner and one.memory is other.memory
    return same and one.marked == other.marked and one.minor == other.minor


def _held(holding: Holding, kept: object) -> Holding:
    """Note what keeps a range mapped, unless something does already."""
    return holding if holding.memory is not None else replace(holding, memory=kept)


def extent(memory_or_range: Memory) -> tuple[int, int, object]:
    """Return start and end of a range, whole pages, and what keeps it mapped.

    Args:
        memory_or_range: A buffer, or a pair of address and length in bytes.

    Raises:
        KernelError: EINVAL: it does not begin at a page, or is empty.
    """
    kept: object = None
    if isinstance(memory_or_range, tuple):
        address, length = memory_or_range
    else:
        view = memoryview(memory_or_range)
        address, length, kept = memory.address_of(view), view.nbytes, view
    if address % PAGE_SIZE or length <= 0:
        detail = f"{length} bytes at {address:#x}: it takes at least one, from a multiple of {PAGE_SIZE} on"
        raise KernelError(EINVAL, "madvise", detail)
    end = address + -(-length // PAGE_SIZE) * PAGE_SIZE
    if address < 0 or end >= _TOP:
        raise KernelError(ENOMEM, "madvise", f"{length} bytes at {address:#x}: beyond all addresses")
    return address, end, kept


def _shielded(method: Callable[Concatenate[Marks, P], T]) -> Callable[Concatenate[Marks, P], T]:
    """Have a method do its work to the end, unless it is called in the middle of other work (by a finalizer)."""

    @functools.wraps(method)
    def call(self: Marks, *args: P.args, **kwargs: P.kwargs) -> T:
        if self.is_locked():
            return method(self, *args, **kwargs)
        return to_the_end(lambda: method(self, *args, **kwargs))

    return call  # type: ignore[return-value]  # mypy knows `self` by its name only


class Marks:
    """The table of this process. Any thread; a forked child begins with an empty one."""

    def __init__(self) -> None:
        self.lock = RLock()
        """Held while ranges change keepers. A finalizer may run while this thread holds it."""
        self._map = RangeMap(_alike)
        self._guard: Userfaultfd | None = None
        self.forked = ForkLock()
        self._at_work = 0
        """The thread that is changing the table."""
        self._dying: list[Userfaultfd] = []
        """Descriptors that a finalizer wanted to close in the middle of that."""
        self._inherited: RangeMap[Holding] | None = None
        """The table of the process that this one was forked from."""

    def is_locked(self) -> bool:
        """Whether the calling thread holds the lock."""
        owned: bool = self.lock._is_owned()  # type: ignore[attr-defined]  # noqa: SLF001  # as threading.Condition does
        return owned

    # -- what changes --------------------------------------------------------------------------------------------

    @_shielded
    def mark(self, start: int, end: int, kept: object) -> None:
        """Missing pages of a range are no longer filled with zeros.

        Raises:
            KernelError: EBUSY: another userfaultfd has it, not one of ours. EINVAL: a kind of memory that cannot be
                marked. ENOMEM: not mapped.
            UnsupportedError: No userfaultfd for this process, or too old a kernel.
        """
        call = "madvise(MADV_USERFAULT)"
        self._change(start, end, lambda old: _held(replace(old, marked=True), kept), call)
        _keep_private(start, end)  # it may have been marked, and be another mapping since

    @_shielded
    def unmark(self, start: int, end: int) -> None:
        """Missing pages of a range are zeros again; threads that wait there find these. It need not be marked."""
        self._change(start, end, lambda old: replace(old, marked=False, minor=False), "madvise(MADV_NOUSERFAULT)")

    @_shielded
    def attach(self, start: int, end: int, uffd: Userfaultfd, kept: object) -> None:
        """Register a range with a descriptor: all of it or nothing.

        Raises:
            KernelError: EBUSY: another descriptor has part of it. EINVAL, ENOMEM: not such memory, or none.
        """
        with self.lock:
            check_there(start, end, _REGISTER)
            self._check_owner(start, end, uffd)
            self._change(start, end, lambda old: _held(replace(old, owner=uffd), kept), _REGISTER)

    @_shielded
    def detach(self, start: int, end: int, uffd: Userfaultfd) -> None:
        """Take a range from a descriptor; parts that it does not have are skipped.

        Raises:
            KernelError: EBUSY: another one has part of it. EINVAL, ENOMEM: no memory is there.
        """
        with self.lock:
            check_there(start, end, _UNREGISTER)
            self._check_owner(start, end, uffd)
            self._change(start, end, lambda old: replace(old, owner=None), _UNREGISTER)

    @_shielded
    def release(self, uffd: Userfaultfd) -> bool:
        """Take all its ranges from a descriptor that is about to be closed; threads that wait there get SIGBUS.

        Returns:
            Whether it may be closed now. If not (a finalizer has come in the middle of a change) it will be.
        """
        return self._release(uffd)

    def _release(self, uffd: Userfaultfd) -> bool:
        with self.lock:
            if self._at_work == get_ident():
                self._dying.append(uffd)
                return False
            for start, end, holding in self.of(uffd):
                if not holding.marked or _still_has(uffd, start, end, holding.mode):
                    self._let_go(start, end)
                else:
                    self._let_go_by_mapping(start, end, uffd, holding.mode)
            return True

    def _let_go(self, start: int, end: int) -> None:
        self._change(start, end, lambda old: replace(old, owner=None), _UNREGISTER)

    def _let_go_by_mapping(self, start: int, end: int, uffd: Userfaultfd, mode: int) -> None:
        """Let go of a range of which parts were unmapped, or are another's by now: there is nobody to protect there."""
        for first, stop, _, _ in list(query_maps(start, end)):
            first, stop = max(first, start), min(stop, end)  # noqa: PLW2901  # the part of the range
            if _still_has(uffd, first, stop, mode):
                self._let_go(first, stop)
        for first, stop, holding in self._map.pieces(start, end):
            if holding is not None and holding.owner is uffd:
                self.forget(first, stop)

    @_shielded
    def make_minor(self, start: int, end: int, uffd: Userfaultfd) -> None:
        """From now on pages that are in the file, and not mapped, are faults too.

        Raises:
            KernelError: EINVAL: the memory is no shared memory file.
        """
        with self.lock:
            self._check_owner(start, end, uffd)
            self._change(start, end, lambda old: replace(old, minor=True), _REGISTER)

    def _check_owner(self, start: int, end: int, uffd: Userfaultfd) -> None:
        for first, stop, holding in self._map.pieces(start, end):
            if holding and holding.owner not in (None, uffd):
                detail = f"[{first:#x}, {stop:#x}) belongs to another descriptor of this process"
                raise KernelError(EBUSY, _REGISTER, detail)

    def forget(self, start: int, end: int) -> None:
        """The memory of a range is gone, and its registration with it: something else is mapped there."""
        with self.lock:
            waiting = {holding.owner for _, _, holding in self._map.pieces(start, end) if holding and holding.owner}
            self._map.replace(start, end, None)
            self._settle()
        for uffd in waiting:
            uffd.wake(start, end - start)

    # -- what is known -------------------------------------------------------------------------------------------

    def of(self, uffd: Userfaultfd) -> list[tuple[int, int, Holding]]:
        """Return the ranges registered with a descriptor."""
        with self.lock:
            return [piece for piece in self._map if piece[2].owner is uffd]

    def keepers(self, start: int, end: int) -> list[Userfaultfd | None]:
        """Return the userfaultfds that a range is registered with in the kernel, in order; None for none."""
        with self.lock:
            return [self._keeper(holding or Holding()) for _, _, holding in self._map.pieces(start, end)]

    # -- telling the kernel --------------------------------------------------------------------------------------

    def _change(self, start: int, end: int, change: Callable[[Holding], Holding], call: str) -> None:
        """Change what is known of a range, piece by piece, and take all of it back if one cannot be changed."""
        done: list[tuple[int, int, Holding, Holding]] = []
        with self.lock:
            before, self._at_work = self._at_work, get_ident()
            try:
                for first, stop, holding in self._map.pieces(start, end):
                    old = holding or Holding()
                    new = change(old)
                    self._tell(first, stop, old, new)
                    done.append((first, stop, old, new))
            except KernelError as error:
                for first, stop, old, new in reversed(done):
                    self._tell(first, stop, new, old)
                self._settle()
                raise explain(error, call, start, end) from error
            else:
                for first, stop, _, new in done:
                    self._map.replace(first, stop, new if new.marked or new.owner else None)
                self._settle()
            finally:
                self._at_work = before
                self._bury()

    def _bury(self) -> None:
        """Close what could not be closed in the middle of a change."""
        while self._dying and not self._at_work:
            uffd = self._dying.pop()
            self._release(uffd)
            uffd.close()

    def _settle(self) -> None:
        """Leave nothing behind when nothing is marked any more."""
        if len(self._map):
            return
        self.forked.close()
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.close()

    def _tell(self, start: int, end: int, old: Holding, new: Holding) -> None:
        giver, taker = self._keeper(old), self._keeper(new)
        if giver is not None and not _still_has(giver, start, end, old.mode):
            giver = None
        if giver is taker:
            if taker is not None and old.minor != new.minor:
                taker.register(start, end - start, new.mode)
        elif giver is None and taker is not None:
            taker.register(start, end - start, new.mode)  # first: of memory that is refused nothing may be changed
            try:
                _keep_private(start, end)
            except KernelError:
                taker.unregister(start, end - start)
                with contextlib.suppress(KernelError):  # where there is a hole
                    _inherit(start, end)
                raise
        elif giver is not None and taker is None:
            giver.unregister(start, end - start)
            _inherit(start, end)
        elif giver is not None and taker is not None:
            with self.forked.exclude_children():
                _hand_over(start, end, (giver, old), (taker, new))

    def _keeper(self, holding: Holding) -> Userfaultfd | None:
        if not holding.marked:
            return None
        return holding.owner or self.guard()

    def guard(self) -> Userfaultfd:
        """Return the userfaultfd behind marked memory that no descriptor has; open it if there is none.

        Raises:
            UnsupportedError: There is none for this process, or the kernel is too old.
        """
        with self.lock:
            if self._guard is None:
                self._guard = open_with_move(GUARD_FEATURES, nonblock=True)
            return self._guard

    # -- fork ----------------------------------------------------------------------------------------------------

    def prepare_fork(self) -> None:
        """Before a fork: the child may become the pager of what is marked."""
        if len(self._map):
            self.forked.prepare()

    def begin_in_child(self) -> None:
        """In a forked child: reserve the addresses that were not inherited, and begin anew."""
        self.forked.begin_in_child()
        self.lock = RLock()
        for start, end, holding in self._map:
            if holding.marked:
                flags = memory.MAP_PRIVATE | memory.MAP_ANONYMOUS | abi.MAP_NORESERVE | abi.MAP_FIXED_NOREPLACE
                with contextlib.suppress(KernelError):  # taken within microseconds of the fork
                    memory.map_memory(end - start, prot=memory.PROT_NONE, flags=flags, address=start)
        self._inherited = self._map  # its buffers are held: their end here must not unmap what is not ours
        self._map = RangeMap(_alike)
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.close()


def open_with_move(features: int, *, nonblock: bool, user_mode_only: bool | None = None) -> Userfaultfd:
    """Open a userfaultfd with these features, and with MOVE if the kernel has it (6.8).

    Raises:
        UnsupportedError, KernelError: As `Userfaultfd.open`.
    """
    try:
        return Userfaultfd.open(features | abi.UFFD_FEATURE_MOVE, nonblock=nonblock, user_mode_only=user_mode_only)
    except UnsupportedError:
        return Userfaultfd.open(features, nonblock=nonblock, user_mode_only=user_mode_only)


def _hand_over(start: int, end: int, giver: tuple[Userfaultfd, Holding], taker: tuple[Userfaultfd, Holding]) -> None:
    """Pass a range from one userfaultfd to another, without a moment in which a touch finds zeros."""
    (old, before), (new, after) = giver, taker
    poisoned = holes.poison_holes(old, start, end, unmapped=before.minor)
    try:
        old.unregister(start, end - start)  # whoever waits there looks again, and meets the poison
        try:
            new.register(start, end - start, after.mode)
        except KernelError:
            old.register(start, end - start, before.mode)
            raise
    finally:
        holes.cure(poisoned)


def _still_has(uffd: Userfaultfd, start: int, end: int, mode: int) -> bool:
    """Whether a range is what it was: somebody may have unmapped it, and it may even be another's by now."""
    try:
        uffd.register(start, end - start, mode)
    except KernelError as error:
        if error.errno not in (EBUSY, EINVAL):
            raise
        return False
    return True


def _keep_private(start: int, end: int) -> None:
    for advice in (abi.MADV_DONTFORK, abi.MADV_DONTDUMP):
        memory.advise(start, end - start, advice)


def _inherit(start: int, end: int) -> None:
    for advice in (abi.MADV_DOFORK, abi.MADV_DODUMP):
        memory.advise(start, end - start, advice)


MARKS = Marks()
os.register_at_fork(before=MARKS.prepare_fork, after_in_child=MARKS.begin_in_child)
