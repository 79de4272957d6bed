"""How long a chunk is believed to be in the page cache; with a clock of our own."""

from __future__ import annotations

from userfault.stores.belief import CHUNK, FIRST_S, LONGEST_S, Belief

SMALL = 4096


def touched(belief: Belief, chunk: int, times: int, now: float = 10.0) -> list[bool]:
    return [belief.is_due(chunk, SMALL, now) for _ in range(times)]


def test_nothing_is_believed_at_first() -> None:
    assert Belief().until(7) <= 0


def test_a_chunk_is_due_at_its_fourth_touch() -> None:
    assert touched(Belief(), 7, 4) == [False, False, False, True]


def test_touches_of_another_chunk_do_not_count() -> None:
    belief = Belief()
    touched(belief, 1, 3)

    assert touched(belief, 2, 3) == [False, False, False]


def test_a_large_block_is_due_at_once() -> None:
    assert Belief().is_due(7, CHUNK, 10.0)


def test_after_a_vain_examination_counting_begins_anew() -> None:
    belief = Belief()
    touched(belief, 7, 4)
    belief.learn(7, 10.0, hot=False)

    assert touched(belief, 7, 4) == [False, False, False, True]


def test_the_first_credit_is_short() -> None:
    belief = Belief()
    belief.learn(7, 10.0, hot=True)

    assert belief.until(7) == 10.0 + FIRST_S


def test_credit_is_as_long_as_the_chunk_has_lasted() -> None:
    belief = Belief()
    belief.learn(7, 10.0, hot=True)
    belief.learn(7, 10.3, hot=True)

    assert round(belief.until(7), 6) == 10.6


def test_credit_has_a_ceiling() -> None:
    belief = Belief()
    belief.learn(7, 10.0, hot=True)
    belief.learn(7, 99.0, hot=True)

    assert belief.until(7) == 99.0 + LONGEST_S


def test_a_chunk_that_was_hot_is_due_at_once() -> None:
    belief = Belief()
    belief.learn(7, 10.0, hot=True)

    assert belief.is_due(7, SMALL, 20.0)
    assert belief.has_seen(7)


def test_a_chunk_that_disappoints_begins_anew() -> None:
    belief = Belief()
    belief.learn(7, 10.0, hot=True)
    belief.learn(7, 11.0, hot=False)

    assert belief.until(7) <= 0
    assert not belief.has_seen(7)
    assert touched(belief, 7, 4) == [False, False, False, True]


def test_one_disappointment_takes_a_part_of_the_others_credit() -> None:
    belief = Belief()
    for chunk in (1, 2):
        belief.learn(chunk, 10.0, hot=True)
        belief.learn(chunk, 20.0, hot=True)

    belief.learn(1, 20.1, hot=False)

    assert belief.until(2) == 20.0 + LONGEST_S / 4


def test_many_disappointments_end_all_long_credit_and_confirmations_restore_it() -> None:
    belief = Belief()
    for chunk in range(10):
        belief.learn(chunk, 10.0, hot=True)
        belief.learn(chunk, 20.0, hot=True)
    for chunk in range(9):
        belief.learn(chunk, 20.0, hot=False)
    assert belief.until(9) == 20.0 + FIRST_S

    for _ in range(10):
        belief.learn(9, 20.0, hot=True)

    assert belief.until(9) == 20.0 + LONGEST_S


def test_while_blocks_are_cold_no_belief_begins() -> None:
    belief = Belief()
    belief.doubt(10.0)

    assert not belief.is_due(7, CHUNK, 10.0 + FIRST_S / 2)
    assert belief.is_due(7, CHUNK, 10.0 + FIRST_S)


def test_doubt_leaves_what_is_believed_alone() -> None:
    belief = Belief()
    belief.learn(7, 10.0, hot=True)
    belief.doubt(10.0)

    assert belief.until(7) == 10.0 + FIRST_S
    assert belief.is_due(7, SMALL, 10.0 + FIRST_S)


def test_its_tables_do_not_grow_without_bound() -> None:
    belief = Belief()
    for chunk in range(1 << 16):
        belief.is_due(chunk, SMALL, 10.0)
        belief.learn(chunk, 10.0, hot=True)
        belief.is_due(-chunk, SMALL, 10.0)

    assert len(belief._seen) <= 1 << 14
    assert len(belief._touches) <= 1 << 14
    assert belief.until((1 << 16) - 1) == 10.0 + FIRST_S


def test_clearing_forgets_everything() -> None:
    belief = Belief()
    belief.learn(7, 10.0, hot=True)
    belief.clear()

    assert belief.until(7) <= 0
    assert not belief.is_due(7, SMALL, 10.0)
