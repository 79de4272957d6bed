"""The parts of the pager that can be seen alone: recipe, failure, latency, placement."""

from __future__ import annotations

import mmap
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from userfault.blocks.ledger import BOUNDS
from userfault.errors import Error, StoreError
from userfault.kernel import memfd
from userfault.pager import failure, placement, recipe
from userfault.pager.placement import FLIGHT_NS, MEMORY_NS, PERIOD_NS, Placement
from userfault.pager.recipe import Recipe
from userfault.pager.wire import HEAD, MAX_MESSAGE
from userfault.stats import Latency
from userfault.stores import FileStore, MemoryStore, Store
from userfault.testing import PatternStore, UnpicklableStore

# -- recipe ---------------------------------------------------------------------------------------------------------


@contextmanager
def travelled(store: Store) -> Iterator[Store]:
    """A store as the pager gets it: through a memfd, over the memfd's own memory."""
    made = Recipe(store)
    fd = memfd.create("test-recipe", mmap.PAGESIZE + made.length, seal=False)
    try:
        made.write(fd, mmap.PAGESIZE)
        area = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
        yield recipe.load(memoryview(area)[mmap.PAGESIZE :], store.size)
    finally:
        os.close(fd)


@pytest.mark.parametrize("size", [1, 5, 4096, 4097, 1_000_000])
def test_memory_travels_beside_the_pickle(size: int) -> None:
    data = os.urandom(size)
    with travelled(MemoryStore(data)) as there:
        assert there.size == size
        assert there.locate(0, size)
        buffer = bytearray(size)
        there.read_into(0, memoryview(buffer))
        assert buffer == data


def test_the_length_says_what_will_be_written() -> None:
    small, big = Recipe(MemoryStore(b"x")), Recipe(MemoryStore(bytes(1 << 20)))
    assert small.length < 3 * mmap.PAGESIZE
    assert (1 << 20) < big.length < (1 << 20) + 3 * mmap.PAGESIZE


def test_a_file_travels_as_path_and_identity(tmp_path: Any) -> None:
    (tmp_path / "f").write_bytes(b"0123456789")
    store = FileStore(tmp_path / "f", 2, 5)
    with travelled(store) as there:
        assert there == store
        buffer = bytearray(5)
        there.read_into(0, memoryview(buffer))
        assert buffer == b"23456"
        there.close()


def test_a_store_of_the_users_own_brings_its_path_along(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "far_away_store.py").write_text(
        "from userfault.stores import Store\n"
        "class Far(Store):\n"
        "    size = 7\n"
        "    def read_into(self, offset, buffer): pass\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    kind: Callable[[], Store] = __import__("far_away_store").Far
    made = Recipe(kind())
    monkeypatch.delitem(sys.modules, "far_away_store")
    monkeypatch.setattr(sys, "path", sys.path[:-1])
    fd = memfd.create("test-recipe", made.length, seal=False)
    made.write(fd, 0)
    with mmap.mmap(fd, 0) as area, memoryview(area) as view:
        assert recipe.load(view, 7).size == 7
    os.close(fd)
    monkeypatch.delitem(sys.modules, "far_away_store")


def test_what_does_not_pickle_is_refused_with_the_reason() -> None:
    with pytest.raises(StoreError, match="does not pickle") as caught:
        Recipe(UnpicklableStore(100))
    assert "UnpicklableStore" in str(caught.value)
    assert "can be imported" in str(caught.value)
    assert isinstance(caught.value.__cause__, TypeError)


class Holding(PatternStore):
    def __init__(self, thing: object) -> None:
        super().__init__(100)
        self.thing = thing


def make_generator() -> Iterator[int]:
    yield 1


@pytest.mark.parametrize(
    "make", [threading.Lock, make_generator, lambda: lambda: 0], ids=["lock", "generator", "lambda"]
)
def test_a_store_that_holds_what_does_not_pickle_is_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(StoreError, match="Holding does not pickle"):
        Recipe(Holding(make()))


def test_a_class_inside_a_function_is_refused() -> None:
    class Local(PatternStore):
        pass

    with pytest.raises(StoreError, match="Local does not pickle"):
        Recipe(Local(100))


def test_a_class_of_the_main_program_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Holding, "__module__", "__main__")
    with pytest.raises(StoreError, match="defined in __main__"):
        Recipe(Holding(1))


