"""Victims: applications in processes of their own, which hang, crash and are killed, and what they leave behind.

A victim is a program of `tests/crash/programs`, run with `-m`.  It prints lines, and waits for lines; the test does the
killing.  Whatever a victim starts inherits a mark in its environment, its pager too; so a test can find all of it, and
after each test nothing that bears the mark may be alive.  A watchdog in the victim prints every stack and ends it, also
if its main thread sleeps in a fault for ever with the GIL in its hand.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import pytest

from userfault.blocks import ledger
from userfault.testing.child import ChildError, ChildResult, ChildTimeoutError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[2]
PAGE = os.sysconf("SC_PAGE_SIZE")
MARK = "USERFAULT_TEST_MARK"
SEED = "USERFAULT_CRASH_SEED"
LIMIT_S = 40.0
"""How long a victim may take, on a busy machine; its watchdog then ends it."""
PROGRESS_S = 30.0
QUICK_S = 1.0
"""What the promises call a second."""


class Start(Protocol):
    """Start a victim: a function of a program, with arguments that `ast.literal_eval` reads."""

    def __call__(self, program: str, *args: Any, limit: float = ..., prefix: tuple[str, ...] = ...) -> Victim: ...


class Report(Protocol):
    """Keep lines that are printed when all tests are over."""

    def __call__(self, title: str, *lines: str) -> None: ...


class Victim:
    """A running application. Use it as a context manager: whatever happens, it ends."""

    def __init__(self, program: str, args: tuple[Any, ...], limit: float, prefix: tuple[str, ...]) -> None:
        module, _, function = program.partition(".")
        self.mark = uuid.uuid4().hex
        self._limit = limit
        self._out = self._unread = b""
        self._err = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the victim
        self.process = subprocess.Popen(
            [
                *(*prefix, sys.executable, "-X", "utf8", "-m", f"tests.crash.programs.{module}"),
                *(str(limit), function, *map(repr, args)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._err,
            cwd=ROOT,
            env={**os.environ, MARK: self.mark, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for pid in self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(LIMIT_S)
        for stream in (self.process.stdin, self.process.stdout, self._err):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    # -- talking ---------------------------------------------------------------------------------------------

    def line(self) -> list[Any]:
        """Return the words of the next line that it prints; integers as such."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + self._limit + 5
        while b"\n" not in self._unread:
            if not select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise ChildTimeoutError("the victim says nothing", self._result(0))
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            if not data:
                self._ended()
                raise ChildError("the victim ended instead of saying more", self._result(self.process.wait(LIMIT_S)))
            self._out += data
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return [int(word) if word.lstrip("-").isdigit() else word for word in line.decode().split()]

    def has_spoken(self) -> bool:
        """Whether it has said something, or has ended."""
        assert self.process.stdout is not None
        return bool(self._unread or select.select([self.process.stdout], [], [], 0)[0])

    def expect(self, word: str) -> list[Any]:
        """Return the rest of the next line, which begins with `word`."""
        first, *rest = self.line()
        assert first == word, f"{word!r} was expected, and the victim said {first} {rest}"
        return rest

    def say(self, word: str = "go") -> None:
        """Let it go on."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n".encode())
        self.process.stdin.flush()

    # -- watching --------------------------------------------------------------------------------------------

    def await_fault(self, uffd: int) -> None:
        """Wait until a thread of it is asleep in a fault.

        A worker that was stopped may have read the message all the same, as the last thing it did.
        """
        self.wait_until(lambda: int(self._fdinfo(uffd)["total"]) > 0, "nobody is stopped in a fault")

    def _fdinfo(self, fd: int) -> dict[str, str]:
        text = Path(f"/proc/{self.pid}/fdinfo/{fd}").read_text(encoding="ascii")
        return {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}

    @staticmethod
    def wait_until(condition: Callable[[], bool], complaint: str, within: float = LIMIT_S) -> None:
        """Wait for what the kernel offers no wait for."""
        deadline = time.monotonic() + within
        while not condition():
            assert time.monotonic() < deadline, complaint
            time.sleep(0.001)

    def alive(self, name: str = "") -> list[int]:
        """Every living process that bears its mark; only those whose name begins with `name`."""
        return [pid for pid in processes() if _is_marked(pid, self.mark) and comm(pid).startswith(name)]

    def pagers(self) -> list[int]:
        """Return its living pager processes, those included that are just starting."""
        return [pid for pid in self.alive() if pid != self.pid and b"userfault.pager.boot" in _cmdline(pid)]

    def role(self, pid: int) -> str:
        """Return `supervisor`, `worker` or `trial`; nothing for one that was just spawned and looks like its parent."""
        command = _cmdline(pid)
        words = command.split(b"\0")
        return words[-3].decode() if len(words) > 3 and command != _cmdline(_parent(pid)) else ""

    def generation(self, pid: int) -> int:
        """Return what its application has written on it, 0 if nothing."""
        words = [word for word in _read(pid, "environ").split(b"\0") if word.startswith(b"GENERATION=")]
        return int(words[0].partition(b"=")[2]) if words else 0

    def threads(self, pid: int) -> int:
        """How many threads a process has; 0 if it is gone."""
        try:
            return len(os.listdir(f"/proc/{pid}/task"))
        except FileNotFoundError:
            return 0

    def memfds(self, pid: int) -> int:
        """How many regions a process of the pager holds."""
        with contextlib.suppress(OSError):  # a descriptor was closed meanwhile
            return len(_regions(pid))
        return -1

    def states(self, pid: int) -> bytes:
        """Return the block states of all regions, as a process of the pager sees them; they change as it works."""
        with contextlib.suppress(OSError, ValueError):  # it may be gone, or a region just begin
            return b"".join(map(_states, _regions(pid)))
        return b""

    def assert_no_pager(self, within: float = QUICK_S) -> None:
        """Nothing of the pager is left within a second."""
        self.wait_until(lambda: not self.pagers(), "a pager is left behind", within)

    def end(self, within: float | None = None) -> ChildResult:
        """Wait for its end; say how it was."""
        with contextlib.suppress(BrokenPipeError):
            if self.process.stdin is not None:
                self.process.stdin.close()
        try:
            status = self.process.wait(self._limit + 5 if within is None else within)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(LIMIT_S)
            self._ended()
            raise ChildTimeoutError(f"the victim did not end within {within} s", self._result(-9)) from None
        self._ended()
        result = self._result(status)
        if "Timeout (" in result.stderr:
            raise ChildTimeoutError("the victim's watchdog had to end it", result)
        return result

    def _ended(self) -> None:
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        with contextlib.suppress(BlockingIOError):  # what it has left running may hold the other end
            while data := os.read(self.process.stdout.fileno(), 1 << 16):
                self._out += data

    def _result(self, status: int) -> ChildResult:
        self._err.seek(0)
        return ChildResult(status, self._out.decode("utf-8", "replace"), self._err.read().decode("utf-8", "replace"))


def processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def comm(pid: int) -> str:
    return _read(pid, "comm").decode("utf-8", "replace").strip()


def _cmdline(pid: int) -> bytes:
    return _read(pid, "cmdline")


def _parent(pid: int) -> int:
    words = _read(pid, "stat").rpartition(b")")[2].split()
    return int(words[1]) if words else 0


def _is_marked(pid: int, mark: str) -> bool:
    return f"{MARK}={mark}".encode() in _read(pid, "environ").split(b"\0")


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:  # gone, or somebody else's
        return b""


def _regions(pid: int) -> list[Path]:
    return [entry for entry in Path(f"/proc/{pid}/fd").iterdir() if "userfault-region" in os.readlink(entry)]


def _states(path: Path) -> bytes:
    with path.open("rb") as file:
        words = ledger.read_words(file.fileno())
        size, block_size = words[ledger.W_SIZE], words[ledger.W_BLOCK_SIZE]
        return os.pread(file.fileno(), -(-size // block_size), -(-size // PAGE) * PAGE)


@pytest.fixture
def start() -> Iterator[Start]:
    """Start victims; when the test is over, nothing of them may be left, a second after the last has ended."""
    with contextlib.ExitStack() as stack:
        victims: list[Victim] = []

        def start_one(program: str, *args: Any, limit: float = LIMIT_S, prefix: tuple[str, ...] = ()) -> Victim:
            victims.append(stack.enter_context(Victim(program, args, limit, prefix)))
            return victims[-1]

        yield start_one
        for victim in victims:
            if victim.process.poll() is not None:
                victim.wait_until(lambda v=victim: not v.alive(), f"left behind: {victim.alive()}", QUICK_S)  # type: ignore[misc]


_reports = pytest.StashKey[list[str]]()


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Report:
    """Have the figures of a long test printed at the end of the run, whatever becomes of the test."""
    reports = request.config.stash.setdefault(_reports, [])

    def keep(title: str, *lines: str) -> None:
        reports.extend([title, *(f"    {line}" for line in lines)])

    return keep


@pytest.fixture
def progress(capsys: pytest.CaptureFixture[str], soak: bool) -> Callable[[str], None]:
    """Tell whoever waits for a long test how far it is; not more than twice a minute, and only in a soak run."""
    told = time.monotonic()

    def tell(text: str) -> None:
        nonlocal told
        if soak and time.monotonic() > told + PROGRESS_S:
            told = time.monotonic()
            with capsys.disabled():
                print(f"\n{text}", end="", flush=True)

    return tell


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the figures."""
    if reports := config.stash.get(_reports, []):
        terminalreporter.section("figures")
        for line in reports:
            terminalreporter.write_line(line)


@pytest.fixture
def seed() -> int:
    """Where the randomness of this run comes from; printed, so that a failure shows it."""
    value = int(os.environ.get(SEED) or random.SystemRandom().randrange(1 << 32))
    print(f"{SEED}={value}")
    return value


@pytest.fixture
def rng(seed: int) -> random.Random:
    return random.Random(seed)
