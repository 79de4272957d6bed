"""Each misbehaving store misbehaves as it says, and in no other way."""

from __future__ import annotations

import pickle
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import userfault.testing
from userfault.errors import StoreError
from userfault.stores import MemoryStore, Store, check_store
from userfault.testing import (
    ChildError,
    CountingStore,
    CrashingStore,
    FailingStore,
    GilHoldingStore,
    LyingSizeStore,
    PatternStore,
    ShortStore,
    SlowStore,
    StallingStore,
    UnpicklableStore,
    WrongErrorStore,
    run_child,
)
from userfault.testing.reading import read_bytes, read_elsewhere

SIZE = 100_000
PATTERN = PatternStore(SIZE)

EVERY: list[Store] = [
    PATTERN,
    CountingStore(PATTERN, "log"),
    CrashingStore(SIZE, "segv", [5], "once"),
    FailingStore(SIZE, "message", range(3), healed_by="path", times=2),
    GilHoldingStore(PATTERN, 0.1),
    LyingSizeStore(PATTERN, 7),
    ShortStore(PATTERN, 3),
    SlowStore(PATTERN, 0.1),
    StallingStore(PATTERN, "release", "entered", [1]),
    WrongErrorStore(SIZE, "SystemExit"),
]


@pytest.mark.parametrize("store", EVERY, ids=lambda store: type(store).__name__)
def test_it_travels_by_its_arguments(store: Store) -> None:
    twin = pickle.loads(pickle.dumps(store))

    assert twin == store
    assert twin.describe() == store.describe()
    assert hash(twin) == hash(store)
    check_store(twin)


@pytest.mark.parametrize("store", EVERY, ids=lambda store: type(store).__name__)
def test_it_never_answers_without_waiting(store: Store) -> None:
    assert store.locate(0, 10) == 0
    assert store.read_now(0, memoryview(bytearray(10))) is False


def test_every_public_name_is_there() -> None:
    assert all(getattr(userfault.testing, name) for name in userfault.testing.__all__)
    assert dir(userfault.testing) == userfault.testing.__all__
    with pytest.raises(AttributeError, match="has no attribute 'Nope'"):
        userfault.testing.Nope  # noqa: B018


def test_a_slow_store_takes_its_time() -> None:
    start = time.monotonic()

    assert read_bytes(SlowStore(PATTERN, 0.05), 10, 20) == PATTERN.expected(10, 20)
    assert time.monotonic() - start >= 0.05


def test_a_slow_store_is_called_on_a_thread_even_around_memory() -> None:
    assert SlowStore(MemoryStore(b"x"), 1).concurrency == 8
    assert SlowStore(MemoryStore(b"x"), 1, concurrency=3).concurrency == 3
    assert StallingStore(MemoryStore(b"x"), "never").concurrency == 8


def test_a_stalling_store_waits_for_its_path(tmp_path: Path) -> None:
    release, entered = tmp_path / "release", tmp_path / "entered"
    store, found = StallingStore(PATTERN, release, entered), []
    thread = threading.Thread(target=lambda: found.append(read_bytes(store, 1, 2)))

    thread.start()
    while not entered.exists():
        time.sleep(0.001)
    assert found == []
    release.touch()
    thread.join()

    assert found == [PATTERN.expected(1, 2)]
    assert read_bytes(store, 5, 5) == PATTERN.expected(5, 5)


def test_a_stalling_store_stalls_only_where_it_is_told(tmp_path: Path) -> None:
    store = StallingStore(PATTERN, tmp_path / "never", offsets=[5000])

    assert read_bytes(store, 4000, 1000) == PATTERN.expected(4000, 1000)
    assert read_bytes(store, 5001, 10) == PATTERN.expected(5001, 10)


def test_a_failing_store_fails() -> None:
    with pytest.raises(OSError, match=r"^no luck$"):
        read_bytes(FailingStore(SIZE, "no luck"), 0, 1)


def test_a_failing_store_fails_only_where_it_is_told() -> None:
    store = FailingStore(SIZE, "no luck", [5000])

    assert read_bytes(store, 4000, 1000) == PATTERN.expected(4000, 1000)
    with pytest.raises(OSError, match="no luck"):
        read_bytes(store, 4001, 1000)


