"""What a victim may see of a system call that failed, step by step: the right bytes, or an error that says what it is.

Calls that the scene itself makes, and not the package, are marked (`own`), and none of them fails.  The mark is a
prctl(2) of no meaning: whoever listens to the victim's calls hears it, among the others and in their order.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import threading
import time
import traceback
from typing import TYPE_CHECKING, TypeVar

from tests.crash.programs.common import BLOCK

import userfault

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from userfault.stores import Store

T = TypeVar("T")

MARK = 0x55464155
BEGIN, END, OWN, NOT_OWN = range(4)
TRIES = 6
"""How often somebody tries again who cannot do without."""
PATIENCE_S = 8.0

_libc = ctypes.CDLL(None)


def mark(what: int) -> None:
    """Tell whoever listens."""
    _libc.prctl(MARK, what, 0, 0, 0)


@contextlib.contextmanager
def own() -> Iterator[None]:
    """Make calls that do not count, and do not fail."""
    mark(OWN)
    try:
        yield
    finally:
        mark(NOT_OWN)


class Trial:
    """What came of a scene. If it is `strict`, nothing may fail at all."""

    def __init__(self, folder: str, *, strict: bool) -> None:
        self.folder = folder
        self.strict = strict
        self.errors: list[str] = []
        self.wrong: list[str] = []

    # -- steps -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Do one thing, which may fail in the ways that are promised."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  # whatever it is, it is told
            self.failed(name, error)

    def failed(self, name: str, error: Exception) -> None:
        """Take down what a step raised: as an error, or as wrong."""
        text = f"{name}: {type(error).__name__}: {error}"
        self.errors.append(text)
        names_a_file = isinstance(error, OSError) and error.filename
        if self.strict or not (names_a_file or isinstance(error, userfault.Error | MemoryError)):
            self.wrong.append(f"{text}\n{''.join(traceback.format_exception(error))}")

    def insist(self, name: str, action: Callable[[], T]) -> T | None:
        """Do something again until it works; None if it never does, which is wrong."""
        results: list[T] = []
        self.do(name, lambda: results.append(action()))
        return results[0] if results else None

    def do(self, name: str, action: Callable[[], object]) -> bool:
        """Do something again until it works; return whether it does. If not, that is wrong."""
        for _ in range(TRIES):
            try:
                action()
            except Exception as error:  # noqa: BLE001  # whatever it is, it is told
                self.failed(name, error)
            else:
                return True
        self.wrong.append(f"{name} failed {TRIES} times in a row")
        return False

    def must_fail(self, name: str, action: Callable[[], object], *kinds: type[Exception]) -> None:
        """Do what cannot be done, and must be refused in one of some ways."""
        try:
            action()
        except kinds:
            return
        except Exception as error:  # noqa: BLE001  # whatever it is, it is told
            self.failed(name, error)
        else:
            self.wrong.append(f"{name}: nothing was raised")

    def check(self, what: str, got: bytes, expected: bytes) -> None:
        """Compare bytes."""
        if got != expected:
            pairs = enumerate(zip(got, expected, strict=False))
            at = next((at for at, (one, other) in pairs if one != other), min(len(got), len(expected)))
            self.wrong.append(
                f"{what}: {len(got)} bytes, {len(expected)} expected; the first wrong one is number {at}: "
                f"{got[at : at + 8].hex()} instead of {expected[at : at + 8].hex()}"
            )

    def expect(self, what: str, holds: bool) -> None:
        """Insist that something is so."""
        if not holds:
            self.wrong.append(f"{what}: it is not so")

    def until(self, what: str, condition: Callable[[], bool]) -> None:
        """Wait for something of which nobody tells."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            if time.monotonic() > deadline:
                self.wrong.append(f"{what}: it does not come about")
                return
            with own():
                time.sleep(0.001)

    # -- what scenes are made of -------------------------------------------------------------------------------------

    def region(
        self, name: str, store: Callable[[], Store], mode: str = "r", blocks: float = 0
    ) -> Iterator[userfault.Region]:
        """Give a region, and close it; none if it cannot be had."""
        region = None
        with self.step(f"open {name}"):
            region = userfault.Region(store(), mode, BLOCK, budget=blocks * BLOCK if blocks else None)
        if region is not None:
            yield region
            with self.step(f"close {name}"):
                region.close()

    def fork(self, child: Callable[[Trial], None]) -> int:
        """Run something in a forked child; return its pid, 0 if it cannot be forked, and leave the rest to `join`."""
        with own():
            reader, writer = os.pipe()
        try:
            pid = os.fork()
        except OSError as error:
            self.errors.append(f"fork: {error}")
            with own():
                os.close(reader)
                os.close(writer)
            return 0
        if not pid:
            self._be_child(child, writer)
        with own():
            os.close(writer)
        self._reader = reader
        return pid

    def _be_child(self, child: Callable[[Trial], None], writer: int) -> None:
        with own():
            signal.alarm(int(PATIENCE_S) + 2)
        trial = Trial(self.folder, strict=self.strict)
        try:
            child(trial)
        except BaseException:  # noqa: BLE001  # it must not go on as its parent
            trial.wrong.append(traceback.format_exc())
        finally:
            mark(OWN)
            for word, texts in (("error", trial.errors), ("wrong", trial.wrong)):
                os.write(writer, b"".join(f"{word} {text!r}\n".encode() for text in texts)[:60000])
            os._exit(0)

    def join(self, pid: int) -> None:
        """Wait for a child, and hear what it saw."""
        with own():
            data = b""
            while part := os.read(self._reader, 1 << 16):
                data += part
            os.close(self._reader)
            status = os.waitpid(pid, 0)[1]
        for line in data.decode().splitlines():
            word, _, text = line.partition(" ")
            (self.wrong if word == "wrong" else self.errors).append(f"in the child: {text}")
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGBUS:
            self.errors.append("in the child: SIGBUS")
        elif status not in (0, signal.SIGUSR1):
            self.wrong.append(f"a child ended with status {status}")


class Background:
    """A thread that waits in a fault, perhaps, with the GIL released."""

    def __init__(self, action: Callable[[], bytes]) -> None:
        self.result = b""
        self._action = action
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.result = self._action()

    @property
    def waiting(self) -> bool:
        return self._thread.is_alive()

    def join(self) -> None:
        self._thread.join(PATIENCE_S)


def collect() -> None:
    """Have everything end that nobody holds."""
    gc.collect()
