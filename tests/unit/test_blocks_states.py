"""The table of a block's states: complete, consistent with itself, and the only truth there is."""

from __future__ import annotations

from itertools import product

import pytest

from userfault import blocks
from userfault.blocks import TRANSITIONS, BlockState
from userfault.blocks.states import RECOVERY, RESIDENT, check, diagram

S = BlockState
ALLOWED = {(before, after) for before, _, after in TRANSITIONS}
AT_REST = {S.ABSENT, S.CLEAN, S.DIRTY, S.PRIVATE, S.FAILED}


def reachable(start: BlockState) -> set[BlockState]:
    found: set[BlockState] = set()
    ahead = {start}
    while ahead:
        found |= ahead
        ahead = {after for before, after in ALLOWED if before in ahead} - found
    return found


def test_the_numbers_are_fixed_for_ever() -> None:
    assert {state.name: state.value for state in S} == {
        "ABSENT": 0,
        "FILLING": 1,
        "CLEAN": 2,
        "DIRTY": 3,
        "FLUSHING": 4,
        "PRIVATE": 5,
        "EVICTING": 6,
        "FAILED": 7,
    }


def test_fresh_memory_says_absent() -> None:
    assert S(bytes(1)[0]) is S.ABSENT


def test_check_follows_the_table() -> None:
    for before, after in product(S, S):
        if (before, after) in ALLOWED:
            check(before, after)
        else:
            with pytest.raises(ValueError, match=f"from {before.name} to {after.name}"):
                check(before, after)


def test_each_transition_has_one_line_and_a_cause() -> None:
    assert len(set(TRANSITIONS)) == len(TRANSITIONS)
    assert all(why for _, why, _ in TRANSITIONS)
    assert all(before is not after for before, _, after in TRANSITIONS)


def test_every_state_is_reached_from_an_absent_block() -> None:
    assert reachable(S.ABSENT) == set(S)


@pytest.mark.parametrize("state", S, ids=lambda s: s.name)
def test_every_state_has_a_way_back(state: BlockState) -> None:
    assert S.CLEAN in reachable(state)


def test_a_private_block_stays_private() -> None:
    assert {after for before, after in ALLOWED if before is S.PRIVATE} == {S.FILLING}, (
        "and that only if it never came in"
    )


def test_changed_blocks_are_never_dropped() -> None:
    assert {before for before, after in ALLOWED if after is S.EVICTING} == {S.CLEAN}


def test_recovery_ends_at_rest_and_follows_the_table() -> None:
    assert set(RECOVERY) == set(S) - AT_REST
    for before, after in RECOVERY.items():
        check(before, after)
        assert after in AT_REST


def test_resident_states_are_those_with_bytes() -> None:
    assert {S.CLEAN, S.DIRTY, S.FLUSHING, S.PRIVATE} == RESIDENT


def test_the_diagram_shows_every_transition() -> None:
    text = diagram()
    lines = text.splitlines()
    assert lines[0] == "stateDiagram-v2"
    assert lines[1].split() == ["[*]", "-->", "absent"]
    assert len(lines) == 2 + len(TRANSITIONS)
    for before, why, after in TRANSITIONS:
        assert f"    {before.name.lower()} --> {after.name.lower()}: {why}" in lines


def test_the_package_offers_the_table() -> None:
    assert blocks.__all__ == ["TRANSITIONS", "BlockState", "Transition"]
    assert all(hasattr(blocks, name) for name in blocks.__all__)
