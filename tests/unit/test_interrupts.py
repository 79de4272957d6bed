"""`interruptible`: what it does to the handler of SIGINT, and what it leaves alone; a crash test shows its use."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from userfault import interruptible
from userfault.kernel import process

BIT = 1 << (signal.SIGINT - 1)


@pytest.fixture(autouse=True)
def own_handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def is_caught() -> bool:
    return bool(int(process.status()["SigCgt"], 16) & BIT)


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_is_handled_as_ever_and_each_that_is_handled_is_a_first() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with interruptible():
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                press()
            assert is_caught()
    with pytest.raises(KeyboardInterrupt):
        press()


def test_a_handler_of_ones_own_is_called() -> None:
    numbers: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: numbers.append(number))
    with interruptible():
        press()
        press()
    assert numbers == [signal.SIGINT] * 2


def test_it_leaves_the_handler_as_it_was_also_after_an_exception() -> None:
    before, threads = signal.getsignal(signal.SIGINT), threading.active_count()
    with pytest.raises(ArithmeticError), interruptible():
        raise ArithmeticError("on purpose")
    assert signal.getsignal(signal.SIGINT) is before
    assert threading.active_count() == threads


def test_a_handler_that_was_installed_meanwhile_stays() -> None:
    with interruptible():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_where_python_has_no_handler_there_is_nothing_to_do(handler: signal.Handlers) -> None:
    signal.signal(signal.SIGINT, handler)
    with interruptible():
        assert signal.getsignal(signal.SIGINT) is handler
        assert not is_caught()


def test_it_nests() -> None:
    before, threads = signal.getsignal(signal.SIGINT), threading.active_count()
    with interruptible():
        outer = signal.getsignal(signal.SIGINT)
        with interruptible():
            assert threading.active_count() == threads + 1
        assert signal.getsignal(signal.SIGINT) is outer
    assert signal.getsignal(signal.SIGINT) is before


def test_it_decorates() -> None:
    before = signal.getsignal(signal.SIGINT)

    @interruptible()
    def main() -> bool:
        return signal.getsignal(signal.SIGINT) is before

    assert not main()
    assert not main()
    assert signal.getsignal(signal.SIGINT) is before


def test_it_is_for_the_main_thread() -> None:
    errors: list[str] = []

    def enter() -> None:
        try:
            interruptible().__enter__()
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert errors == ["interruptible() is for the main thread: Python handles signals in no other"]
