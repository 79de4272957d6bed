"""Processes and what /proc tells of them: life and death, CPU, rights, memory.

Functions that take a `pid` also take `"self"` where they read /proc. All may be called from any thread.
"""

from __future__ import annotations

import os
import select
import signal
from errno import ENOENT, ESRCH

from userfault.errors import KernelError
from userfault.kernel.procfs import read_text
from userfault.kernel.syscalls import naming

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = [
    "CAP_SYS_PTRACE",
    "cgroup_headroom",
    "has_capability",
    "huge_pages_free",
    "memory_available",
    "memory_cgroups",
    "pidfd_alive",
    "pidfd_open",
    "pidfd_send_signal",
    "pss",
    "status",
    "swap_in_use",
    "task_cpu",
    "userfaultfds",
    "waits_in_user_fault",
]

CAP_SYS_PTRACE = 19
_LINK = "anon_inode:[userfaultfd]"
_CPU_FIELD = 36  # field 39 of stat(5), counted from the state, which is field 3


def _fields(path: str) -> dict[str, str]:
    lines = (line.partition(":") for line in read_text(path).splitlines())
    return {name: value.strip() for name, _, value in lines}


# -- life and death ------------------------------------------------------------------------------------------


def pidfd_open(pid: int) -> int:
    """Return a descriptor that means this process, and never another that gets its number later. Linux 5.3.

    Raises:
        KernelError: ESRCH: no such process.
    """
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        raise KernelError(error.errno or 0, "pidfd_open", f"pid {pid}") from None


def pidfd_alive(fd: int) -> bool:
    """Tell whether the process still runs; one that is dead but not yet waited for does not.

    Raises:
        KernelError: ENOMEM.
    """
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    with naming("poll"):
        return not poll.poll(0)


def pidfd_send_signal(fd: int, number: int) -> None:
    """Send a signal to the process.

    Raises:
        KernelError: ESRCH: it has been waited for. EPERM.
    """
    try:
        signal.pidfd_send_signal(fd, number)
    except OSError as error:
        raise KernelError(error.errno or 0, "pidfd_send_signal", f"signal {number}") from None


# -- what it does --------------------------------------------------------------------------------------------


def task_cpu(pid: int, tid: int) -> int | None:
    """Return the CPU on which a thread runs, or ran last; `None` when it is gone."""
    try:
        text = read_text(f"/proc/{pid}/task/{tid}/stat")
    except KernelError:
        return None
    # The name stands in parentheses and may hold some itself, and spaces: count from the last one.
    fields = text[text.rfind(")") + 2 :].split()
    return int(fields[_CPU_FIELD]) if len(fields) > _CPU_FIELD else None


def task_state(tid: int) -> tuple[str, int]:
    """Return the state of a thread of this process ("R": it runs or would) and how long it has run, in nanoseconds.

    Raises:
        KernelError: No such thread, or a kernel without CONFIG_SCHED_INFO.
    """
    folder = f"/proc/self/task/{tid}"
    text = read_text(f"{folder}/stat")
    return text[text.rfind(")") + 2], int(read_text(f"{folder}/schedstat").split()[0])


def state(pid: int) -> str:
    """Return the state of a process's main thread: "R" runs, "S" sleeps, "T" stopped, "t" stopped by a debugger...

    Raises:
        KernelError: No such process.
    """
    text = read_text(f"/proc/{pid}/stat")
    return text[text.rfind(")") + 2]


def waits_in_user_fault(pid: int, tid: int) -> bool:
    """Whether a thread sleeps in a fault that a userfaultfd has reported; True also if the kernel does not say."""
    folder = f"/proc/{pid}/task/{tid}"
    try:
        where = read_text(f"{folder}/wchan")
        if where != "0":
            return where == "handle_userfault"
        text = read_text(f"{folder}/stat")  # it runs, or this kernel tells nobody where threads sleep
    except KernelError as error:
        return error.errno not in (ENOENT, ESRCH)
    return text[text.rfind(")") + 2] != "R"


def status(pid: int | str = "self") -> dict[str, str]:
    """Return the fields of /proc/PID/status, as text without the space around it.

    Raises:
        KernelError: No such process.
    """
    return _fields(f"/proc/{pid}/status")


def has_capability(number: int, pid: int | str = "self") -> bool:
    """Tell whether a process has a capability in effect, in its own user namespace."""
    return bool(int(status(pid)["CapEff"], 16) >> number & 1)


