"""The stage: a victim plays scenes on it, and one system call of it, of its pager or of its children fails.

Everything of a victim waits for leave before each system call (`seccomp`), so all of them are seen and counted, and all
of its processes are known.  When the last of them is gone, the filter says so.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from tests.crash.injection import seccomp
from tests.crash.injection.numbers import NAMES, NUMBERS, PYTHONS
from tests.crash.injection.trial import BEGIN, END, MARK, OWN
from tests.crash.injection.witness import OTHER, PROGRAM, Witness, label

if TYPE_CHECKING:
    from tests.crash.injection.seccomp import Call

ROOT = Path(__file__).parents[3]
LIMIT_S = 20.0
"""How long a scene may take, on a busy machine; then its watchdog ends it."""
QUICK_S = 1.0
"""What the promises call a second."""
SLOWLY_S = 10.0
"""A machine that is busy with other things may need more than the promises say for things that have no promise."""
LET_THROUGH = sorted(NUMBERS[name][seccomp.MACHINE == "aarch64"] for name in PYTHONS)


class Failure(NamedTuple):
    """The `nth` call of this label in this role fails with an errno."""

    role: str
    label: str
    errno: int
    nth: int = 1

    def __str__(self) -> str:
        return f"{self.role} {self.label} {errno.errorcode[self.errno]} no. {self.nth}"


@dataclass
class Played:
    """What came of a scene.

    Attributes:
        errors: What steps raised that may be raised.
        wrong: What must not be.
        status: How the victim ended, if it did, as `os.waitpid` has it.
        hits: How many calls failed.
        counts: How many calls of which label were made in which role.
        complaints: What was written to standard error.
        took: Seconds.
    """

    errors: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    status: int | None = None
    hits: int = 0
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    complaints: str = ""
    took: float = 0.0

    @property
    def signal(self) -> int:
        """The signal that ended the victim; 0 if none did."""
        return os.WTERMSIG(self.status) if self.status is not None and os.WIFSIGNALED(self.status) else 0


class Victim:
    """A process with a filter, and whatever it starts."""

    def __init__(self, listener: int) -> None:
        self.listener = seccomp.Listener(listener)
        self.witness = Witness()
        self.own: Counter[int] = Counter()
        """By thread: whether its calls are the scene's own."""
        self.counting = False
        self.failure: Failure | None = None
        self.played = Played()
        self.null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)

    def hear(self) -> None:
        """Decide about one call."""
        call = self.listener.hear()
        if call is None:
            return
        if NAMES.get(call.number) == "prctl" and call.arguments[0] == MARK:
            self._take_mark(call)
        elif self._fails(call):
            return
        self.listener.go_on(call)

    def _take_mark(self, call: Call) -> None:
        what = call.arguments[1]
        if what in (BEGIN, END):
            self.counting = what == BEGIN
        else:
            self.own[call.thread] += 1 if what == OWN else -1

    def _fails(self, call: Call) -> bool:
        """Count a call, and make it fail if it is the one."""
        role = self.witness.role(call)
        if not self.counting or self.own[call.thread] > 0 or role in (PROGRAM, OTHER):
            return False
        name = label(call)
        self.played.counts[role, name] += 1
        failure = self.failure
        if failure is None or (role, name) != failure[:2] or self.played.counts[role, name] != failure.nth:
            return False
        self.played.hits += 1
        if NAMES[call.number] == "close":  # whatever close(2) says, the descriptor is closed
            self.listener.replace(call, self.null)
        self.listener.fail(call, failure.errno)
        return True

    def gone(self, within: float) -> bool:
        """Wait until nothing of it is left; kill what is left then."""
        deadline = time.monotonic() + within
        poll = select.poll()
        poll.register(self.listener, select.POLLIN)
        killed = False
        while True:
            for _, events in poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                if events & select.POLLIN:
                    self.hear()
                elif events & select.POLLHUP:
                    return not killed
            if time.monotonic() > deadline:
                assert not killed, f"they cannot be killed: {self.witness.threads}"
                killed, deadline = True, time.monotonic() + SLOWLY_S
                self.kill()

    def kill(self) -> None:
        """Kill all that is left of it."""
        for thread in self.witness.threads:
            with contextlib.suppress(ProcessLookupError):
                os.kill(thread, signal.SIGKILL)

    def close(self) -> None:
        self.listener.close()
        os.close(self.null)


