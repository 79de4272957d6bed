"""A victim whose system calls fail: it plays scenes, as it is told, and says what it saw.

The program forks a child for each victim, and waits for it.  The child lays a filter upon itself, which its pager
inherits (`injection.seccomp`).
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import json
import os
import signal
import socket
import sys
import time
import traceback
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tests.crash.injection import seccomp
from tests.crash.injection.scenes import SCENES, afterwards, prepare
from tests.crash.injection.trial import BEGIN, END, Trial, mark, own
from tests.crash.programs.common import begin

import userfault
from userfault.testing.leaks import Holdings, holdings

if TYPE_CHECKING:
    from collections.abc import Iterator

SETTLE_S = 5.0
_PR_SET_PDEATHSIG = 1


class Channel:
    """Talks with the test."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)

    def say(self, **words: Any) -> None:
        with own():
            self._socket.send(json.dumps(words).encode())

    def hear(self) -> dict[str, Any]:
        with own():
            words: dict[str, Any] = json.loads(self._socket.recv(1 << 16) or b"{}")
        return words


def serve(fd: int, folder: str) -> None:
    """Fork a victim whenever told to; say how it ended."""
    faulthandler.cancel_dump_traceback_later()  # a forked child would wait for its thread
    end_with_parent()
    prepare(folder)
    channel = Channel(fd)
    while order := channel.hear():
        pid = os.fork()
        if not pid:
            code = 1
            try:
                be_victim(channel, folder, order["ignored"])
                code = 0
            except BaseException:  # noqa: BLE001  # whatever it was, this process must not go on
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        channel.say(status=os.waitpid(pid, 0)[1])


def be_victim(channel: Channel, folder: str, ignored: list[int]) -> None:
    """Play scenes until there is no further order."""
    end_with_parent()
    place = os.dup(0)  # the lowest number that is free: the listener's
    os.close(place)
    channel.say(pid=os.getpid(), listener=place)
    listener = seccomp.lay(ignored, others=True)
    assert listener == place
    channel.hear()
    os.close(listener)
    before = holdings()
    while order := channel.hear():
        faulthandler.dump_traceback_later(order["limit"], exit=True)
        channel.say(**play(order, folder, before))
        faulthandler.cancel_dump_traceback_later()


def play(order: dict[str, Any], folder: str, before: Holdings) -> dict[str, Any]:
    """Play a scene; then see whether all is well again."""
    before = replace(before, threads=holdings().threads)  # the watchdog has one, each time another
    trial, after = Trial(folder, strict=order["strict"]), Trial(folder, strict=True)
    with counted():
        SCENES[order["scene"]](trial)
    if not order["strict"]:
        afterwards(after)
    if order["fresh"]:
        errors = len(trial.errors)
        with counted():
            close_pager(trial)
        if len(trial.errors) > errors:
            afterwards(after)
            close_pager(after)
        look_for_leaks(after, before)
    return {"errors": trial.errors, "wrong": trial.wrong + [f"afterwards: {text}" for text in after.wrong]}


@contextlib.contextmanager
def counted() -> Iterator[None]:
    """Have system calls counted, and the one that is to fail fail."""
    mark(BEGIN)
    try:
        yield
    finally:
        mark(END)


def end_with_parent() -> None:
    """Do not outlive a test that was ended: nobody gives leave to system calls any more."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def close_pager(trial: Trial) -> None:
    """Close the default pager, if there is one."""
    pager = userfault.pager.client._default
    if pager is not None:
        with trial.step("close the pager"):
            pager.close()


def look_for_leaks(trial: Trial, before: Holdings) -> None:
    """See that nothing is left, as soon as what was told to end has ended.

    But for what was put in the place of descriptors that could not be closed.
    """
    deadline = time.monotonic() + SETTLE_S
    with own():
        gc.collect()
        while (left := _left(before)) and time.monotonic() < deadline:
            time.sleep(0.005)
            gc.collect()
    trial.wrong += [f"left behind: {text}" for text in left]


def _left(before: Holdings) -> list[str]:
    return [text for text in holdings().beyond(before) if not text.endswith(os.devnull)]


if __name__ == "__main__":
    begin(globals())