def pss(pid: int | str = "self") -> int:
    """Return the memory of a process in bytes, its share of what it shares (Pss of smaps_rollup).

    Raises:
        KernelError: Gone, or not ours to look at.
    """
    for line in read_text(f"/proc/{pid}/smaps_rollup").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def userfaultfds(pid: int | str = "self") -> list[int]:
    """Return the descriptors of a process that are userfaultfds.

    Raises:
        KernelError: Gone, or not ours to look at.
    """
    folder = f"/proc/{pid}/fd"
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise KernelError(error.errno or 0, f"open({folder})") from None
    return sorted(int(name) for name in names if _link(f"{folder}/{name}") == _LINK)


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:  # closed meanwhile, such as the one that listed the folder
        return ""


# -- how much memory there is --------------------------------------------------------------------------------


def memory_available() -> int:
    """Return how many bytes can be used before something is swapped, reclaimed hard or killed.

    The smaller of MemAvailable and of the room in each cgroup above this process, version 1 or 2.

    Raises:
        KernelError: /proc is not there.
    """
    room = cgroup_headroom()
    available = int(_fields("/proc/meminfo")["MemAvailable"].split()[0]) * 1024
    return available if room is None else min(available, room)


def swap_in_use() -> bool:
    """Return whether any of this machine's memory may be on a swap device; where /proc does not tell, it may."""
    try:
        return read_text("/proc/swaps").count("\n") > 1
    except KernelError:
        return True


def huge_pages_free() -> int:
    """Return how many reserved huge pages of the default size nobody uses, nor has been promised.

    Raises:
        KernelError: /proc is not there.
    """
    fields = _fields("/proc/meminfo")
    return int(fields.get("HugePages_Free", "0")) - int(fields.get("HugePages_Rsvd", "0"))


def cgroup_headroom() -> int | None:
    """Return the bytes that the tightest memory cgroup above this process leaves; `None` without a limit."""
    return _headroom(memory_cgroups())


def memory_cgroups() -> Iterator[tuple[str, int]]:
    """Yield folder and version of this process's memory cgroups, and of all above that are mounted.

    Raises:
        KernelError: /proc is not there.
    """
    return _folders(read_text("/proc/self/cgroup"), read_text("/proc/self/mountinfo"))


def _headroom(folders: Iterable[tuple[str, int]]) -> int | None:
    rooms = [room for folder, version in folders for room in _folder_room(folder, version)]
    return max(min(rooms), 0) if rooms else None


def _folder_room(folder: str, version: int) -> Iterator[int]:
    """Yield limit minus use plus what is file cache and easily given back, for each limit of one cgroup."""
    limits = ("memory.max", "memory.high") if version == 2 else ("memory.limit_in_bytes",)
    usage = _number(f"{folder}/memory.current" if version == 2 else f"{folder}/memory.usage_in_bytes")
    cache = _inactive_file(folder, "inactive_file" if version == 2 else "total_inactive_file")
    for name in limits:
        limit = _number(f"{folder}/{name}")
        # Version 1 says "no limit" with the greatest multiple of the page size.
        if limit is not None and usage is not None and limit < 1 << 62:
            yield limit - max(usage - cache, 0)


def _number(path: str) -> int | None:
    try:
        text = read_text(path).strip()
    except KernelError:
        return None
    return int(text) if text.isdigit() else None  # "max" is no limit


def _inactive_file(folder: str, field: str) -> int:
    try:
        lines = read_text(f"{folder}/memory.stat").splitlines()
    except KernelError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(field + " ")), 0)


def _folders(cgroups: str, mounts: str) -> Iterator[tuple[str, int]]:
    """Put together what /proc/self/cgroup and /proc/self/mountinfo say."""
    paths = _cgroup_paths(cgroups)
    for root, point, version in _cgroup_mounts(mounts):
        if version not in paths:
            continue
        # A container may mount its own group as the root, while its path is told from the machine's root.
        path, top = paths[version] + "/", root.rstrip("/") + "/"
        folder = (point + "/" + path[len(top) :] if path.startswith(top) else point).rstrip("/")
        while len(folder) >= len(point):
            yield folder, version
            folder = folder[: folder.rfind("/")]


def _cgroup_paths(text: str) -> dict[int, str]:
    """Return the path in each version's hierarchy: "0::/path" for 2, "4:memory:/path" for 1."""
    paths = {}
    for line in text.splitlines():
        _hierarchy, controllers, path = line.split(":", 2)
        if not controllers:
            paths[2] = path
        elif "memory" in controllers.split(","):
            paths[1] = path
    return paths


def _cgroup_mounts(text: str) -> Iterator[tuple[str, str, int]]:
    """Yield root, mount point and version of each mounted hierarchy that may account memory."""
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        root, point = (name.replace("\\040", " ") for name in left.split()[3:5])
        kind, _source, options = right.split(" ", 2)
        if kind == "cgroup2":
            yield root, point, 2
        elif kind == "cgroup" and "memory" in options.split(","):
            yield root, point, 1
