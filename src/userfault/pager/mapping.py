"""The application's side of a region's memory: mapping it, ending it, forking with it.

Some facts
----------
* `mmap.mmap` counts the buffers that are exported from it, and refuses to close while there are any.  That count is
  why the memory is an `mmap` object.  But it also keeps a duplicate of its descriptor for ever (until Python 3.13's
  `trackfd=False`), and a thousand regions would be a thousand descriptors.  So the object is made over nothing, and
  the memfd is mapped over its addresses (`MAP_FIXED`); when it unmaps them it does the right thing.
* Addresses that are unmapped may be used again at once, by another region too.  A `UFFDIO_COPY` of a worker
  that did not yet know would land in it.  So the worker is told first and answers before anything is unmapped.
* A page that exists is believed, whoever made it.  A process that has called `mlockall(MCL_FUTURE)` populates each new
  mapping at once, with zeros.  So the memfd is mapped inaccessible first, then registered, then opened.
* When a range leaves userfaultfd its holes read as zeros.  So at the end inaccessible memory is mapped over the range,
  in one step, and only then are those woken who may still wait there: they meet SIGSEGV, never a zero.
* A signal handler may raise at the first step of any function of Python, before its first line.  If that is `__del__`
  the object goes, and its addresses with it, while the worker still serves the region.  Nobody else must be served at
  those addresses; so whatever has gone like that is ended before another region opens.
* `MADV_DONTFORK`: a child does not inherit the range.  But it inherits the Python object, which will one day unmap
  those addresses, whatever the child has there by then.  So in the child they are reserved right after the fork.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import mmap
import os
import sys
import time
import weakref

from userfault.blocks import ledger as book
from userfault.blocks.ledger import Layout, Ledger
from userfault.errors import Error, KernelError, PagerLostError, StoreError
from userfault.kernel import abi, memfd, memory
from userfault.kernel.syscalls import naming
from userfault.pager import link, wire
from userfault.pager.wire import Message
from userfault.shield import to_the_end

TYPE_CHECKING = False
if TYPE_CHECKING:
    from userfault.blocks.geometry import Geometry
    from userfault.kernel.userfaultfd import Userfaultfd
    from userfault.pager.client import Pager
    from userfault.pager.link import Link
    from userfault.pager.recipe import Recipe
    from userfault.retry import RetryPolicy

MODES = {"r": book.READ_ONLY, "c": book.COPY_ON_WRITE, "r+": book.READ_WRITE}
_RESERVED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | abi.MAP_NORESERVE

_UNMAPPED_AT_ONCE = 256 << 20
"""Bytes: 7 ms, in which nobody can fork, nor open or close a region."""

_alive: weakref.WeakSet[Mapping] = weakref.WeakSet()
_open: dict[weakref.ref[Mapping], tuple[Link, int]] = {}
"""Regions that the pager serves, as far as is known here: on which link, and by which name."""
_lost: list[weakref.ref[Mapping]] = []
"""Those of them whose memory has gone without a word to the pager."""


class Terms:
    """How a region is served."""

    __slots__ = ("automatic", "budget", "mode", "retries", "sync_interval")

    def __init__(
        self, mode: str, budget: int | None, retries: RetryPolicy, sync_interval: float | None, *, automatic: bool
    ) -> None:
        self.mode = mode
        self.budget = budget
        self.automatic = automatic
        """Whether nobody has asked for just this budget."""
        self.retries = retries
        self.sync_interval = sync_interval
        """Seconds; None: nothing is written back but for the budget, at a flush and at the end."""


class Mapping(mmap.mmap):
    """The memory of one region. When the last reference goes (also by the views of it), the region ends."""

    address: int
    length: int
    ledger: Ledger
    identity: int
    writes_back: bool
    automatic: bool
    """Whether its budget is."""
    pager: Pager
    link: Link
    _file: int = -1
    """Its memfd, until the pager has it."""
    _owner: int
    _tie: weakref.ref[Mapping]
    """What `_open` knows it by."""

    def begin(
        self,
        pager: Pager,
        identity: int,
        geometry: Geometry,
        terms: Terms,
        recipe: Recipe,
    ) -> None:
        """Put a fresh region in place of the empty memory. `file` is its memfd, for the pager.

        Raises:
            KernelError: naming the call; this object is then to be dropped.
        """
        self.pager, self.link, self.identity, self._owner = pager, pager.link, identity, 0
        self.address, self.length = memory.address_of(self), geometry.length
        self.writes_back = terms.mode == "r+"
        self.automatic = terms.automatic
        layout = Layout(geometry, recipe.length)
        with link.forking:
            fd = self._file = memfd.create("userfault-region", layout.total)
            _alive.add(self)
        try:
            with naming("pwrite", "the recipe of a store"):
                recipe.write(fd, layout.recipe)
            with link.forking:  # a child would inherit the ledger, or the memory, and not know of it
                self.ledger = Ledger(fd, layout)
                self._write_header(terms, layout)
                self._cover(fd)
                self._register(self.link.uffd, terms.mode)
                memory.protect(self.address, self.length, _protection(terms.mode))
                self._tie = weakref.ref(self, _lost.append)
                _open[self._tie] = self.link, self.identity
                self.link.memories[self.identity] = self
                self._owner = os.getpid()
        except BaseException:
            self.close_file()
            raise

    @property
    def file(self) -> int:
        """The memfd, until `close_file`."""
        return self._file

    def close_file(self) -> None:
        """The pager has the memfd, or never will; twice is fine."""
        with link.forking:
            fd, self._file = self._file, -1
            if fd >= 0:
                os.close(fd)

    def _write_header(self, terms: Terms, layout: Layout) -> None:
        words = self.ledger.words
        header = {
            book.W_MAGIC: book.MAGIC,
            book.W_ID: self.identity,
            book.W_ADDRESS: self.address,
            book.W_SIZE: layout.geometry.size,
            book.W_BLOCK_SIZE: layout.geometry.block_size,
            book.W_MODE: MODES[terms.mode],
            book.W_BUDGET: book.NO_BUDGET if terms.budget is None else terms.budget,
            book.W_SHARED: self._share(),
            book.W_RECIPE_LENGTH: layout.recipe_length,
            book.W_SYNC: round(1e6 * (terms.sync_interval or 0)),
        }
        header.update(enumerate(terms.retries.numbers(), book.W_ATTEMPTS))
        for index, value in header.items():
            words[index] = value

    def _share(self) -> int:
        shared = self.link.shared_by(automatic=self.automatic)
        return book.NO_BUDGET if shared is None else shared

    def set_budget(self, budget: int | None, *, automatic: bool) -> None:
        """Write another budget down; then the pager is to be told."""
        self.automatic = automatic
        self.ledger.words[book.W_BUDGET] = book.NO_BUDGET if budget is None else budget
        self.share_anew()

    def share_anew(self) -> None:
        """Write down that the pager has another budget."""
        self.ledger.words[book.W_SHARED] = self._share()

    def _cover(self, fd: int) -> None:
        """Map the memfd, inaccessible: what must not exist before it is registered is a page (mlockall makes some)."""
        flags = mmap.MAP_SHARED | abi.MAP_NORESERVE | abi.MAP_FIXED
        memory.map_memory(self.length, fd=fd, prot=0, flags=flags, address=self.address)
        for advice in (abi.MADV_DONTFORK, abi.MADV_DONTDUMP):
            memory.advise(self.address, self.length, advice)

    def _register(self, uffd: Userfaultfd, mode: str) -> None:
        how = abi.UFFDIO_REGISTER_MODE_MISSING | (0 if mode == "r" else abi.UFFDIO_REGISTER_MODE_WP)
        uffd.register(self.address, self.length, how)

    def exported(self) -> bool:
        """Whether anybody holds a view. `resize(-1)` asks for just that before it refuses the size."""
        try:
            self.resize(-1)
        except BufferError:
            return True
        except (TypeError, ValueError):
            return False
        return False

    def views(self) -> int:
        """Count the buffers that are exported. Looks at every object of the interpreter: not for a busy path."""
        return sum(type(holder).__name__ == "managedbuffer" for holder in gc.get_referrers(self))

    def is_here(self) -> bool:
        """Whether the memory has begun, has not ended, and belongs to this process."""
        return self._owner == os.getpid()

    def unmap_pages(self) -> bool:
        """Take its pages out of this process's page tables, not out of memory: a touch maps them again.

        Returns:
            Whether all of it was done; not of memory that is locked, say, or has ended.
        """
        for start in range(0, self.length, _UNMAPPED_AT_ONCE):
            with link.forking:  # or its addresses might be somebody else's by now
                if not self.is_here():
                    return False
                length = min(_UNMAPPED_AT_ONCE, self.length - start)
                try:
                    memory.advise(self.address + start, length, abi.MADV_DONTNEED)
                except KernelError:
                    return False
        return True

    def finish(self) -> bool:
        """Take the memory away, once the pager has let go of it. The addresses stay ours until this object is gone.

        Returns:
            Whether it was there.

        Raises:
            KernelError: ENOMEM; then nothing has changed.
        """
        with link.forking:
            if not self.is_here():
                return False
            self._owner = 0
            try:
                memory.map_memory(self.length, prot=0, flags=_RESERVED | abi.MAP_FIXED, address=self.address)
            except KernelError:
                self._owner = os.getpid()  # the end of this object will try again
                raise
            with contextlib.suppress(KernelError):  # in a sandbox: nobody waits there, as a rule
                self.link.uffd.wake(self.address, self.length)
            with contextlib.suppress(KernelError):  # then the end of the ledger lets go of it
                self.ledger.let_go()
            self.close_file()
            _alive.discard(self)
            _open.pop(self._tie, None)
        return True

    def leave_in_child(self) -> None:
        """Keep nothing of the parent's in a forked child, and its addresses free of anything else."""
        self.close_file()
        if not self._owner:  # it was just beginning, and the addresses are reserved as they were; or has ended
            return
        self.ledger.let_go()  # it is shared memory: through it the child would pin, and keep the data alive
        try:
            flags = _RESERVED | abi.MAP_FIXED_NOREPLACE
            memory.map_memory(self.length, prot=0, flags=flags, address=self.address)
        except KernelError:  # taken within microseconds of the fork: then the object must never unmap them
            _taken.append(self)

    def __del__(self) -> None:
        if getattr(self, "_owner", 0) == os.getpid() and not sys.is_finalizing():  # then the pager ends anyway
            to_the_end(lambda: self.link.calls.retire(self))  # which holds it until the pager has answered