def test_a_store_that_cannot_be_made_there_says_why() -> None:
    made = Recipe(Holding(Grenade()))
    fd = memfd.create("test-recipe", made.length, seal=False)
    made.write(fd, 0)
    with (
        mmap.mmap(fd, 0) as area,
        memoryview(area) as view,
        pytest.raises(StoreError, match="could not make the store") as caught,
    ):
        recipe.load(view, 100)
    os.close(fd)
    assert caught.value.cause == "ZeroDivisionError: bang"


class Growing(PatternStore):
    def __reduce__(self) -> tuple[Any, ...]:
        return Growing, (self.size * 2,)


def test_a_store_of_another_size_is_refused_there() -> None:
    with pytest.raises(StoreError, match="has 200 bytes, but had 100"), travelled(Growing(100)):
        pass


class Grenade:
    def __reduce__(self) -> tuple[Any, ...]:
        return explode, ()


def explode() -> None:
    raise ZeroDivisionError("bang")


# -- failure --------------------------------------------------------------------------------------------------------

words = st.text(max_size=3000)


@given(message=words, store=words, cause=words, offset=st.integers(0, 1 << 62), length=st.integers(0, 1 << 30))
def test_a_failure_crosses_as_text_and_fits_a_packet(
    message: str, store: str, cause: str, offset: int, length: int
) -> None:
    error = StoreError(message, store=store, offset=offset, length=length, attempts=3, cause=cause)
    text = failure.encode(error)
    assert len(text) <= MAX_MESSAGE - HEAD.size
    there = failure.decode(text)
    assert (there.offset, there.length, there.attempts) == (offset, length, 3)
    assert (there.message, there.store, there.cause) == (message[:2000], store[:2000], cause[:2000])


def test_any_other_error_becomes_a_store_error() -> None:
    there = failure.decode(failure.encode(KeyError("x")))
    assert there.cause == "KeyError: 'x'"


def test_what_a_store_raises_is_described_with_the_place() -> None:
    told = failure.describe(OSError(5, "Input/output error"), "tape 7", 10, 20, 1)
    assert (told.offset, told.length, told.store) == (10, 20, "tape 7")
    assert told.cause == "OSError: [Errno 5] Input/output error"
    assert pickle.loads(pickle.dumps(told)).cause == told.cause


def test_a_store_that_explains_itself_is_quoted() -> None:
    told = failure.describe(StoreError("the tape is torn"), "tape 7", 10, 20, 1)
    assert str(told) == "tape 7: the tape is torn (offset 10, length 20)"


def test_a_store_without_words_is_named_by_its_class() -> None:
    class Mute(PatternStore):
        def describe(self) -> str:
            raise RuntimeError

    assert failure.name_of(Mute(1)) == "Mute"


# -- latency --------------------------------------------------------------------------------------------------------


def test_no_faults_have_no_latency() -> None:
    assert Latency(()).count == 0
    assert Latency(()).percentile(50) == 0.0


def test_percentiles_are_upper_bounds_in_seconds() -> None:
    latency = Latency(((1000, 50), (2000, 40), (1_000_000, 10)))
    assert latency.count == 100
    assert [latency.percentile(p) for p in (0, 1, 50, 51, 90, 90.5, 100)] == [1e-6, 1e-6, 1e-6, 2e-6, 2e-6, 1e-3, 1e-3]


