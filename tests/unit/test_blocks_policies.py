"""Eviction policies: what each keeps, and the rules that all of them follow."""

from __future__ import annotations

import pickle
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from userfault.blocks.policies import DEFAULT, POLICIES, EvictionPolicy, S3FifoPolicy, check_policy, make_policy

steps = st.lists(st.tuples(st.sampled_from(["admit", "victim", "remove", "resize"]), st.integers(0, 30)), max_size=200)


def nobody(block: int) -> bool:
    return False


@pytest.mark.parametrize("name", POLICIES)
@given(steps=steps, used=st.sets(st.integers(0, 30)))
def test_a_victim_is_one_that_was_admitted_and_each_is_given_once(
    name: str, steps: list[tuple[str, int]], used: set[int]
) -> None:
    policy, inside = make_policy(name), set[int]()
    policy.resize(10)
    for step, block in steps:
        if step == "admit":
            policy.admit(block)
            inside.add(block)
        elif step == "remove":
            policy.remove(block)
            inside.discard(block)
        elif step == "resize":
            policy.resize(block + 1)
        elif inside:
            inside.remove(policy.victim(used.__contains__))
    while inside:
        inside.remove(policy.victim(nobody))


@pytest.mark.parametrize("name", POLICIES)
def test_each_travels_by_pickle(name: str) -> None:
    policy = pickle.loads(pickle.dumps(make_policy(name)))
    policy.admit(7)
    assert policy.victim(nobody) == 7


class Cache:
    """A memory of some blocks, as a region is one: it knows of misses, and of use only when it is asked."""

    def __init__(self, policy: EvictionPolicy, blocks: int) -> None:
        self.policy, self.blocks = policy, blocks
        self.inside: set[int] = set()
        self.touched: set[int] = set()
        self.misses = 0
        policy.resize(blocks)

    def touch(self, block: int) -> None:
        self.touched.add(block)
        if block in self.inside:
            return
        self.misses += 1
        if len(self.inside) == self.blocks:
            self.inside.remove(self.policy.victim(self.used))
        self.inside.add(block)
        self.touched.discard(block)
        self.policy.admit(block)

    def used(self, block: int) -> bool:
        was = block in self.touched
        self.touched.discard(block)
        return was


def popular_among_a_scan(cache: Cache) -> int:
    random, missed = Random(3), 0
    for step in range(20_000):
        before = cache.misses
        cache.touch(random.randrange(50) if step % 2 else 1000 + step)
        missed += cache.misses - before if step % 2 else 0
    return missed


def test_the_default_keeps_what_is_popular_while_a_scan_goes_by() -> None:
    missed = {name: popular_among_a_scan(Cache(make_policy(name), 100)) for name in POLICIES}

    assert missed[DEFAULT] < 200, "of 10 000 touches"
    assert missed["fifo"] > 3000
    assert missed["clock"] < missed["fifo"]


def test_without_samples_it_still_does() -> None:
    cache = Cache(S3FifoPolicy(), 100)
    cache.used = nobody  # type: ignore[method-assign]  # as where nothing but the faults is known
    assert popular_among_a_scan(cache) < 3000


def test_random_keeps_a_part_of_a_loop_that_is_a_little_too_large() -> None:
    missed = {}
    for name in POLICIES:
        cache = Cache(make_policy(name), 100)
        cache.used = nobody  # type: ignore[method-assign]  # each block of it was used once
        for step in range(11_000):
            cache.touch(step % 110)
        missed[name] = cache.misses
    assert missed["random"] < 5000
    assert missed["fifo"] == 11_000


def test_what_is_not_a_policy_is_named() -> None:
    assert check_policy(None) == DEFAULT
    mine = S3FifoPolicy(small=0.2)
    assert check_policy(mine) is mine
    assert make_policy(mine) is mine
    with pytest.raises(
        ValueError, match=r"policy must be one of 's3fifo', 'clock', 'fifo', 'random', or .*, got 'lru'"
    ):
        check_policy("lru")
    with pytest.raises(TypeError, match="policy must be a name or an EvictionPolicy, not int"):
        check_policy(3)
