"""Pins: counts in shared memory that nobody may lose, and limits that leave nothing changed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from threading import Barrier, Thread
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from userfault.blocks.pins import MOST, Pin, Pins

if TYPE_CHECKING:
    from userfault.blocks.ledger import Ledger

MANY = 1 << 62


def book_of(blocks: int) -> Ledger:
    return cast("Ledger", SimpleNamespace(pins=memoryview(bytearray(blocks))))


def pinned(first: int, stop: int) -> Pin:
    """A range as it is once it has been pinned."""
    pin = Pin(first, stop)
    pin.done = stop
    return pin


def test_pins_count_up_and_down() -> None:
    ledger = book_of(10)
    pins = Pins(ledger)
    pins.add(Pin(2, 5), MANY)
    pins.add(Pin(4, 6), MANY)
    assert bytes(ledger.pins) == bytes([0, 0, 1, 1, 2, 1, 0, 0, 0, 0])
    assert pins.blocks == 4
    pins.remove(pinned(2, 5))
    assert bytes(ledger.pins) == bytes([0, 0, 0, 0, 1, 1, 0, 0, 0, 0])
    assert pins.blocks == 2
    pins.remove(pinned(4, 6))
    assert not any(ledger.pins)
    assert pins.blocks == 0


def test_an_empty_range_pins_nothing() -> None:
    ledger = book_of(3)
    pins = Pins(ledger)
    pins.add(Pin(0, 0), 0)
    pins.remove(pinned(0, 0))
    assert not any(ledger.pins)


def test_more_than_the_budget_is_refused_and_changes_nothing() -> None:
    ledger = book_of(10)
    pins = Pins(ledger)
    pins.add(Pin(0, 3), 4)
    with pytest.raises(ValueError, match=r"5 blocks .* holds 4"):
        pins.add(Pin(5, 7), 4)
    assert bytes(ledger.pins) == b"\1\1\1" + bytes(7)
    pins.add(Pin(1, 4), 4)  # two of these count already
    assert pins.blocks == 4


def test_a_block_is_pinned_255_times_and_no_more() -> None:
    ledger = book_of(3)
    pins = Pins(ledger)
    for _ in range(MOST):
        pins.add(Pin(1, 2), MANY)
    with pytest.raises(ValueError, match="pinned 255 times"):
        pins.add(Pin(0, 3), MANY)
    assert bytes(ledger.pins) == bytes([0, MOST, 0])
    for _ in range(MOST):
        pins.remove(pinned(1, 2))
    assert pins.blocks == 0


def test_ranges_longer_than_one_step_are_counted_whole() -> None:
    ledger = book_of(200_001)
    pins = Pins(ledger)
    pins.add(Pin(1, 200_000), MANY)
    pins.add(Pin(131_072, 131_073), MANY)
    assert pins.blocks == 199_999
    assert ledger.pins[131_072] == 2
    assert ledger.pins[0] == ledger.pins[200_000] == 0
    pins.remove(pinned(1, 200_000))
    assert pins.blocks == 1


def test_what_was_not_pinned_is_not_taken_away() -> None:
    ledger = book_of(5)
    pins = Pins(ledger)
    pins.add(Pin(0, 5), MANY)
    refused, half = Pin(0, 5), Pin(1, 4)
    with pytest.raises(ValueError, match="pinned at once"):
        pins.add(refused, 2)
    pins.remove(refused)
    pins.add(half, MANY)
    half.done = 1  # as if a signal handler had raised before anything was done
    pins.remove(half)
    assert bytes(ledger.pins) == bytes([1, 2, 2, 2, 1])
    half.done = 4
    pins.remove(half)
    pins.remove(half)  # again, as after one that was interrupted when all was done
    assert bytes(ledger.pins) == bytes([1] * 5)
    assert pins.blocks == 5


@pytest.fixture
def frequent_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def test_no_pin_is_lost_between_threads(frequent_switches: None) -> None:
    ledger = book_of(64)
    pins = Pins(ledger)
    start = Barrier(8)

    def work(number: int) -> None:
        start.wait()
        for step in range(200):
            first = (number * 7 + step) % 60
            pins.add(Pin(first, first + 4), MANY)
            pins.remove(pinned(first, first + 4))

    threads = [Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(ledger.pins)
    assert pins.blocks == 0


class PinsMachine(RuleBasedStateMachine):
    """Pins against a list of the ranges that are held."""

    blocks = 12

    @initialize(most=st.integers(1, 14))
    def begin(self, most: int) -> None:
        self.most = most
        self.ledger = book_of(self.blocks)
        self.pins = Pins(self.ledger)
        self.held: list[tuple[int, int]] = []

    def counts(self, held: list[tuple[int, int]]) -> list[int]:
        return [sum(first <= block < stop for first, stop in held) for block in range(self.blocks)]

    @rule(first=st.integers(0, 12), length=st.integers(0, 12))
    def add(self, first: int, length: int) -> None:
        stop = min(first + length, self.blocks)
        wanted = self.counts([*self.held, (first, stop)])
        if sum(map(bool, wanted)) <= self.most:
            self.pins.add(Pin(first, stop), self.most)
            self.held.append((first, stop))
        else:
            with pytest.raises(ValueError, match="pinned at once"):
                self.pins.add(Pin(first, stop), self.most)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 1000))
    def remove(self, which: int) -> None:
        self.pins.remove(pinned(*self.held.pop(which % len(self.held))))

    @invariant()
    def the_ledger_says_what_is_held(self) -> None:
        wanted = self.counts(self.held)
        assert list(self.ledger.pins) == wanted
        assert self.pins.blocks == sum(map(bool, wanted))


TestPins = PinsMachine.TestCase


def test_a_pin_that_is_collected_while_another_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The garbage collector may end a forgotten `with` block in the middle of `add`: nobody waits for himself."""
    ledger = book_of(8)
    pins = Pins(ledger)
    old, new = Pin(2, 5), Pin(3, 6)
    pins.add(old, MANY)
    take = pins._add

    def collected(pin: Pin, most: int) -> None:
        pins.remove(old)
        take(pin, most)

    monkeypatch.setattr(pins, "_add", collected)
    pins.add(new, MANY)
    assert bytes(ledger.pins[:8]) == bytes([0, 0, 0, 1, 1, 1, 0, 0])
    assert pins.blocks == 3