def test_a_failing_store_heals(tmp_path: Path) -> None:
    by_path, by_count = FailingStore(SIZE, healed_by=tmp_path / "healed"), FailingStore(SIZE, times=2)
    for store in (by_path, by_count):
        for _ in range(2):
            with pytest.raises(OSError, match="the store is on fire"):
                read_bytes(store, 0, 1)
    (tmp_path / "healed").touch()

    for store in (by_path, by_count):
        assert read_bytes(store, 0, 9) == PATTERN.expected(0, 9)


@pytest.mark.parametrize("missing", [1, 10, 100])
def test_a_short_store_leaves_the_end_as_it_was(missing: int) -> None:
    expected = PATTERN.expected(0, 50 - min(missing, 50)) + b"\xa5" * min(missing, 50)

    assert read_bytes(ShortStore(PATTERN, missing), 0, 50) == expected


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("SystemExit", SystemExit),
        ("KeyboardInterrupt", KeyboardInterrupt),
        ("GeneratorExit", GeneratorExit),
        ("MemoryError", MemoryError),
        ("RecursionError", RecursionError),
        ("StoreError", StoreError),
        ("huge", OSError),
    ],
)
def test_a_wrong_error_is_what_it_says(kind: str, error: type[BaseException]) -> None:
    with pytest.raises(error):
        read_bytes(WrongErrorStore(SIZE, kind), 0, 1)


def test_an_error_that_cannot_travel() -> None:
    with pytest.raises(Exception, match="cannot travel") as caught:
        read_bytes(WrongErrorStore(SIZE, "unpicklable"), 0, 1)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(caught.value)


def test_an_error_without_a_text() -> None:
    try:
        read_bytes(WrongErrorStore(SIZE, "unprintable"), 0, 1)
    except Exception as error:  # noqa: BLE001
        with pytest.raises(RuntimeError, match="has no text"):
            str(error)


@pytest.mark.parametrize(
    ("how", "status"),
    [("exit", 3), ("segv", -signal.SIGSEGV), ("abort", -signal.SIGABRT), ("kill", -signal.SIGKILL)],
)
def test_a_crashing_store_crashes_as_told(how: str, status: int) -> None:
    with pytest.raises(ChildError, match="the child failed") as caught:
        read_elsewhere(CrashingStore(SIZE, how), [(0, 10)])
    assert caught.value.result.status == status


def test_a_crashing_store_crashes_once(tmp_path: Path) -> None:
    store = CrashingStore(SIZE, "exit", once=tmp_path / "crashed")

    with pytest.raises(ChildError, match="status 3"):
        read_elsewhere(store, [(7, 10)])
    assert read_elsewhere(store, [(7, 10)]) == [PATTERN.expected(7, 10)]


def test_a_crashing_store_crashes_only_where_it_is_told() -> None:
    assert read_bytes(CrashingStore(SIZE, "kill", offsets=[500]), 0, 500) == PATTERN.expected(0, 500)
    with pytest.raises(ValueError, match="how must be 'exit'"):
        read_bytes(CrashingStore(SIZE, "softly"), 0, 1)


@pytest.mark.parametrize("size", [0, -1, 1 << 70, 1.5, None])
def test_a_lying_store_says_any_size(size: Any) -> None:
    store = LyingSizeStore(PATTERN, size)

    assert store.size == size
    assert read_bytes(store, 0, 10) == PATTERN.expected(0, 10)


def test_a_counting_store_writes_every_read_down(tmp_path: Path) -> None:
    store = CountingStore(PATTERN, tmp_path / "log")
    assert store.reads() == []

    read_bytes(store, 0, 10)
    read_bytes(pickle.loads(pickle.dumps(store)), 5, 20)

    assert store.reads() == [(0, 10), (5, 20)]


def test_an_unpicklable_store_reads_but_does_not_travel() -> None:
    store = UnpicklableStore(SIZE)

    assert read_bytes(store, 0, 10) == PATTERN.expected(0, 10)
    with pytest.raises(TypeError, match="cannot pickle"):
        pickle.dumps(store)


def test_a_pattern_is_quick_at_any_size() -> None:
    store = PatternStore(1 << 60)
    start = time.process_time()

    for number in range(100):
        store.expected(number << 50, 65536)

    assert time.process_time() - start < 2.0  # a tenth of that is usual


def test_a_misbehaving_store_costs_the_pager_no_heavy_module() -> None:
    source = """
import sys
before = set(sys.modules)
import userfault.testing.misbehaving
print([name for name in ("typing", "dataclasses", "pytest", "subprocess", "re", "inspect") if name not in before
       and name in sys.modules])
"""
    result = run_child(source).check()

    assert result.stdout == "[]\n"
