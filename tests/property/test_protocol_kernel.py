"""The descriptor on the real kernel against a model: handshakes, touches by threads, reads, ranges, marks, closes."""

from __future__ import annotations

import os
from random import Random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from tests.conformance.protocol_tools import Toucher
from tests.property.protocol_world import DESCRIPTORS, OTHER, PAGES, VERSION, World

_WHO = st.integers(0, DESCRIPTORS - 1)
_PAGE = st.integers(0, PAGES - 1)
_SPAN = st.tuples(_PAGE, st.integers(1, PAGES)).map(lambda pair: (pair[0], min(pair[0] + pair[1], PAGES)))


@pytest.fixture(scope="module")
def toucher(tmp_path_factory: pytest.TempPathFactory) -> Toucher:
    return Toucher.compiled(tmp_path_factory.mktemp("touch"))


class ProtocolMachine(RuleBasedStateMachine):
    """Every act of the world, in any order."""

    toucher: Toucher

    def __init__(self) -> None:
        super().__init__()
        self.world = World(self.toucher)

    def teardown(self) -> None:
        self.world.close()

    @rule(who=_WHO, version=st.sampled_from([VERSION, OTHER]))
    def ask(self, who: int, version: bytes) -> None:
        self.world.ask(who, version)

    @rule(who=_WHO)
    def shake_hands(self, who: int) -> None:
        self.world.ask(who, VERSION)
        self.world.read(who)

    @rule(who=_WHO, length=st.sampled_from([0, 7, 8, 9, 4096]))
    def read(self, who: int, length: int) -> None:
        self.world.read(who, length)

    @rule(at=_PAGE)
    def touch(self, at: int) -> None:
        self.world.touch(at)

    @rule(at=_PAGE)
    def drop(self, at: int) -> None:
        self.world.drop(at)

    @rule(who=_WHO, at=_PAGE, byte=st.integers(1, 255))
    def place(self, who: int, at: int, byte: int) -> None:
        self.world.place(who, at, byte)

    @rule(who=_WHO, first=_PAGE, stop=st.integers(0, PAGES))
    def wake(self, who: int, first: int, stop: int) -> None:
        self.world.wake(who, first, stop)

    @rule(who=_WHO, span=_SPAN, by_write=st.booleans())
    def register(self, who: int, span: tuple[int, int], *, by_write: bool) -> None:
        self.world.register(who, *span, by_write=by_write)

    @rule(who=_WHO, span=_SPAN, by_write=st.booleans())
    def unregister(self, who: int, span: tuple[int, int], *, by_write: bool) -> None:
        self.world.unregister(who, *span, by_write=by_write)

    @rule(span=_SPAN, marked=st.booleans())
    def mark(self, span: tuple[int, int], *, marked: bool) -> None:
        self.world.mark(*span, marked=marked)

    @rule(who=_WHO)
    def renew(self, who: int) -> None:
        self.world.renew(who)

    @invariant()
    def all_is_as_the_model_says(self) -> None:
        self.world.check()


def test_any_sequence_of_acts_does_what_the_model_says(toucher: Toucher) -> None:
    ProtocolMachine.toucher = toucher
    run_state_machine_as_test(
        ProtocolMachine,
        settings=settings(
            max_examples=40,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )


def test_random_operations_do_not_deviate(toucher: Toucher, soak: bool) -> None:
    """10 000 operations, or a million with --soak; `USERFAULT_SEED` repeats a run."""
    seed = int(os.environ.get("USERFAULT_SEED", "2014"))
    random, world = Random(seed), World(toucher)
    number, total = 0, 1_000_000 if soak else 10_000
    try:
        for number in range(total):
            world.act(random)
            if number % 10 == 0:
                world.check()
    except BaseException:
        print(f"operation {number} of {total}, USERFAULT_SEED={seed}")
        raise
    finally:
        world.close()
    print(f"{total} operations, USERFAULT_SEED={seed}: {world.touches} touches, no deviation")
