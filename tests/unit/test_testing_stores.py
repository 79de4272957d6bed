"""The conformance kit finds what is wrong with a store, and leaves out what a store cannot do."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from userfault.kernel.memory import address_of
from userfault.stores import MemoryStore, Store
from userfault.testing import (
    FailingStore,
    GilHoldingStore,
    LyingSizeStore,
    PatternStore,
    ShortStore,
    SlowStore,
    StoreTests,
    UnpicklableStore,
    WrongErrorStore,
)

DATA = StoreTests.data


class Kit(StoreTests):
    """The kit for whatever store it is given; not collected, since its name does not begin with Test."""

    def __init__(self, store: Store) -> None:
        self.made = store

    def make_store(self, data: bytes, tmp_path: Path) -> Store:
        return self.made


class OverReadingStore(MemoryStore):
    """Past the end there is more."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        part = self._view[max(offset, 0) : max(offset, 0) + buffer.nbytes]
        buffer[:] = bytes(part) + bytes(buffer.nbytes - len(part))


class KeepingStore(MemoryStore):
    """Keeps the buffers it is given."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        super().read_into(offset, buffer)
        self.kept = memoryview(buffer)


class GreedyStore(MemoryStore):
    """Writes beyond the buffer."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        super().read_into(offset, buffer)
        whole = memoryview(buffer.obj)
        whole[-1] = 0


class SharedStateStore(PatternStore):
    """Two threads at once confuse it."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.where = offset
        time.sleep(0.0001)
        buffer[:] = self.expected(self.where, buffer.nbytes)


class WrongLocateStore(MemoryStore):
    """Points beside the bytes."""

    def locate(self, offset: int, length: int) -> int:
        return super().locate(offset, length) + (1 if offset + length < self.size else 0)


class WrongNowStore(MemoryStore):
    """Says that it has filled what it has not."""

    def read_now(self, offset: int, buffer: memoryview) -> bool:
        return True


class VagueNowStore(MemoryStore):
    """Answers with something that is merely true."""

    def read_now(self, offset: int, buffer: memoryview) -> Any:
        return buffer.nbytes


class LonelyStore(MemoryStore):
    """Equal to nobody but itself."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__


class OnceClosedStore(MemoryStore):
    """Cannot be closed twice."""

    def close(self) -> None:
        self._view.release()
        self._view.nbytes  # noqa: B018


class TalkativeStore(MemoryStore):
    """Describes itself at length."""

    def describe(self) -> str:
        return "one line\nand another"


def in_memory(kind: type[MemoryStore]) -> Callable[[], Store]:
    return lambda: kind(DATA)


WRONG: list[tuple[Callable[[], Store], str]] = [
    (lambda: ShortStore(MemoryStore(DATA)), "test_it_reads_the_whole"),
    (lambda: ShortStore(MemoryStore(DATA)), "test_it_reads_its_first_and_its_last_byte"),
    (lambda: LyingSizeStore(MemoryStore(DATA), len(DATA) + 1), "test_its_size_is_the_size_of_what_it_holds"),
    (lambda: LyingSizeStore(MemoryStore(DATA), len(DATA) - 1), "test_its_size_is_the_size_of_what_it_holds"),
    (lambda: LyingSizeStore(MemoryStore(DATA), "much"), "test_its_attributes_are_of_the_right_kind"),
    (lambda: LyingSizeStore(MemoryStore(DATA), 0), "test_its_attributes_are_of_the_right_kind"),
    (lambda: GilHoldingStore(MemoryStore(DATA), 0.25), "test_it_lets_other_threads_run_while_it_waits"),
    (lambda: UnpicklableStore(len(DATA)), "test_it_can_be_pickled_after_use"),
    (lambda: FailingStore(len(DATA)), "test_it_reads_the_whole"),
    (lambda: WrongErrorStore(len(DATA), "MemoryError"), "test_it_refuses_what_is_not_there"),
    (lambda: PatternStore(len(DATA)), "test_it_reads_the_whole"),
    (in_memory(OverReadingStore), "test_it_refuses_what_is_not_there"),
    (in_memory(KeepingStore), "test_it_does_not_keep_the_buffer"),
    (in_memory(GreedyStore), "test_it_leaves_what_is_around_the_buffer_alone"),
    (lambda: SharedStateStore(len(DATA)), "test_it_reads_in_many_threads_at_once"),
    (in_memory(WrongLocateStore), "test_what_it_locates_is_what_it_reads"),
    (in_memory(WrongNowStore), "test_what_it_reads_now_is_what_it_reads"),
    (in_memory(VagueNowStore), "test_what_it_reads_now_is_what_it_reads"),
    (in_memory(LonelyStore), "test_it_is_the_same_after_pickling"),
    (in_memory(LonelyStore), "test_it_is_the_same_after_copying"),
    (in_memory(OnceClosedStore), "test_it_closes_twice"),
    (in_memory(TalkativeStore), "test_it_describes_itself_in_one_line"),
]
OPTIONAL = ("test_a_lost_backing_is_an_error", "test_a_changed_backing_is_an_error")


@pytest.mark.parametrize(
    ("make", "test"),
    WRONG,
    ids=[f"{number}-{type(make()).__name__}-{test}" for number, (make, test) in enumerate(WRONG)],
)
def test_a_misbehaving_store_is_found_out(make: Callable[[], Store], test: str) -> None:
    kit = Kit(make())

    with pytest.raises(BaseException) as caught:  # noqa: PT011  # each in its own way
        getattr(kit, test)(kit.made)

    assert not isinstance(caught.value, (NameError, pytest.skip.Exception))


def test_a_slow_store_that_releases_the_gil_is_not_blamed() -> None:
    kit = Kit(SlowStore(MemoryStore(DATA), 0.25))

    kit.test_it_lets_other_threads_run_while_it_waits(kit.made)


def test_a_difference_is_pointed_out() -> None:
    kit = Kit(ShortStore(MemoryStore(DATA)))

    with pytest.raises(AssertionError, match=r"wrong bytes at offset 0, length \d+: byte \d+ is 0xa5 instead of"):
        kit.test_it_reads_the_whole(kit.made)


def test_tests_of_absent_abilities_are_not_there() -> None:
    assert [getattr(Kit, name) for name in OPTIONAL] == [None, None]


def test_tests_of_abilities_come_with_their_hooks() -> None:
    class Losing(Kit):
        def lose_backing(self, store: Store, tmp_path: Path) -> None:
            address_of(b"")

    class Changing(Losing):
        def change_backing(self, store: Store, tmp_path: Path) -> None:
            pass

    lost, changed = (getattr(StoreTests, name) for name in OPTIONAL)
    assert [getattr(Losing, name) for name in OPTIONAL] == [lost, None]
    assert [getattr(Changing, name) for name in OPTIONAL] == [lost, changed]


def test_a_subclass_may_replace_a_test() -> None:
    class Replacing(Kit):
        def test_a_lost_backing_is_an_error(self, store: Store, tmp_path: Path) -> None:
            """Something of its own."""

    assert "own" in (Replacing.test_a_lost_backing_is_an_error.__doc__ or "")


def test_the_kit_wants_a_store() -> None:
    with pytest.raises(NotImplementedError, match="define make_store"):
        StoreTests().make_store(b"", Path())
