"""How the pager's processes come to be, and how one of them inherits from a dead one.

Facts
-----
* A process with threads must not `fork` and go on in Python: locks that other threads hold stay locked for ever in
  the child.  `posix_spawn(3)` runs nothing of ours between fork and exec.
* A descriptor named in a `dup2` of a descriptor onto itself is inherited by the spawned program (glibc 2.29, and
  POSIX.1-2024), without ever being inheritable in this process, where another thread may start something else.
* A child is reaped by its parent.  A bare `os.wait()` of the application must not see the pager.

What follows
------------
A process of the pager gets everything at its exec: a *will*, a small memfd with the numbers of the descriptors that it
inherits.  Whoever starts it may die at once; nothing is left to be told.  The application starts a launcher, which
spawns supervisor and worker side by side and exits; they are adopted by init.  A successor is spawned directly.

The interpreter is started with `-I -S`: nothing of the user's environment or folder can shadow the standard library,
and it is ready in two thirds of the time.  What a store of the user's own needs travels with the store.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import signal
import sys

from userfault.errors import KernelError, UnsupportedError
from userfault.kernel import abi, memfd
from userfault.kernel.syscalls import naming

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any, TypeAlias

    Will: TypeAlias = dict[str, Any]  # marshal knows no types: numbers, text and lists of them

SUPERVISOR, WORKER, TRIAL = "supervisor", "worker", "trial"
_SINGLE = "application", "uffd", "control", "lifeline", "ward", "pulse", "region", "buffer", "worker"
"""What a will may name that is one descriptor."""

_BOOT = """\
import sys
sys.path.append(sys.argv[1])
from userfault.pager.boot import main
main(sys.argv[2], int(sys.argv[3]))
"""
_LAUNCH = """\
import os, sys
python = sys.orig_argv[: sys.orig_argv.index("-c") + 1]
for will in sys.argv[3:]:
    role, _, fd = will.partition(":")
    os.posix_spawn(python[0], [*python, sys.argv[1], sys.argv[2], role, fd], os.environ)
"""
_HOME = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@contextlib.contextmanager
def standard_descriptors() -> Iterator[None]:
    """See that 0, 1 and 2 are taken while descriptors are made that the pager will inherit under the same numbers.

    A daemon may have closed its own; the pager's standard streams would then be its userfaultfd and its sockets.
    """
    opened = []
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
        opened.append(fd)
    os.close(fd)
    try:
        yield
    finally:
        for fd in opened:
            os.close(fd)


def write_will(will: Will) -> int:
    """Return a descriptor from which the successor reads `will`. What it says is sealed: nobody changes it any more.

    Raises:
        KernelError: if there is no memory, or no descriptor, for it.
    """
    fd = memfd.create("userfault-will", seal=False)
    try:
        with naming("write", "the will of the pager"), open(fd, "wb", closefd=False) as file:
            file.write(marshal.dumps(will))
        memfd.seal(fd, memfd.DEFAULT_SEALS | abi.F_SEAL_WRITE)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_will(fd: int) -> Will:
    """Read a will and close its descriptor."""
    with open(fd, "rb") as file:
        file.seek(0)
        will: Will = marshal.loads(file.read())  # noqa: S302  # written by the process that started this one
    return will


def descriptors(will: Will) -> set[int]:
    """Every descriptor a will speaks of."""
    single = (will[key] for key in _SINGLE if will.get(key, -1) >= 0)
    exported = (fd for _, fds in will.get("exports", ()) for fd in fds)
    return {*single, *(fd for _, fd in will.get("regions", ())), *exported}


def start_successor(role: str, will: Will) -> int:
    """Spawn the process that takes `role` over, or a trial; return its process id. Called in the pager only."""
    fd = write_will(will)
    try:
        return _spawn([*_interpreter(), "-c", _BOOT, _HOME, role, str(fd)], {fd, *descriptors(will)})
    finally:
        os.close(fd)


def start_pair(supervisor: Will, worker: Will) -> None:
    """Spawn supervisor and worker, neither of them a child of this process. Called in the application.

    Raises:
        KernelError: if a process cannot be started.
        UnsupportedError: if this program does not know where its Python interpreter is.
    """
    wills: dict[str, int] = {}
    try:
        wills[SUPERVISOR] = write_will(supervisor)
        wills[WORKER] = write_will(worker)
        inherited = {*wills.values(), *descriptors(supervisor), *descriptors(worker)}
        arguments = [f"{role}:{fd}" for role, fd in wills.items()]
        pid = _spawn([*_interpreter(), "-c", _LAUNCH, _BOOT, _HOME, *arguments], inherited)
    finally:
        for fd in wills.values():
            os.close(fd)
    with contextlib.suppress(ChildProcessError):  # somebody's bare os.wait() may have been quicker
        os.waitpid(pid, 0)


def _interpreter() -> list[str]:
    """Return how Python is started: isolated, and in development mode if this process is, for the stores' sake."""
    if not sys.executable:
        raise UnsupportedError(
            "starting the pager", "set sys.executable to a Python interpreter", "this program embeds Python"
        )
    return [sys.executable, "-I", "-S", *(("-X", "dev") if sys.flags.dev_mode else ())]


def _spawn(command: list[str], inherited: Iterable[int]) -> int:
    actions = [(os.POSIX_SPAWN_DUP2, fd, fd) for fd in inherited]
    try:
        return os.posix_spawn(
            command[0],
            command,
            os.environ,
            file_actions=actions,
            setsid=True,
            setsigmask=(),
            setsigdef=(signal.SIGCHLD, signal.SIGPIPE, signal.SIGABRT),
        )
    except OSError as error:
        raise KernelError(error.errno or 0, "posix_spawn", f"starting {command[0]}") from error
