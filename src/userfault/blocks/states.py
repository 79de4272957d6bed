"""The states of a block and the transitions between them, as one table.

The table is the law: the worker is the owner of every transition, the manual's diagram is drawn from it, and a test
walks it.  A state is one byte in the region's ledger (`userfault.blocks.ledger`), in memory that the application, the
supervisor and the worker share.  So it outlives the worker, and a new worker knows what the dead one was doing.

The rule that makes this safe: **the state is written first, then the kernel is told.** `FILLING` stands before the
`UFFDIO_COPY`, `DIRTY` or `PRIVATE` before write access is given, `EVICTING` before the hole is punched.  Whatever the
moment at which a worker dies, the byte then says what may have happened, and `RECOVERY` says what to make of it.  Pages
that a dead worker had already copied are right (COPY shows whole pages at once), and a thread may be using them; but a
block that is half there under the name of `ABSENT` would never fault again where it is there, and never be evicted.  So
the next worker calls a block `CLEAN` that was `FILLING` and is wholly there, and otherwise makes a hole of it, as of
one that was `EVICTING`: it holds nothing but the store's bytes, and whoever uses them faults again.

`DIRTY` and `FLUSHING` belong to regions that write back; they are in the table so that its numbers never change.
"""

from __future__ import annotations

from enum import IntEnum

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final, TypeAlias

    Transition: TypeAlias = "tuple[BlockState, str, BlockState]"
else:
    Transition = tuple


class BlockState(IntEnum):
    """What a block is, as `Region.residency()` reports it: one byte per block."""

    ABSENT = 0
    """Not in memory; the first touch brings it in."""
    FILLING = 1
    """On its way from the store."""
    CLEAN = 2
    """In memory, and the same as in the store."""
    DIRTY = 3
    """In memory, and changed since it was filled or last written back."""
    FLUSHING = 4
    """Being written back."""
    PRIVATE = 5
    """Changed in a `c` region: never written back, never evicted."""
    EVICTING = 6
    """Being dropped from memory."""
    FAILED = 7
    """The store could not give it; a touch is a SIGBUS until `Region.retry()`."""


_S = BlockState

TRANSITIONS: Final[tuple[Transition, ...]] = (
    (_S.ABSENT, "touch, prefetch, ensure", _S.FILLING),
    (_S.FILLING, "filled", _S.CLEAN),
    (_S.FILLING, "filled for a write touch, mode c", _S.PRIVATE),
    (_S.FILLING, "filled for a write touch, mode r+", _S.DIRTY),
    (_S.FILLING, "store failed", _S.FAILED),
    (_S.FILLING, "worker died", _S.ABSENT),
    (_S.CLEAN, "evict", _S.EVICTING),
    (_S.CLEAN, "write touch, mode c", _S.PRIVATE),
    (_S.CLEAN, "write touch, mode r+", _S.DIRTY),
    (_S.PRIVATE, "not a page came in", _S.FILLING),
    (_S.DIRTY, "not a page came in", _S.FILLING),
    (_S.DIRTY, "flush", _S.FLUSHING),
    (_S.FLUSHING, "written", _S.CLEAN),
    (_S.FLUSHING, "write touch", _S.DIRTY),
    (_S.FLUSHING, "store failed, worker died", _S.DIRTY),
    (_S.EVICTING, "hole punched", _S.ABSENT),
    (_S.EVICTING, "pinned meanwhile", _S.CLEAN),
    (_S.FAILED, "retry", _S.FILLING),
)
"""Every transition there is: state, what causes it, next state."""

RECOVERY: Final[dict[BlockState, BlockState]] = {
    _S.FILLING: _S.ABSENT,
    _S.FLUSHING: _S.DIRTY,
    _S.EVICTING: _S.ABSENT,
}
"""What a new worker makes of the states that only a living worker can be in (ABSENT: after punching the hole).

A FILLING block that is wholly there is CLEAN.
"""

RESIDENT: Final[frozenset[BlockState]] = frozenset({_S.CLEAN, _S.DIRTY, _S.FLUSHING, _S.PRIVATE})
"""The states in which a read touch simply runs."""
CHANGED: Final[frozenset[BlockState]] = frozenset({_S.DIRTY, _S.FLUSHING, _S.PRIVATE})
"""Blocks that hold what the user has written: whatever happens, these bytes stay."""


def check(before: BlockState, after: BlockState) -> None:
    """Raise ValueError unless the table has a transition from `before` to `after`."""
    if not any(start is before and end is after for start, _, end in TRANSITIONS):
        raise ValueError(f"a block never goes from {before.name} to {after.name}")


def diagram() -> str:
    """Draw the table as a Mermaid state diagram (the manual's picture is this text)."""
    lines = ["stateDiagram-v2", f"    [*] --> {_S.ABSENT.name.lower()}"]
    lines += [f"    {a.name.lower()} --> {b.name.lower()}: {why}" for a, why, b in TRANSITIONS]
    return "\n".join(lines)
