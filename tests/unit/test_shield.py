"""Threads for a piece of work: each begins, or somebody hears of it."""

from __future__ import annotations

import threading

import pytest

from userfault import shield
from userfault.latch import Latch


def test_begin_returns_while_the_work_goes_on() -> None:
    go_on, done = Latch(), Latch()

    def work() -> None:
        go_on.wait()
        done.set()

    shield.begin(work)
    assert not done.is_set
    go_on.set()
    assert done.wait(10)


@pytest.mark.parametrize("threads", ["none to be had", "one that never takes its first step"])
def test_a_thread_that_cannot_begin_is_an_error(threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    late: list[object] = []

    def start(function: object, _arguments: object) -> None:
        if threads == "none to be had":
            raise RuntimeError("can't start new thread")
        late.append(function)

    monkeypatch.setattr(shield, "start_new_thread", start)
    monkeypatch.setattr(shield, "_BEGIN_S", 0.01)
    worked: list[int] = []
    with pytest.raises(RuntimeError, match=r"can't start new thread|there is no memory for its first step"):
        shield.begin(lambda: worked.append(1))
    for function in late:  # after all: too late, since somebody was told that it is not done
        function()  # type: ignore[operator]  # a thread's
    assert not worked


def test_what_the_work_raises_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    heard, raised = Latch(), list[object]()

    def hook(unraisable: object) -> None:
        raised.append(type(getattr(unraisable, "exc_value", None)))
        heard.set()

    monkeypatch.setattr("sys.unraisablehook", hook)
    shield.begin(lambda: 1 // 0)
    assert heard.wait(10)
    assert raised == [ZeroDivisionError]


def test_in_other_threads_work_is_done_where_it_is_asked_for() -> None:
    idents: list[int] = []
    thread = threading.Thread(target=lambda: shield.to_the_end(lambda: idents.append(threading.get_ident())))
    thread.start()
    thread.join()
    shield.to_the_end(lambda: idents.append(threading.get_ident()))
    assert idents[0] == thread.ident
    assert idents[1] not in (0, threading.get_ident())
