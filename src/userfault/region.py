"""Region: memory with a store behind it.

This is the public face of blocks and pager; it has no thread and no policy of its own.  It checks what a user passes
in, before anything is changed, and then either writes a pin or sends a request.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import warnings
from numbers import Real
from threading import RLock

from userfault.blocks import geometry as units
from userfault.blocks.geometry import Geometry
from userfault.blocks.pins import Pin, Pins
from userfault.blocks.policies import EvictionPolicy, check_policy
from userfault.blocks.states import CHANGED
from userfault.errors import PagerLostError, RegionClosedError, StoreError
from userfault.kernel import process
from userfault.pager import wire
from userfault.pager.client import Pager, check_pager
from userfault.pager.mapping import Terms, check_mode, forsake, open_mapping
from userfault.pager.recipe import Recipe
from userfault.pager.wire import Message
from userfault.residence import Residence
from userfault.retry import RetryPolicy, check_retry_policy
from userfault.shield import to_the_end
from userfault.stats import RegionStats, read_stats
from userfault.stores import Store
from userfault.stores.base import check_store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

_CHANGED = {int(state) for state in CHANGED}
_SHORTEST_S, _LONGEST_S = 0.5, 1e9
SMALLEST_BUDGET = 4
"""Blocks of an automatic budget, however little memory there is."""


class Region(Residence):
    """Memory whose pages come from a store at the first touch.

    Args:
        store: Where the bytes live. It travels to the pager by pickle.
        mode: As `numpy.memmap`: `"r"` read only; `"r+"` changes are written back to the store, which must be writable;
            `"c"` copy on write: changes stay in memory and never reach the store.
        block_size: What is brought in at once, in bytes or as text: a power of two from one page to 2 MiB.
        budget: The most bytes to keep in memory; blocks are dropped beyond it, as `policy` says, and in mode `r+` dirty
            ones when they have been written back. None: half of what is available now (the machine's and the cgroup's,
            the smaller), and within the pager's. `math.inf`: no limit. Never dropped for it are private and pinned
            blocks, the four that came in last, since one instruction may need as many, and changes that cannot be
            written back. May be set later.
        pager: The pager to answer the faults; None: the default one of this process.
        retry_policy: How often and how patiently the store is asked for a block before the block fails; None: the
            default `RetryPolicy`. It holds for writing back, too.
        sync_interval: In mode `r+`, seconds between two write-backs in the background, kept to within half a second;
            None: only as the budget needs it, at `flush` and at the end.
        policy: Which blocks are dropped first: `"s3fifo"` (the default: resists scans), `"clock"`, `"fifo"`,
            `"random"`, or an `EvictionPolicy` of your own.

    Threads may share a region.  A forked child does not inherit the memory: a touch there is a SIGSEGV, and methods
    raise `RegionClosedError`.  If the store cannot give a block, a touch of it is a SIGBUS; `ensure` raises instead.

    Raises:
        TypeError, ValueError: naming the argument and the remedy.
        StoreError: if the store does not pickle, or the pager cannot open it.
        UnsupportedError: if the kernel or this process's rights do not suffice.
    """

    def __init__(
        self,
        store: Store,
        mode: str = "r",
        block_size: int | str = units.DEFAULT_BLOCK_SIZE,
        budget: str | float | None = None,
        pager: Pager | None = None,
        retry_policy: RetryPolicy | None = None,
        sync_interval: float | None = None,
        policy: str | EvictionPolicy | None = None,
    ) -> None:
        self._closed = True  # until it is open
        self._warns = True
        self._lock = RLock()  # of closing and of making views; a finalizer may run while this thread holds it
        self._store = _check_store(store)
        self._mode = check_mode(mode)
        self._geometry = Geometry(store.size, units.check_block_size(block_size))
        self._chooses_budget = budget is None
        self._budget = self._choose_budget(budget)
        self._retry_policy = check_retry_policy(retry_policy)
        interval = _check_interval(sync_interval, self._mode)
        terms = Terms(self._mode, self._budget, self._retry_policy, interval, automatic=self._chooses_budget)
        _check_writable(self._store, self._mode)
        self._policy = check_policy(policy)
        recipe = Recipe(store, self._policy)
        self._pager = check_pager(pager)
        self._link = self._pager.link
        self._link.check()
        self._map = open_mapping(self._pager, self._geometry, terms, recipe)
        self._pins = Pins(self._map.ledger)
        self._kept: dict[tuple[int, int], list[Pin]] = {}
        """What `pin` has pinned, by range."""
        self._pid = os.getpid()
        self._closed = False

    def _choose_budget(self, budget: str | float | None) -> int | None:
        block_size = self._geometry.block_size
        if budget is None:
            available: int = to_the_end(process.memory_available)  # which opens files of /proc
            return max(available // 2, SMALLEST_BUDGET * block_size)
        return units.check_budget(budget, block_size)

    # -- what it is ------------------------------------------------------------------------------------------

    @property
    def memory(self) -> memoryview:
        """A view of the whole region, bytes; read-only in mode `r`. While it lives, the region cannot be closed."""
        return self._view()

    @property
    def size(self) -> int:
        """Bytes of the region: the store's size."""
        return self._geometry.size

    @property
    def address(self) -> int:
        """Where it begins in this process's memory."""
        self._check()
        return self._map.address

    @property
    def block_size(self) -> int:
        """Bytes brought in at once."""
        return self._geometry.block_size

    @property
    def mode(self) -> str:
        """`"r"`, `"r+"` or `"c"`."""
        return self._mode

    @property
    def budget(self) -> int | None:
        """The most bytes to keep in memory; None: no limit.

        Set it to change it, as the argument of the same name: to a smaller one if memory is short, and what is too much
        is dropped soon after.

        Raises:
            TypeError, ValueError: as the argument.
            PagerLostError, RegionClosedError: if there is nobody to tell.
        """
        return self._budget

    @budget.setter
    def budget(self, budget: str | float | None) -> None:
        self._check()
        checked = self._choose_budget(budget)
        self._chooses_budget, self._budget = budget is None, checked
        self._map.set_budget(checked, automatic=self._chooses_budget)
        self._ask(Message(wire.BUDGET, 0, self._map.identity))

    @property
    def policy(self) -> str | EvictionPolicy:
        """What decides which blocks are dropped first: a name, or what was passed in; the pager has its own of it."""
        return self._policy

    @property
    def retry_policy(self) -> RetryPolicy:
        """How often and how patiently the store is asked."""
        return self._retry_policy

    @property
    def store(self) -> Store:
        """The store, as it was passed in; the pager has one of its own."""
        return self._store

    @property
    def pager(self) -> Pager:
        """The pager that answers its faults."""
        return self._pager

    @property
    def closed(self) -> bool:
        """Whether it was closed, or belongs to the process that this one was forked from."""
        return self._closed or self._pid != os.getpid()

    # -- looking ---------------------------------------------------------------------------------------------

    def stats(self) -> RegionStats:
        """Return the counters; as the pager last wrote them down if it is gone.

        A block that has arrived this very moment may not be counted yet: its thread goes on before the pager counts.

        Raises:
            RegionClosedError: if it is closed.
        """
        self._check()
        with contextlib.suppress(PagerLostError):
            self._ask(Message(wire.SYNC, 0, self._map.identity))
        return read_stats(self._map.ledger, self._pins.blocks)

    def residency(self) -> bytes:
        """Return a snapshot of the block states: one `BlockState` per block. Asks nobody.

        A block that has arrived this very moment may still be FILLING: its thread goes on before the pager notes it.

        Raises:
            RegionClosedError: if it is closed.
        """
        self._check()
        return self._map.ledger.snapshot()

    # -- the end ---------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Write changes back (mode `r+`), and take the memory away; closing twice is fine.

        Raises:
            BufferError: if a view of the memory is alive; nothing is changed then.
            StoreError: as `flush`; the region stays open then.
        """
        if self.closed:  # also in a forked child, where the lock may be held for ever
            return
        with self._lock:
            if self._closed:
                return
            if self._map.exported():
                raise BufferError(
                    "a view of the region's memory is alive; delete it, or release() the memoryview, first"
                )
            self._closed = True  # no view is made from now on
        self._forsake()
        self._map.close()

    def _forsake(self) -> None:
        try:
            forsake(self._map)
        except StoreError:
            self._closed = False  # it holds what could not be written back
            raise

    def _ask(self, message: Message) -> Message:
        try:
            return self._link.request(message)
        except StoreError:
            if self._closed:  # by another thread, while this one waited
                raise RegionClosedError("the region was closed meanwhile") from None
            raise

    def _view(self) -> memoryview:
        self._check()
        with self._lock:
            self._check()  # closing looks for views and forbids new ones in one step
            return memoryview(self._map)

    def views(self) -> int:
        """Count the buffers that are exported from the memory: memoryviews, and what was made from them."""
        return 0 if self.closed else self._map.views()

    def revoke(self) -> None:
        """Take the memory away, also from views that are alive: to touch one is a SIGSEGV from then on.

        Their addresses stay reserved until the last of them is gone. Twice is fine.
        """
        if self.closed:
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._forsake()

    def owned_by_views(self) -> None:
        """Let the region end with its last view, as `numpy.memmap` does; to forget it is then no mistake."""
        self._warns = False

    def _check(self) -> None:
        if self._closed:
            raise RegionClosedError("the region is closed")
        if self._pid != os.getpid():
            raise RegionClosedError(
                f"the region belongs to process {self._pid}, from which this one was forked; open it here"
            )

    def __reduce__(self) -> tuple[functools.partial[Self], tuple[()]]:
        """Pickle what opens the same store anew, on the default pager of the process that unpickles it.

        A forked child may pickle a region of mode `r` that it has inherited. Of a region of mode `r+` comes one of mode
        `r`: two that write to one store would undo each other's changes.

        Raises:
            RegionClosedError: if it is closed; or not of mode `r` and in a forked child, which cannot see the changes.
            ValueError: if it has changes in memory.
        """
        if self._closed or self._mode != "r":
            self._check()
            if not _CHANGED.isdisjoint(self.residency()):
                remedy = "flush() it first" if self._mode == "r+" else "pickle its bytes, or its store"
                raise ValueError(f"changes in the region's memory would be lost: {remedy}")
        options = {
            "budget": None if self._chooses_budget else math.inf if self._budget is None else self._budget,
            "mode": "r" if self._mode == "r+" else self._mode,
            "block_size": self.block_size,
            "retry_policy": self._retry_policy,
            "policy": self._policy,
        }
        return functools.partial(type(self), self._store, **options), ()  # type: ignore[arg-type]  # mixed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return self.size

    def __del__(self) -> None:
        if not getattr(self, "_closed", True) and self._pid == os.getpid() and self._warns:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"at {self._map.address:#x}"
        return f"<userfault.Region {self._store.describe()} mode={self._mode!r} {self.size} bytes {state}>"


def _check_store(store: object) -> Store:
    if not isinstance(store, Store):
        raise TypeError(
            f"store must be a userfault.stores.Store, not {type(store).__name__}; for a path use FileStore(path)"
        )
    return check_store(store)


def _check_writable(store: Store, mode: str) -> None:
    if mode == "r+" and not store.writable:
        raise ValueError(
            f"mode='r+' writes back, and {store.describe()} is not writable; "
            "for a file pass FileStore(path, writable=True); mode='c' keeps changes in memory"
        )


def _check_interval(value: object, mode: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"sync_interval must be a number of seconds or None, not {value!r}")
    if mode != "r+":
        raise ValueError(f"sync_interval={value!r} is for mode='r+', which writes back; this is mode={mode!r}")
    if not _SHORTEST_S <= float(value) <= _LONGEST_S:
        raise ValueError(f"sync_interval must be from {_SHORTEST_S:g} to {_LONGEST_S:g} seconds, got {value!r}")
    return float(value)
