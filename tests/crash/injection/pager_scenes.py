"""Scenes of the pager's processes: they are killed, stopped, crash; and the application forks."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from tests.crash.injection.region_scenes import BAD, EXPECTED, PATTERN, SIZE, change, read
from tests.crash.injection.stores import OnceCrashingStore
from tests.crash.injection.trial import own
from tests.crash.programs.common import BLOCK

import userfault
from userfault.stores import FileStore
from userfault.testing import CrashingStore

if TYPE_CHECKING:
    from tests.crash.injection.trial import Trial

Who: TypeAlias = Callable[[userfault.Pager], int]


def kill_worker(trial: Trial) -> None:
    """Have the worker die."""
    _kill(trial, lambda pager: pager.worker_pid)


def kill_supervisor(trial: Trial) -> None:
    """Have the supervisor die."""
    _kill(trial, lambda pager: pager.pid)


def _kill(trial: Trial, who: Who) -> None:
    for region in trial.region("file", lambda: FileStore(f"{trial.folder}/data"), "c", blocks=20):
        with trial.step("before"):
            trial.check("before", bytes(region.memory[: 2 * BLOCK]), EXPECTED[: 2 * BLOCK])
        dead = _send(signal.SIGKILL, region.pager, who)
        change(trial, "after", region)
        _await_successor(trial, region.pager, who, dead)


def _send(number: signal.Signals, pager: userfault.Pager, who: Who) -> int:
    with own():
        pid = who(pager)
        os.kill(pid, number)
    return pid


def _await_successor(trial: Trial, pager: userfault.Pager, who: Who, pid: int) -> None:
    with own():
        trial.until("a successor says hello", lambda: pager.closed or who(pager) != pid)


def crash(trial: Trial) -> None:
    """Have a store that ends every worker: the region fails, loudly."""
    for region in trial.region("crashing", lambda: CrashingStore(SIZE, "exit", (BAD,))):
        kinds = userfault.StoreError, userfault.PagerLostError
        trial.must_fail("ensure a crashing block", partial(region.ensure, BAD, 1), *kinds)


def suspect(trial: Trial) -> None:
    """Have a store that ends one worker: the block is read by a trial, and all is well."""
    dead = f"{trial.folder}/dead"
    with own(), contextlib.suppress(FileNotFoundError):
        os.unlink(dead)
    for region in trial.region("suspect", lambda: OnceCrashingStore(SIZE, BAD, dead)):
        with trial.step("ensure a suspect block"):
            region.ensure(BAD, 1)
            trial.check("suspect", bytes(region.memory[BAD : BAD + BLOCK]), EXPECTED[BAD : BAD + BLOCK])


def flap(trial: Trial) -> None:
    """Have workers die before they have filled anything, until the supervisor gives up."""
    for region in trial.region("pattern", lambda: PATTERN):
        pager, killed = region.pager, {-1}
        with own():
            while not pager.closed and len(killed) < 20:
                if pager.worker_pid not in killed:
                    killed.add(pager.worker_pid)
                    os.kill(pager.worker_pid, signal.SIGKILL)
                time.sleep(0.001)
        trial.must_fail("ensure without a pager", region.ensure, userfault.PagerLostError)


def stop_worker(trial: Trial) -> None:
    """Have the worker stopped: it is killed, and replaced."""
    _stop(trial, lambda pager: pager.worker_pid)


def stop_supervisor(trial: Trial) -> None:
    """Have the supervisor stopped."""
    _stop(trial, lambda pager: pager.pid)


def _stop(trial: Trial, who: Who) -> None:
    for region in trial.region("pattern", lambda: PATTERN):
        stopped = _send(signal.SIGSTOP, region.pager, who)
        _await_successor(trial, region.pager, who, stopped)
        read(trial, "after", region)


def fork(trial: Trial) -> None:
    """Fork while a region is open; the child has one of its own."""
    for region in trial.region("file", lambda: FileStore(f"{trial.folder}/data"), blocks=8):
        read(trial, "before", region)

        if pid := trial.fork(partial(_live_in_child, region)):
            trial.join(pid)
        with trial.step("evict"):
            region.evict()
        read(trial, "after", region)


def _live_in_child(inherited: userfault.Region, child: Trial) -> None:
    child.expect("the region is the parent's", inherited.closed)
    for region in child.region("child's", lambda: PATTERN):
        read(child, "child's", region)
    with child.step("close the child's pager"):
        userfault.default_pager().close()
