"""Evictions that meet: a block belongs to one of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest

from userfault.blocks.ledger import EVICTED
from userfault.blocks.states import BlockState
from userfault.pager import evict
from userfault.pager.evict import Eviction

if TYPE_CHECKING:
    from userfault.pager.served import Served


class Region:
    """What an eviction uses of a region: four clean blocks, of which every one is wanted by two at once."""

    def __init__(self) -> None:
        self.claims: dict[int, object] = {}
        self.pins = bytearray(4)
        self.states = bytearray([BlockState.CLEAN] * 4)
        self.notes = bytearray(4)
        self.released: list[int] = []

    def release(self, block: int) -> None:
        del self.claims[block]
        self.released.append(block)


def test_a_block_that_one_eviction_has_is_not_another_s() -> None:
    region = cast("Served", Region())
    one, other = Eviction(), Eviction()
    assert evict._claim(region, 1, one)
    assert not evict._claim(region, 1, other)
    assert region.claims == {1: one}


@pytest.mark.parametrize("state", [BlockState.DIRTY, BlockState.PRIVATE, BlockState.EVICTING])
def test_a_block_that_cannot_go_is_not_marked(state: BlockState) -> None:
    region = Region()
    region.states[2] = state
    assert not evict._mark(cast("Served", region), 2)
    assert region.states[2] == state
    assert not region.notes[2] & EVICTED
