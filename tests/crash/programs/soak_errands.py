"""What the soak does beside reading: storms of forks, children with regions, programs, stores that crash."""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import os
import random
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

from tests.crash.programs.common import BLOCK
from tests.crash.programs.soak_patches import pattern_of

import userfault
from userfault.testing import CrashingStore, PatternStore

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator, Sequence

    from tests.crash.programs.soak_patches import Patch
    from tests.crash.programs.soak_tally import Tally

SIZE = 8 * BLOCK - 1000
CHILD_S = 60
"""After which a child that hangs is ended, by the kernel."""
REST_S = 0.4


@contextlib.contextmanager
def peace(folder: str) -> Iterator[None]:
    """Keep the killer from the supervisor for a while, or the errands from the worker: both dead is another story."""
    with open(os.path.join(folder, "peace"), "a", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Errands:
    """One thread's, one after the other with a rest between them."""

    def __init__(self, patches: Sequence[Patch], folder: str, seed: int, tally: Tally) -> None:
        self._patches = patches
        self._folder = folder
        self._rng = random.Random(seed)
        self._tally = tally
        self._number = 0
        self._all = {
            "fork storm": self._storm,
            "child with a region": self._own_region,
            "child that trespasses": self._trespass,
            "child that opens again": self._unpickled,
            "program": self._program,
            "store that crashes": self._crash,
        }

    def step(self, over: threading.Event) -> None:
        """Run one errand, and rest."""
        name = self._rng.choice(list(self._all))
        self._number += 1
        with self._tally.timed(name):
            self._all[name]()
        over.wait(self._rng.uniform(0, REST_S))

    def _storm(self) -> None:
        """Fork children that end at once, as many as possible at a time."""
        pids = [_fork(_nothing) for _ in range(self._rng.randrange(4, 12))]
        for pid in pids:
            self._expect(pid, 0)

    def _own_region(self) -> None:
        """A child opens a region: it has a pager of its own."""
        seed = self._number
        self._expect(_fork(lambda: _open_one(seed)), 0)

    def _trespass(self) -> None:
        """A child touches memory that it has not inherited: a SIGSEGV, and never a wrong byte."""
        patch = self._rng.choice([patch for patch in self._patches if patch.kind.mode == "r"])
        memory = patch.memory
        self._expect(_fork(lambda: _touch(memory)), -signal.SIGSEGV)

    def _unpickled(self) -> None:
        """A child opens what it has inherited, anew, by its recipe."""
        patch = self._rng.choice([patch for patch in self._patches if patch.name in ("file", "readers")])
        self._expect(_fork(lambda: _open_again(patch)), 0)

    def _program(self) -> None:
        """Run another program."""
        command = [sys.executable, "-I", "-S", "-c", "print('well')"]
        if subprocess.run(command, capture_output=True, check=True).stdout != b"well\n":
            self._tally.complain("a program did not say that it is well")

    def _crash(self) -> None:
        """Read from a store that ends its worker once; not while the test kills the supervisor: that would be both."""
        once = os.path.join(self._folder, f"crashed.{self._number}")
        block = self._rng.randrange(8)
        store = CrashingStore(SIZE, self._rng.choice(("exit", "kill")), (block * BLOCK,), once)
        with open(os.path.join(self._folder, "pulse"), "rb") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            with userfault.Region(store, "c", BLOCK) as region:
                got = bytes(region.memory)
        if got != store.expected(0, SIZE):
            self._tally.complain(f"a store that crashed once: {got.count(0)} zeros")
        if not os.path.exists(once):
            self._tally.complain("a store did not crash")

    def _expect(self, pid: int, due: int) -> None:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status != due:
            self._tally.complain(f"a child ended with {status} instead of {due}")


def _fork(action: Callable[[], object]) -> int:
    """Fork a child that does something and ends; with 0 if it came through."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.alarm(CHILD_S)
        os.environ["GENERATION"] = "1"  # its pager's processes are not the test's to kill
        action()
        status = 0
    except BaseException:  # noqa: BLE001  # the child must not go on as the parent
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


def _nothing() -> None:
    pass


def _touch(memory: memoryview) -> None:
    faulthandler.disable()  # it is no news
    memory[0]


def _open_one(seed: int) -> None:
    store = PatternStore(SIZE, seed)
    with userfault.Region(store, "r", BLOCK, 4 * BLOCK) as region:
        for _ in range(2):
            assert bytes(region.memory) == store.expected(0, SIZE)
            region.evict()
    if seed % 2:
        userfault.default_pager().close()


def _open_again(patch: Patch) -> None:
    opener, arguments = patch.region.__reduce__()
    with opener(*arguments) as region:
        assert bytes(region.memory) == pattern_of(patch.kind, patch.name)
