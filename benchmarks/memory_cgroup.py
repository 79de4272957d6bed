"""A memory cgroup with a limit for one measured run, of version 1 or 2, and what is counted in it.

Whoever makes one removes it, whatever happens: what still runs in it then is ended, by its pid. Nothing else is there,
since a cgroup is made for one run.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from userfault.kernel import process

PREFIX = "userfault-bench-"
_PATIENCE_S = 10.0
_SHELL = 'echo $$ >"$0"/cgroup.procs && exec "$@"'


@dataclass(frozen=True)
class Use:
    """Bytes that are counted in a cgroup, by kind."""

    anonymous: int
    shared: int
    """Of memfds and tmpfs: what regions hold."""
    page_cache: int
    kernel: int


class MemoryCgroup:
    """A memory cgroup; `limited` makes one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._second = (folder / "memory.max").exists()

    @property
    def version(self) -> int:
        """The version of its interface."""
        return 2 if self._second else 1

    def command(self, arguments: list[str]) -> list[str]:
        """Return a command line whose program runs in here from its first byte on."""
        return ["sh", "-c", _SHELL, str(self.folder), *arguments]

    def limit(self, size: int) -> None:
        """Allow so many bytes, and no swap beyond it.

        Raises:
            OSError: the kernel did not take it.
        """
        if self._second:
            (self.folder / "memory.max").write_text(str(size), encoding="ascii")
            with contextlib.suppress(OSError):  # where there is no swap
                (self.folder / "memory.swap.max").write_text("0", encoding="ascii")
            return
        (self.folder / "memory.limit_in_bytes").write_text(str(size), encoding="ascii")
        with contextlib.suppress(OSError):  # swap is not counted everywhere
            (self.folder / "memory.memsw.limit_in_bytes").write_text(str(size), encoding="ascii")

    def peak(self) -> int:
        """The most bytes that were ever in use, page cache included; -1 where the kernel does not tell."""
        name = "memory.peak" if self._second else "memory.max_usage_in_bytes"  # memory.peak: Linux 5.19
        return self._number(name) if (self.folder / name).exists() else -1

    def kills(self) -> int:
        """How many processes were ended for want of memory."""
        return self._fields("memory.events" if self._second else "memory.oom_control").get("oom_kill", 0)

    def use(self) -> Use:
        """What is in use now."""
        stat = self._fields("memory.stat")
        if self._second:
            kernel = stat.get("kernel", 0)  # Linux 5.18
            return Use(stat["anon"], stat["shmem"], stat["file"] - stat["shmem"], kernel)
        shared = stat.get("shmem", 0)
        return Use(stat["rss"], shared, stat["cache"] - shared, self._number("memory.kmem.usage_in_bytes"))

    def processes(self) -> list[int]:
        """The pids of what runs here."""
        return [int(line) for line in (self.folder / "cgroup.procs").read_text(encoding="ascii").split()]

    def remove(self) -> None:
        """Wait for what runs here, end what stays, and remove the cgroup.

        Raises:
            OSError: it could not be removed.
        """
        if not _ended(self.processes(), _PATIENCE_S):
            self.end_all()
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                return self.folder.rmdir()
            except OSError:  # a process leaves a little later than its pidfd says, and frees its memory then
                if time.monotonic() > deadline:
                    raise
                os.sched_yield()

    def end_all(self) -> None:
        """End what runs here."""
        pids = self.processes()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _ended(pids, _PATIENCE_S)

    def _number(self, name: str) -> int:
        return int((self.folder / name).read_text(encoding="ascii"))

    def _fields(self, name: str) -> dict[str, int]:
        lines = (line.split() for line in (self.folder / name).read_text(encoding="ascii").splitlines())
        return {field: int(value) for field, value in lines}


@contextmanager
def limited(size: int) -> Iterator[MemoryCgroup]:
    """Make a cgroup with a limit; remove it afterwards, with all that runs in it if the block raises.

    Raises:
        RuntimeError: none can be made; the message says why.
    """
    cgroup = _make()
    try:
        cgroup.limit(size)
        yield cgroup
    except BaseException:
        cgroup.end_all()
        raise
    finally:
        cgroup.remove()


def _make() -> MemoryCgroup:
    """Make one at the top of whichever hierarchy has the memory controller."""
    why = []
    tops = {version: folder for folder, version in process.memory_cgroups()}  # the last of each is the mount
    for folder in tops.values():
        made = Path(folder) / f"{PREFIX}{os.getpid()}-{time.monotonic_ns()}"
        try:
            made.mkdir()
        except OSError as error:
            why.append(f"{folder}: {error.strerror}; run as root")
            continue
        if any((made / name).exists() for name in ("memory.max", "memory.limit_in_bytes")):
            return MemoryCgroup(made)
        made.rmdir()
        why.append(f"{folder}: no memory controller; echo +memory >cgroup.subtree_control there")
    raise RuntimeError("no memory cgroup can be made: " + ("; or ".join(why) or "none is mounted"))


def _ended(pids: list[int], timeout_s: float) -> bool:
    """Wait until these processes have ended; False if one has not in time."""
    deadline = time.monotonic() + timeout_s
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            left = max(deadline - time.monotonic(), 0)
            if not select.select([descriptor], [], [], left)[0]:
                return False
        finally:
            os.close(descriptor)
    return True
