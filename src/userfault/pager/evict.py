"""Dropping blocks from memory: a hole in the memfd, and the next touch is a missing fault again.

A block is dropped by its owner only: whoever holds the claim on it (see `served`).  The state says EVICTING before the
hole is punched; then the pins are read once more, since the application writes a pin before it asks for anything.
Victims are dropped in batches, and neighbours go in one hole, because a single-page drop costs 12 µs of TLB shoot-down
when other threads run, and a run of 512 pages 0.3 µs a page.

Clean blocks go before dirty ones: a victim that is dirty is put aside until it has been written back.
"""

from __future__ import annotations

from userfault.blocks import ledger
from userfault.blocks.geometry import runs
from userfault.blocks.states import BlockState
from userfault.errors import KernelError
from userfault.kernel import memfd
from userfault.pager.residents import FLOOR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from userfault.pager.served import Served

ABSENT, _FILLING, CLEAN, DIRTY, FLUSHING, PRIVATE, EVICTING, _FAILED = map(int, BlockState)
BATCH_PAGES = 256
"""Dropped together: 1 MiB of 4 KiB pages, about 80 µs."""
SCAN = 1024
"""Blocks that are looked at for room, at most: if all are pinned a fault goes on, and the next one looks further."""


class Eviction:
    """The claim of one eviction: each has its own, or two that meet at a block would both take it for theirs."""


def drop_victims(
    region: Served, target: int, *, most: int = SCAN, wait: bool = True, floor: int = FLOOR
) -> bool | None:
    """Drop blocks that the policy chooses until no more than `target` are in memory.

    At most `most` are dropped, and none of the `floor` that came in last.

    Returns:
        Whether there are fewer now, be it another thread's doing; None if one is at it, and this one is not to `wait`.
    """
    residents = region.residents
    with residents.held(wait=wait) as held:
        if not held:
            return None
        residents.settle(floor)
        excess = len(residents) - target
        victims = _claim_victims(region, min(excess, most)) if excess > 0 else []
    return _drop(region, victims) > 0 or excess <= 0


def drop_range(region: Served, first: int, stop: int) -> int:
    """Drop what can be dropped in a range of blocks; return the bytes dropped."""
    residents, me = region.residents, Eviction()
    with residents.held():
        residents.settle(floor=0)
        blocks = [block for block in residents.kept if first <= block < stop and block not in residents.private]
    victims = [block for block in sorted(blocks) if _claim(region, block, me) and _marked(region, block)]
    with residents.held():
        for block in victims:
            residents.dropped(block)
    return _drop(region, victims)


def _claim_victims(region: Served, wanted: int) -> list[int]:
    residents, me = region.residents, Eviction()
    taken: list[int] = []
    for _ in range(min(SCAN, residents.candidates())):
        if len(taken) == wanted:
            break
        block, again = residents.next()
        if not _claim(region, block, me):
            residents.offer(block)
        elif _mark(region, block):
            residents.gone(block)
            taken.append(block)
        else:
            _keep(region, block, region.states[block], again=again)
            region.release(block)
    return sorted(taken)


def _claim(region: Served, block: int, me: Eviction) -> bool:
    return not region.pins[block] and region.claims.setdefault(block, me) is me


def _mark(region: Served, block: int) -> bool:
    """Mark a claimed block EVICTING, if it is clean and not pinned."""
    if region.states[block] != CLEAN:
        return False
    region.states[block] = EVICTING
    if region.pins[block]:
        region.states[block] = CLEAN
        return False
    return True


def _marked(region: Served, block: int) -> bool:
    if not _mark(region, block):
        region.release(block)
        return False
    return True


def _keep(region: Served, block: int, state: int, *, again: bool) -> None:
    """Decide what becomes of a victim that cannot be dropped.

    One that is dirty waits for being clean; unless it comes `again`, for then it has been written to meanwhile.
    """
    residents = region.residents
    if state == PRIVATE:
        residents.private.add(block)
    elif state in (DIRTY, FLUSHING) and not again:
        residents.aside.add(block)
    elif state in (CLEAN, DIRTY, FLUSHING):
        residents.offer(block)
    else:
        residents.gone(block)


def _drop(region: Served, blocks: Iterable[int]) -> int:
    return sum(_drop_run(region, first, stop) for first, stop in runs(blocks))


def _drop_run(region: Served, first: int, stop: int) -> int:
    start, end = region.byte_range(first, stop)
    try:
        memfd.punch_hole(region.fd, start, end - start)
    except KernelError:  # no memory for the bookkeeping of a partial folio: the blocks stay
        _take_back(region, first, stop)
        return 0
    for block in range(first, stop):
        region.notes[block] |= ledger.EVICTED
        region.states[block] = ABSENT
        if region.writeback:
            region.writeback.forget(block)
        region.release(block)
    region.counters.add(ledger.EVICTIONS, stop - first)
    return end - start


def _take_back(region: Served, first: int, stop: int) -> None:
    for block in range(first, stop):
        region.states[block] = CLEAN
        region.release(block)
        region.residents.arrived.append(block)