def share_anew(served_by: Link) -> None:
    """Write down in every region of a pager that it has another budget."""
    for mapping in list(served_by.memories.values()):
        if mapping.is_here():
            mapping.share_anew()


def end_lost() -> None:
    """Tell the pager of regions whose `__del__` was cut short."""
    if _lost:
        to_the_end(_end_each)


def _end_each() -> None:
    while _lost:
        with contextlib.suppress(IndexError, KeyError):  # another thread was quicker; or it was a parent's
            served_by, identity = _open.pop(_lost.pop())
            with contextlib.suppress(Error):  # then there is no pager
                served_by.request(Message(wire.CLOSE, region=identity, flags=wire.FORCE))
            served_by.closed()


def check_mode(mode: object) -> str:
    """Return the mode that a user passed.

    Raises:
        ValueError: if it is none.
    """
    if not isinstance(mode, str) or mode not in MODES:
        raise ValueError(f"mode must be 'r', 'r+' or 'c', got {mode!r}")
    return str(mode)


def open_mapping(pager: Pager, geometry: Geometry, terms: Terms, recipe: Recipe) -> Mapping:
    """Map the memory of a region and have the pager take it on; leave nothing behind if that fails.

    Raises:
        KernelError: naming the call.
        StoreError, PagerLostError: as the pager answers.
    """
    mapping = new_mapping(geometry.size, terms.mode)
    end_lost()  # now: its addresses may be theirs
    to_the_end(lambda: _begin(mapping, pager, geometry, terms, recipe))
    try:  # whatever interrupts from here on, or leaves this half-way: the end of the mapping ends what has begun
        pager.link.request(Message(wire.OPEN, region=mapping.identity, fds=(mapping.file,)))
    except BaseException:
        forsake(mapping)
        raise
    mapping.close_file()
    return mapping


