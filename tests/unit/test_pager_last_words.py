"""What a pager still says when things end badly: to an application that does not read, in a log that is busy."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from typing import TYPE_CHECKING, Any, cast

import pytest

from userfault import StoreError
from userfault.kernel import memfd, process
from userfault.latch import Latch
from userfault.pager import logs, pulse, spawn, trial, wire
from userfault.pager.supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from userfault.pager.spawn import Will


@pytest.fixture
def supervisor() -> Iterator[tuple[Supervisor, Any]]:
    """A supervisor without a worker, and the application's end of the request socket."""
    ward, worker = wire.pair()
    control, application = wire.pair()
    page, pidfd = pulse.create(), process.pidfd_open(os.getpid())
    will = {"ward": ward.detach(), "control": control.detach(), "application": pidfd, "pulse": page}
    one = Supervisor(cast("Will", will | {"regions": [], "exports": [], "strikes": 5}))
    with worker, application, one.ward, one.control:
        yield one, application
    one.pulse.close()
    os.close(page)
    os.close(pidfd)


def test_the_last_word_reaches_an_application_that_did_not_read(supervisor: tuple[Supervisor, Any]) -> None:
    one, application = supervisor
    news = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            wire.send(one.control, wire.Message(wire.READ_FAILED, text=b"news"), socket.MSG_DONTWAIT)
            news += 1
    thread = threading.Thread(target=one.tell, args=(wire.Message(wire.LOST, text=b"given up"),))
    thread.start()
    for _ in range(news):
        message = wire.receive(application)
        assert message is not None
        assert message.kind == wire.READ_FAILED
    message = wire.receive(application)
    assert message is not None
    assert (message.kind, message.text) == (wire.LOST, b"given up")
    application.close()
    thread.join(10)
    assert not thread.is_alive()


def test_a_process_that_could_not_even_begin_is_no_strike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spawn, "start_successor", lambda _role, _will: os.posix_spawn("/bin/false", ["false"], {}))
    region = memfd.create("region", 4096)
    with pytest.raises(StoreError, match="did not come to that: ended with exit status 1") as caught:
        trial.read(region, 0, memoryview(bytearray(4096)), 10**10)
    os.close(region)
    assert not caught.value.permanent


def test_what_is_said_while_something_is_being_logged_is_logged_too() -> None:
    """A handler, or a finalizer that the garbage collector runs at any step, may say something itself."""
    heard: list[str] = []
    done = Latch()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())
            if record.getMessage() == "first":
                logs.put(logs.ERROR, "test", "second")
                raise RuntimeError("a handler that breaks")
            done.set()

    logger, handler = logging.getLogger("userfault.test"), Handler()
    logger.addHandler(handler)
    try:
        logs.put(logs.WARNING, "test", "first")
        assert done.wait(10)
    finally:
        logger.removeHandler(handler)
    assert heard == ["first", "second"]
