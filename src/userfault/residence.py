"""What a region keeps in memory, and what not: the part of `Region` that brings in, pins, drops and writes back.

Everything here writes a pin or sends a request; who decides is the pager.
"""

from __future__ import annotations

import contextlib
import os

from userfault.blocks.pins import Pin, Pins
from userfault.errors import StoreError
from userfault.pager import wire
from userfault.pager.wire import Message
from userfault.stores import FileStore, Store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from io import BufferedWriter

    from userfault.blocks.geometry import Geometry
    from userfault.pager.link import Link
    from userfault.pager.mapping import Mapping

UNLIMITED_BLOCKS = 1 << 62


class Residence:
    """The base of `Region`, which has the memory and the pager."""

    _store: Store
    _mode: str
    _geometry: Geometry
    _budget: int | None
    _map: Mapping
    _link: Link
    _pins: Pins
    _kept: dict[tuple[int, int], list[Pin]]
    _pid: int

    def _check(self) -> None:
        raise NotImplementedError

    def _view(self) -> memoryview:
        raise NotImplementedError

    def _ask(self, message: Message) -> Message:
        raise NotImplementedError

    def ensure(self, offset: int = 0, length: int | None = None, write: bool = False) -> None:
        """Bring a range into memory; it is there when this returns. Rounded outward to blocks.

        Use it where a touch could only raise a signal: errors of the store come as an exception. The blocks may be
        evicted again later; `pinned` keeps them.

        Args:
            offset: Bytes from the start.
            length: Bytes; None: to the end.
            write: Give write access too: the blocks become private (mode `c`) or dirty (mode `r+`).

        Raises:
            StoreError: if the store cannot give a block; names store, offset and cause.
            ValueError: if the range is not inside the region, or larger than the budget; or `write` in mode `r`.
            PagerLostError, RegionClosedError: if there is nobody to ask.
        """
        with self.pinned(offset, length, write):
            pass

    @contextlib.contextmanager
    def pinned(self, offset: int = 0, length: int | None = None, write: bool = False) -> Iterator[memoryview]:
        """Like `ensure`, and the range stays in memory inside the `with` block, whose value is a view of it.

        Threads and nesting are fine: a block can be pinned 255 times at once. For system calls without privilege, and
        for devices that hold on to pages (`O_DIRECT`, registered io_uring buffers).

        Raises:
            As `ensure`; ValueError also if more would be pinned at once than the budget holds.
        """
        pin, start, end = self._new_pin(offset, length, write)
        try:
            self._bring(pin, write=write)
            with self._view() as whole, whole[start:end] as view:
                yield view
        finally:
            try:
                self._let_go(pin)
            except BaseException:  # raised by a signal handler at the very first step of it
                self._let_go(pin)
                raise

    def pin(self, offset: int = 0, length: int | None = None, write: bool = False) -> None:
        """Like `pinned`, until `unpin` is called with the same range; as often as it was pinned.

        Raises:
            As `pinned`.
        """
        pin, start, end = self._new_pin(offset, length, write)
        try:
            self._bring(pin, write=write)
            self._kept.setdefault((start, end), []).append(pin)
        except BaseException:
            self._let_go(pin)
            raise

    def unpin(self, offset: int = 0, length: int | None = None) -> None:
        """End one `pin` of just this range.

        Raises:
            ValueError: if this range is not pinned, though parts of it may be.
            RegionClosedError: if it is closed.
        """
        self._check()
        key = self._geometry.check_range(offset, length)
        try:
            pin = self._kept[key].pop()
        except (KeyError, IndexError):
            raise ValueError(f"bytes {key[0]} to {key[1]} were not pinned by pin() as one range") from None
        self._let_go(pin)

    def advise(self, advice: str, offset: int = 0, length: int | None = None) -> None:
        """Say how a range will be used, as `madvise(2)` does. It changes what is done, never what is read.

        Args:
            advice: `"sequential"`: the range is used once, in its order; so its blocks are the first to go when room is
                needed, and leave in memory what else is there. `"random"`: no longer so. `"willneed"`: as `prefetch`.
                `"dontneed"`: as `evict`. A worker that takes over from one that died does not know of the first two.
            offset: Bytes from the start.
            length: Bytes; None: to the end.

        Raises:
            ValueError: if the advice is none, or the range is not inside the region.
            PagerLostError, RegionClosedError: if there is nobody to ask.
        """
        if advice == "willneed":
            self.prefetch(offset, length)
        elif advice == "dontneed":
            self.evict(offset, length)
        elif advice in ("sequential", "random"):
            first, stop, _, _ = self._blocks(offset, length, write=False)
            flags = wire.SEQUENTIAL if advice == "sequential" else 0
            self._ask(Message(wire.ADVISE, 0, self._map.identity, first, stop, flags=flags))
        else:
            raise ValueError(f"advice must be 'sequential', 'random', 'willneed' or 'dontneed', got {advice!r}")

    def _new_pin(self, offset: int, length: int | None, write: bool) -> tuple[Pin, int, int]:
        """Return a pin of a range, which nobody has yet, and the range in bytes."""
        first, stop, start, end = self._blocks(offset, length, write)
        if stop - first > self._most():
            raise ValueError(
                f"{end - start} bytes are more than the budget of {self._budget} bytes holds at once; "
                "ask for less, or open the region with a larger budget="
            )
        return Pin(first, stop), start, end

    def _most(self) -> int:
        """Blocks that may be in memory at once, by its own budget and the pager's."""
        budgets = self._budget, self._link.shared_by(automatic=self._map.automatic)
        limits = [max(1, budget // self._geometry.block_size) for budget in budgets if budget is not None]
        return min(limits, default=UNLIMITED_BLOCKS)

    def _bring(self, pin: Pin, *, write: bool, most: int | None = None) -> None:
        self._pins.add(pin, self._most() if most is None else most)
        flags = wire.WRITE if write else 0
        self._ask(Message(wire.ENSURE, 0, self._map.identity, pin.first, pin.stop, flags=flags))

    def _let_go(self, pin: Pin) -> None:
        try:
            self._unpin(pin)
        except BaseException:  # a signal handler's: pins must not be left behind
            self._unpin(pin)
            raise

    def _unpin(self, pin: Pin) -> None:
        if self._pid == os.getpid():  # not in a child that was forked meanwhile
            self._pins.remove(pin)

    def prefetch(self, offset: int = 0, length: int | None = None, wait: bool = False) -> None:
        """Begin to bring a range in, at most as much as the budget holds. Rounded outward to blocks.

        Args:
            offset: Bytes from the start.
            length: Bytes; None: to the end.
            wait: Return only when it is done, and raise if it failed.

        Raises:
            StoreError: with `wait`, as `ensure`.
            ValueError: if the range is not inside the region.
            PagerLostError, RegionClosedError: if there is nobody to ask.
        """
        first, stop, _, _ = self._blocks(offset, length, write=False)
        stop = min(stop, first + self._most())
        message = Message(wire.ENSURE, 0, self._map.identity, first, stop, flags=0 if wait else wire.NO_ANSWER)
        if wait:
            self._ask(message)
        else:
            self._link.check()
            self._link.calls.tell(message)

    def evict(self, offset: int = 0, length: int | None = None) -> int:
        """Drop the blocks that lie wholly inside a range from memory; the next touch brings them in again.

        Changes of mode `r+` are written back first. Private and pinned blocks stay, and those that cannot be written.

        Returns:
            Bytes dropped.

        Raises:
            ValueError: if the range is not inside the region.
            PagerLostError, RegionClosedError: if there is nobody to ask.
        """
        self._check()
        first, stop = self._geometry.inward(*self._geometry.check_range(offset, length))
        return self._ask(Message(wire.EVICT, 0, self._map.identity, first, stop)).a

    def retry(self, offset: int = 0, length: int | None = None) -> None:
        """Bring a range in, asking the store once more for blocks that failed. Rounded outward to blocks.

        Raises:
            StoreError: if a block fails again.
            ValueError, PagerLostError, RegionClosedError: as `ensure`.
        """
        first, stop, _, _ = self._blocks(offset, length, write=False)
        self._ask(Message(wire.RETRY, 0, self._map.identity, first, stop))

    def flush(self) -> None:
        """Write back what has been changed before the call, and make it durable. In the modes `r` and `c` nothing is.

        A write that comes meanwhile, from another thread, is not lost: it is written back later.

        Raises:
            StoreError: what went wrong since the last flush, in the background too. What could not be written stays in
                memory, and the next flush tries again.
            PagerLostError, RegionClosedError: if there is nobody to ask.
        """
        self._check()
        if self._mode == "r+":
            self._ask(Message(wire.FLUSH, 0, self._map.identity))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the whole region to another file, such as changes that a broken store does not take.

        Blocks that can neither be had from memory nor from the store are left out, as a hole in the file.

        Raises:
            StoreError: the first reason why a block was left out; the rest is in the file.
            ValueError: if the file is the region's own store.
            OSError: if the file cannot be written.
            PagerLostError, RegionClosedError: if there is nobody to ask.
        """
        self._check()
        if isinstance(self._store, FileStore) and self._store.lies_in(path):
            raise ValueError(f"{os.fsdecode(path)!r} is the region's own file; flush() writes changes back to it")
        try:
            with open(path, "wb") as file:
                first_error = self._save(file)
        except OSError as error:
            error.filename = error.filename or os.fsdecode(path)
            raise
        if first_error is not None:
            raise first_error

    def _save(self, file: BufferedWriter) -> StoreError | None:
        file.truncate(self._geometry.size)
        first_error: StoreError | None = None
        for block in range(self._geometry.blocks):
            pin = Pin(block, block + 1)
            try:
                self._bring(pin, write=False, most=UNLIMITED_BLOCKS)  # also where pins fill the budget
                offset, length = self._geometry.span(block)
                file.seek(offset)
                with self._view() as whole, whole[offset : offset + length] as view:
                    file.write(view)
            except StoreError as error:
                first_error = first_error or error
            finally:
                self._let_go(pin)
        file.flush()
        os.fsync(file.fileno())
        return first_error

    def _blocks(self, offset: int, length: int | None, write: bool) -> tuple[int, int, int, int]:
        self._check()
        if write and self._mode == "r":
            raise ValueError("write access to a region of mode 'r'; open it with mode='r+' or 'c'")
        start, end = self._geometry.check_range(offset, length)
        return *self._geometry.outward(start, end), start, end