def _begin(
    mapping: Mapping,
    pager: Pager,
    geometry: Geometry,
    terms: Terms,
    recipe: Recipe,
) -> None:
    identity = pager.link.calls.next_id()
    pager.link.opened()
    try:
        mapping.begin(pager, identity, geometry, terms, recipe)
    except BaseException:
        pager.link.closed()
        raise


def forsake(mapping: Mapping) -> None:
    """End a region: its changes are written back, the pager lets go of it, then its memory is taken away.

    Raises:
        StoreError: if changes could not be written back. The region goes on.
        KernelError, PagerLostError: if the pager lives and cannot be told. Then the memory stays: were its addresses
            given to another region, the worker would take its faults for those of this one.
    """
    try:
        _have_closed(mapping)
    except StoreError:
        if mapping.writes_back:  # and it stays, with what could not be written
            raise
    to_the_end(lambda: _finish(mapping))


def _have_closed(mapping: Mapping) -> None:
    for attempt in range(wire.TRIES):
        try:
            mapping.link.request(Message(wire.CLOSE, region=mapping.identity))
            return
        except (KernelError, PagerLostError):
            if mapping.link.lost or sys.is_finalizing():  # then nobody serves it any more, or will have the addresses
                return
            if attempt == wire.TRIES - 1:
                raise
        time.sleep(0.001 * 2**attempt)


def _finish(mapping: Mapping) -> None:
    if mapping.finish():
        mapping.link.closed()


def _protection(mode: str) -> int:
    return mmap.PROT_READ if mode == "r" else mmap.PROT_READ | mmap.PROT_WRITE


def new_mapping(size: int, mode: str) -> Mapping:
    """Reserve the addresses of a region.

    Raises:
        KernelError: if there is no room.
    """
    try:
        return Mapping(-1, size, flags=_RESERVED, prot=_protection(mode))
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", None) or errno.ENOMEM
        raise KernelError(number, "mmap", f"{size} bytes for a region") from error


def _leave_all_in_child() -> None:
    for mapping in list(_alive):
        mapping.leave_in_child()
    _alive.clear()
    _open.clear()


_taken: list[Mapping] = []
os.register_at_fork(after_in_child=_leave_all_in_child)
