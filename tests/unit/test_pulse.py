"""The heartbeat of supervisor and worker: who is taken for stopped, who for hung, and who is left alone."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from userfault.errors import KernelError
from userfault.kernel import process
from userfault.pager import pulse
from userfault.pager.pulse import HUNG_S, LOOK_S, Pulse

PTRACE_SEIZE, PTRACE_INTERRUPT, PTRACE_DETACH = 0x4206, 0x4207, 17


@pytest.fixture
def pair() -> Iterator[tuple[Pulse, Pulse]]:
    fd = pulse.create()
    mine, other = Pulse(fd, pulse.SUPERVISOR), Pulse(fd, pulse.WORKER)
    os.close(fd)
    yield mine, other
    mine.close()
    other.close()


@pytest.fixture
def sleeper() -> Iterator[int]:
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    yield child.pid
    child.kill()
    child.wait()


def _looks(mine: Pulse, pid: int, count: int, first: float = 100.0) -> list[bool]:
    return [mine.is_lost(pid, first + number * LOOK_S) for number in range(count)]


def _await_state(pid: int, state: str) -> None:
    while process.state(pid) != state:
        pass


def test_one_that_beats_lives(pair: tuple[Pulse, Pulse]) -> None:
    mine, other = pair
    for number in range(1000):
        other.beat()
        assert not mine.is_lost(os.getpid(), number * LOOK_S)


def test_one_that_hangs_is_given_time(pair: tuple[Pulse, Pulse]) -> None:
    mine, _ = pair
    answers = _looks(mine, os.getpid(), int(2 * HUNG_S / LOOK_S))
    assert answers.index(True) == pytest.approx(HUNG_S / LOOK_S, abs=3)


def test_a_look_too_early_is_none(pair: tuple[Pulse, Pulse]) -> None:
    mine, _ = pair
    assert not any(mine.is_lost(os.getpid(), 100 + number * LOOK_S / 100) for number in range(10_000 // 100))


def test_one_who_was_stopped_itself_judges_nobody(pair: tuple[Pulse, Pulse], sleeper: int) -> None:
    mine, _ = pair
    os.kill(sleeper, signal.SIGSTOP)
    _await_state(sleeper, "T")
    assert not any(mine.is_lost(sleeper, 100 + number * 10 * LOOK_S) for number in range(100))


def test_one_that_is_stopped_is_lost_at_the_second_look(pair: tuple[Pulse, Pulse], sleeper: int) -> None:
    mine, _ = pair
    _looks(mine, sleeper, 2, 90.0)
    os.kill(sleeper, signal.SIGSTOP)
    _await_state(sleeper, "T")
    assert _looks(mine, sleeper, 3, 91.0) == [False, True, True]


def test_one_that_a_debugger_has_stopped_is_left_alone(pair: tuple[Pulse, Pulse], sleeper: int) -> None:
    mine, _ = pair
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.ptrace(PTRACE_SEIZE, sleeper, None, None) == 0, os.strerror(ctypes.get_errno())
    assert libc.ptrace(PTRACE_INTERRUPT, sleeper, None, None) == 0
    _await_state(sleeper, "t")
    assert not any(_looks(mine, sleeper, int(2 * HUNG_S / LOOK_S)))
    assert libc.ptrace(PTRACE_DETACH, sleeper, None, None) == 0, os.strerror(ctypes.get_errno())


def test_one_that_is_gone_is_the_pidfds_business(pair: tuple[Pulse, Pulse]) -> None:
    mine, _ = pair
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    with pytest.raises(KernelError):
        process.state(child.pid)
    assert not any(_looks(mine, child.pid, int(2 * HUNG_S / LOOK_S)))
