"""Dropping blocks from memory: a hole in the memfd, and the next touch is a missing fault again.

A block is dropped by its owner only: whoever holds the claim on it (see `served`).  The state says EVICTING before the
hole is punched; then the pins are read once more, since the application writes a pin before it asks for anything.
Neighbours go in one hole, because a single-page drop costs 12 µs of TLB shoot-down when other threads run, and a run of
512 pages 0.3 µs a page.
"""

from __future__ import annotations

from userfault.blocks import ledger
from userfault.blocks.states import BlockState
from userfault.errors import KernelError
from userfault.kernel import memfd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from userfault.pager.served import Served

ABSENT, _FILLING, CLEAN, DIRTY, FLUSHING, PRIVATE, EVICTING, _FAILED = map(int, BlockState)
BATCH_PAGES = 256
"""Dropped together when a budget is full: 1 MiB of 4 KiB pages, about 80 µs."""
SCAN = 1024
"""Blocks that a fault looks at for room, at most: if all are pinned it goes on, and the next fault looks further."""
EVICTION = object()
"""The claim of an eviction."""


def make_room(region: Served) -> int:
    """Drop the oldest clean blocks, one batch, but none of the last few: a fault must go on, whatever the budget.

    Returns the bytes dropped.

    One instruction may need several blocks at once: a load across a boundary two, a copy between two such places four.
    Were one dropped for another, the instruction would start again for ever.
    """
    batch = max(1, min(BATCH_PAGES // region.pages_per_block, region.limit // 4))
    wanted = max(batch, region.resident_blocks() - region.limit + batch)
    return _drop(region, _oldest(region, wanted, lambda block: block not in region.recent, most=SCAN))


def evict_range(region: Served, first: int, stop: int) -> int:
    """Drop what can be dropped in a range of blocks; return the bytes dropped."""
    return _drop(region, _oldest(region, len(region.order), lambda block: first <= block < stop))


def _oldest(region: Served, wanted: int, fits: Callable[[int], bool], most: int | None = None) -> list[int]:
    """Claim up to `wanted` blocks, oldest first, and mark them. Each block is looked at once, and `most` of them."""
    taken: list[int] = []
    for _ in range(len(region.order) if most is None else min(most, len(region.order))):
        if len(taken) == wanted:
            break
        try:
            block = region.order.popleft()
        except IndexError:  # another thread evicts as well
            break
        if not fits(block) or not _take(region, block, taken):
            region.order.append(block)
    return sorted(taken)


def _take(region: Served, block: int, taken: list[int]) -> bool:
    """Claim one block for eviction; False if it has to stay in the order."""
    if region.pins[block] or region.claims.setdefault(block, EVICTION) is not EVICTION:
        return False
    if region.states[block] == PRIVATE:
        region.private.add(block)
    elif region.states[block] in (DIRTY, FLUSHING) and region.writeback:
        region.writeback.aside.add(block)
    elif region.states[block] == CLEAN:
        region.states[block] = EVICTING
        if not region.pins[block]:
            taken.append(block)
            return True
        region.states[block] = CLEAN
        region.release(block)
        return False
    region.release(block)
    return True


def _drop(region: Served, blocks: Iterable[int]) -> int:
    dropped = 0
    for first, stop in _runs(blocks):
        dropped += _drop_run(region, first, stop)
    return dropped


def _drop_run(region: Served, first: int, stop: int) -> int:
    start, end = region.byte_range(first, stop)
    try:
        memfd.punch_hole(region.fd, start, end - start)
        after = ABSENT
    except KernelError:  # no memory for the bookkeeping of a partial folio: the blocks stay
        after = CLEAN
    for block in range(first, stop):
        region.states[block] = after
        if region.writeback and after == ABSENT:
            region.writeback.forget(block)
        region.release(block)
        if after == CLEAN:  # only now: whoever takes it from the order must find the claim free
            region.order.append(block)
    if after == CLEAN:
        return 0
    region.counters.add(ledger.EVICTIONS, stop - first)
    return end - start


def _runs(blocks: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Join sorted blocks into runs `(first, stop)`."""
    first = stop = -1
    for block in blocks:
        if block != stop:
            if stop > first:
                yield first, stop
            first = block
        stop = block + 1
    if stop > first:
        yield first, stop
