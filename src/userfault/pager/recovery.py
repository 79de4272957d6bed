"""Taking a region over from a worker that has died: its block states tell what it was doing.

A block that was being filled is clean if it is wholly there, and otherwise becomes a hole; one that was being dropped
is dropped.  Two notes say more than the state.  POISONED: the block had failed before, and whatever is not there of it
is a SIGBUS still, so it has failed again.  READING: the dead worker was inside a store of the user's own for this
block, and may have died of it.  A block to which that happens for the second time is a SUSPECT, and is read in a
process of its own (`trial`).
"""

from __future__ import annotations

from userfault.blocks import ledger as book
from userfault.blocks.geometry import PAGE_SIZE
from userfault.blocks.states import BlockState
from userfault.kernel import memfd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from userfault.pager.served import Served

ABSENT, FILLING, CLEAN, DIRTY, FLUSHING, PRIVATE, EVICTING, FAILED = map(int, BlockState)


def recover(region: Served) -> None:
    """Put the states in order that a dead worker left, and wake everybody: read messages are never sent again."""
    for first, stop in region.ledger.occupied(region.fd):
        for start in range(first, stop, PAGE_SIZE):
            _recover_part(region, start, bytes(region.states[start : min(start + PAGE_SIZE, stop)]))
    region.wake(0, region.geometry.length)


def _recover_part(region: Served, start: int, part: bytes) -> None:
    clean, absent = part.count(CLEAN), part.count(ABSENT)
    if clean:
        region.residents.arrived.extend(block for block, state in enumerate(part, start) if state == CLEAN)
    if clean + absent < len(part):
        for block, state in enumerate(part, start):
            _recover_block(region, block, state)


def _recover_block(region: Served, block: int, state: int) -> None:
    if state in (FILLING, DIRTY, FLUSHING, PRIVATE) and region.notes[block] & book.READING:
        region.notes[block] ^= book.READING | (book.SUSPECT if region.notes[block] & book.STRUCK else book.STRUCK)
    if state == PRIVATE:
        region.residents.kept.add(block)
        region.residents.private.add(block)
        region.counters.became_private()
    elif state in (DIRTY, FLUSHING) and region.writeback:
        region.states[block] = DIRTY
        region.writeback.dirty[block] = None
        region.residents.arrived.append(block)
    elif (state == FILLING or (state == EVICTING and region.pins[block])) and _is_whole(region, block):
        region.states[block] = CLEAN  # it was filled; or pinned while its worker looked, and the hole never made
        region.residents.arrived.append(block)
    elif state in (EVICTING, FILLING):  # a part of a block would never be dropped by anybody
        memfd.punch_hole(region.fd, *region.extent(block))
        region.states[block] = FAILED if region.notes[block] & book.POISONED else ABSENT


def _is_whole(region: Served, block: int) -> bool:
    start, length = region.extent(block)
    return list(memfd.data_extents(region.fd, start, start + length)) == [(start, start + length)]