@pytest.mark.parametrize("percent", [-0.1, 100.1, float("nan"), 1e9])
def test_a_percentile_is_between_0_and_100(percent: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 100") as caught:
        Latency(((1000, 1),)).percentile(percent)
    assert repr(percent) in str(caught.value)


@given(counts=st.lists(st.tuples(st.sampled_from(BOUNDS), st.integers(1, 1000)), min_size=1, unique_by=lambda c: c[0]))
def test_percentiles_never_fall(counts: list[tuple[int, int]]) -> None:
    latency = Latency(tuple(sorted(counts)))
    values = [latency.percentile(p) for p in range(101)]
    assert values == sorted(values)
    assert values[-1] == max(bound for bound, _ in counts) / 1e9


# -- placement ------------------------------------------------------------------------------------------------------


CPUS = sorted(os.sched_getaffinity(0))
two_cores = pytest.mark.skipif(len(CPUS) < 2, reason="one core only")


class Pinned:
    """Threads that stay on a core; placements that move a thread made for it."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def on(self, cpu: int) -> int:
        """Start a thread on a core; return its id once it is there."""
        there = threading.Event()

        def live() -> None:
            os.sched_setaffinity(0, {cpu})
            there.set()
            self._over.wait()

        thread = threading.Thread(target=live)
        self._threads.append(thread)
        thread.start()
        assert there.wait(10)
        assert thread.native_id is not None
        return thread.native_id

    def finish(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


@pytest.fixture
def pinned() -> Iterator[Pinned]:
    threads = Pinned()
    yield threads
    threads.finish()


@pytest.fixture
def policy() -> Iterator[Placement]:
    """A placement of the test's own thread, which is let go afterwards."""
    before = os.sched_getaffinity(0)
    yield Placement(os.getpid())
    os.sched_setaffinity(0, before)
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def test_it_is_free_at_first(policy: Placement) -> None:
    assert policy.cpu == -1
    assert os.sched_getaffinity(0) == set(CPUS)


@pytest.mark.parametrize("cpu", CPUS[:4])
def test_it_follows_one_thread(policy: Placement, pinned: Pinned, cpu: int) -> None:
    policy.saw(pinned.on(cpu), 0)
    assert policy.cpu == cpu
    assert os.sched_getaffinity(0) == {cpu}


@two_cores
def test_it_follows_several_threads_on_one_core(policy: Placement, pinned: Pinned) -> None:
    for thread in [pinned.on(CPUS[1]) for _ in range(3)]:
        policy.saw(thread, 0)
    assert policy.cpu == CPUS[1]


@two_cores
def test_it_lets_go_between_cores_and_follows_the_one_that_stays(policy: Placement, pinned: Pinned) -> None:
    left, right = pinned.on(CPUS[0]), pinned.on(CPUS[1])
    policy.saw(left, 0)
    policy.saw(right, 1)
    assert policy.cpu == -1
    assert os.sched_getaffinity(0) == set(CPUS)
    policy.saw(right, 1 + PERIOD_NS)
    assert policy.cpu == -1, "the left one is not forgotten yet"
    policy.saw(right, 1 + MEMORY_NS)
    assert policy.cpu == CPUS[1]


@two_cores
def test_it_follows_a_thread_that_moves_but_asks_rarely(policy: Placement, pinned: Pinned) -> None:
    thread = pinned.on(CPUS[0])
    policy.saw(thread, 0)
    os.sched_setaffinity(thread, {CPUS[1]})
    with open(f"/proc/self/task/{thread}/stat") as stat:  # asleep, it moves only when it wakes
        moved = int(stat.read().rpartition(")")[2].split()[36]) == CPUS[1]
    policy.saw(thread, PERIOD_NS - 1)
    assert policy.cpu == CPUS[0], "it was looked up a moment ago"
    policy.saw(thread, PERIOD_NS)
    assert policy.cpu == (CPUS[1] if moved else CPUS[0])


def test_it_keeps_away_after_a_flight(policy: Placement, pinned: Pinned) -> None:
    thread = pinned.on(CPUS[0])
    policy.saw(thread, 0)
    policy.flee(10)
    assert policy.cpu == -1
    assert os.sched_getaffinity(0) == set(CPUS)
    policy.saw(thread, 10 + FLIGHT_NS - 1)
    assert policy.cpu == -1
    policy.saw(thread, 10 + FLIGHT_NS)
    assert policy.cpu == CPUS[0]


def test_a_thread_that_is_gone_changes_nothing(policy: Placement, pinned: Pinned) -> None:
    policy.saw(pinned.on(CPUS[0]), 0)
    policy.saw((1 << 22) + 1, 1)  # above the greatest process id there is
    assert policy.cpu == CPUS[0]


def test_it_yields_only_while_it_follows_and_is_busy(policy: Placement, pinned: Pinned) -> None:
    thread = pinned.on(CPUS[0])
    policy.saw(thread, 0)
    assert policy.yielding == (os.sched_getscheduler(0) == os.SCHED_IDLE)
    policy.flee(10)
    assert not policy.yielding
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_a_thread_of_its_own_begins_at_home(policy: Placement, pinned: Pinned) -> None:
    policy.saw(pinned.on(CPUS[0]), 0)
    seen: list[object] = []

    def begin() -> None:
        placement.go_home()
        seen.extend((os.sched_getaffinity(0), os.sched_getscheduler(0)))

    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
    assert seen == [set(CPUS), os.SCHED_OTHER]


@two_cores
def test_a_core_that_was_taken_away_lets_it_go(
    policy: Placement, pinned: Pinned, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_pid: int, _cpus: object) -> None:
        raise OSError(22, "Invalid argument")

    thread = pinned.on(CPUS[0])
    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    policy.saw(thread, 0)
    assert policy.cpu == -1
    monkeypatch.undo()


def test_errors_of_the_pager_are_userfaults() -> None:
    assert issubclass(StoreError, Error)