class Stage:
    """Where victims play. Use it as a context manager, in one thread."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._err = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the stage
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._victim: Victim | None = None
        self.plays = 0
        with theirs:
            command = [sys.executable, "-X", "utf8", "-m", "tests.crash.programs.injection", "60", "serve"]
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno()), repr(self._folder.name)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._err,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "PYTHONDEVMODE": ""},  # twice as slow there
                start_new_session=True,
            )

    def play(self, scene: str, failure: Failure | None = None, *, fresh: bool = True, strict: bool = False) -> Played:
        """Have a scene played, in which a call fails; afterwards all must be well again.

        Args:
            scene: Its name.
            failure: Which call fails; none by default.
            fresh: Whether the pager is closed at the end, and nothing may be left.
            strict: Whether nothing may go wrong.
        """
        victim = self._victim or self._new_victim()
        victim.failure, victim.played, victim.counting = failure, Played(), False
        self.plays += 1
        begin, begun = self._err.seek(0, os.SEEK_END), time.monotonic()
        self._say(scene=scene, strict=strict, fresh=fresh, limit=LIMIT_S)
        words = self._hear(victim)
        played = victim.played
        if "status" in words:
            self._bury(victim, words["status"])
        else:
            played.errors, played.wrong = words["errors"], words["wrong"]
            if played.wrong:
                self.dismiss()  # the next one shall not suffer from it
        played.took = time.monotonic() - begun
        self._err.seek(begin)
        played.complaints = self._err.read().decode("utf-8", "replace")
        return played

    def _new_victim(self) -> Victim:
        self._say(ignored=LET_THROUGH)
        words = self._receive()
        self._victim = Victim(seccomp.fetch(words["pid"], words["listener"]))
        self._say(ok=True)
        return self._victim

    def dismiss(self) -> None:
        """Have the victim end in good order, and its pager with it."""
        if self._victim is not None:
            self._say()
            self._bury(self._victim, self._hear(self._victim)["status"])

    def _bury(self, victim: Victim, status: int) -> None:
        victim.played.status = status
        self._victim = None
        if not victim.gone(QUICK_S):
            victim.played.wrong.append("something was left behind for more than a second after the end")
        victim.close()

    # -- talking -----------------------------------------------------------------------------------------------------

    def _say(self, **words: Any) -> None:
        self._socket.send(json.dumps(words).encode())

    def _receive(self) -> dict[str, Any]:
        words: dict[str, Any] = json.loads(self._socket.recv(1 << 20) or b"{}")
        assert words, "the victims' parent has ended"
        return words

    def _hear(self, victim: Victim) -> dict[str, Any]:
        """Decide about calls until the victim, or its parent, says something."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        poll.register(victim.listener, select.POLLIN)
        deadline = time.monotonic() + LIMIT_S + SLOWLY_S
        while True:
            ready = dict(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
            if ready.get(victim.listener.fd, 0) & select.POLLIN:
                victim.hear()
            elif self._socket.fileno() in ready:
                return self._receive()
            elif ready:  # all of it is gone; its parent will say how
                poll.unregister(victim.listener)
            if time.monotonic() > deadline:
                victim.kill()
                deadline += SLOWLY_S

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._socket.close()
        if self._victim is not None:
            self._victim.gone(SLOWLY_S)
            self._victim.close()
        self._process.kill()
        self._process.wait(SLOWLY_S)
        self._err.close()
        self._folder.cleanup()
