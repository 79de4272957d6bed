"""What SECURITY.md says of processes, proved: sockets, descriptors, memory files, other users, peers, stalls."""

from __future__ import annotations

import contextlib
import fcntl
import marshal
import mmap
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.regions import await_true

import userfault
from userfault import FileStore, MemoryStore, Pager, Region
from userfault.kernel import abi, memfd, process
from userfault.pager import spawn
from userfault.protocol import MADV_NOUSERFAULT, MADV_USERFAULT, UFFD_CLOEXEC
from userfault.testing import PatternStore, StallingStore, run_child

SIZE = 500_000
PAGE = mmap.PAGESIZE


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    """A pager with all that it may hold: regions over a file, over a foreign store, over memory; and an export."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(SIZE))
    with contextlib.ExitStack() as stack:
        pager = stack.enter_context(Pager())
        regions = [
            stack.enter_context(Region(store, mode, pager=pager))
            for store in (FileStore(path), Foreign(SIZE), MemoryStore(bytes(SIZE)))
            for mode in ("r", "c")
        ]
        for region in regions:
            region.ensure()
        file = memfd.create("exported", 4 * PAGE)
        stack.callback(os.close, file)
        area = stack.enter_context(mmap.mmap(file, 4 * PAGE))
        descriptor = userfault.userfaultfd(UFFD_CLOEXEC)
        userfault.madvise(area, MADV_USERFAULT)
        stack.callback(userfault.madvise, area, MADV_NOUSERFAULT)
        descriptor.register(area)
        scene = Scene(pager, regions, stack.enter_context(descriptor.export(pager=pager)))
        yield scene
    vars(scene).clear()  # an export's record is mapped as long as the object lives


class Scene:
    def __init__(self, pager: Pager, regions: list[Region], exported: userfault.exported.Exported) -> None:
        self.pager, self.regions, self.exported = pager, regions, exported

    def pids(self) -> list[int]:
        """Application, supervisor, worker."""
        return [os.getpid(), self.pager.pid, self.pager.worker_pid]

    def replace(self, pid: int) -> None:
        """Kill a process of the pager, and wait for its successor."""
        before = self.pids()
        os.kill(pid, 9)
        deadline = time.monotonic() + 20
        while pid in self.pids() or -1 in self.pids():
            assert time.monotonic() < deadline, f"{before} have no successor"
            time.sleep(0.005)


class Foreign(PatternStore):
    """A class that is not the package's."""


def links(pid: int) -> dict[int, str]:
    """The descriptors of a process, and what each is."""
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that lists, or one that was closed meanwhile
            found[int(name)] = os.readlink(f"/proc/{pid}/fd/{name}")
    return found


def flags(pid: int, fd: int) -> int:
    lines = Path(f"/proc/{pid}/fdinfo/{fd}").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1], 8) for line in lines if line.startswith("flags:"))


# -- sockets and descriptors ----------------------------------------------------------------------------------------


def test_no_socket_of_the_pager_has_a_name(scene: Scene) -> None:
    """All are unnamed halves of pairs of the Unix kind: nobody else can connect to them."""
    ours = {scene.pager.link._control.fileno(), scene.pager.link.lifeline._ours.fileno(), scene.exported.fileno()}
    found = 0
    for pid in scene.pids():
        table = [line.split() for line in Path(f"/proc/{pid}/net/unix").read_text(encoding="ascii").splitlines()[1:]]
        names = {line[6]: line[7:] for line in table}
        for fd, link in links(pid).items():
            if (inode := re.fullmatch(r"socket:\[(\d+)\]", link)) and (pid != os.getpid() or fd in ours):
                assert names[inode[1]] == [], f"descriptor {fd} of process {pid} has a name"
                found += 1
    assert found >= 3 + 3 + 3  # control, lifeline, and an export's; the ward


@pytest.mark.parametrize("died", ["nobody", "worker", "supervisor"])
def test_every_descriptor_is_close_on_exec(scene: Scene, died: str) -> None:
    """Also of the successors, which have got theirs by inheritance."""
    if died != "nobody":
        scene.replace(scene.pager.worker_pid if died == "worker" else scene.pager.pid)
        for region in scene.regions:
            region.evict()
            region.ensure()
    for pid in scene.pids()[1:]:
        for fd, link in links(pid).items():
            with contextlib.suppress(FileNotFoundError):
                assert fd <= 2 or flags(pid, fd) & os.O_CLOEXEC, f"{fd}: {link} of process {pid}"
    ours = [fd for fd, link in links(os.getpid()).items() if re.search("userfault|socket:|pidfd|exported", link)]
    assert len(ours) > 4
    assert all(flags(os.getpid(), fd) & os.O_CLOEXEC for fd in ours)


def test_programs_started_meanwhile_inherit_nothing() -> None:
    """A thread starts other programs all the time, which list their descriptors, while pagers come, restart and go."""
    found = run_child(
        """
import os, re, shutil, subprocess, threading
from userfault import Pager, Region
from userfault.testing import PatternStore
ls, over, listings = shutil.which("ls"), threading.Event(), []

def list_all():
    while not over.is_set():
        listing = subprocess.run([ls, "-l", "/proc/self/fd"], close_fds=False, capture_output=True, text=True)
        listings.append(re.findall(r" (\\d+) -> (.*)", listing.stdout))

thread = threading.Thread(target=list_all)
thread.start()
for _ in range(4):
    with Pager() as pager, Region(PatternStore(100_000), pager=pager) as region:
        region.ensure(0, 1)
        os.kill(pager.worker_pid, 9)
        region.ensure()
over.set()
thread.join()
inherited = {name for listing in listings for number, name in listing if int(number) > 2}
assert len(listings) > 20, len(listings)
assert all(re.fullmatch(r"/proc/\\d+/fd", name) for name in inherited), inherited
print(len(listings))
"""
    ).check()
    assert int(found.stdout)


# -- memory files ---------------------------------------------------------------------------------------------------


def test_memory_files_keep_their_size(scene: Scene) -> None:
    """Whoever holds one can change what it says, not how long it is: that would be a SIGBUS for all who map it."""
    names = set()
    for pid in scene.pids():
        for fd, link in links(pid).items():
            if not link.startswith("/memfd:"):
                continue
            names.add(link.split()[0])
            file = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
            try:
                assert_sealed(file, memfd.DEFAULT_SEALS)
            finally:
                os.close(file)
    assert names >= {"/memfd:userfault-region", "/memfd:userfault-export", "/memfd:exported"}


def assert_sealed(fd: int, seals: int) -> None:
    # The administrator may add one more (vm.memfd_noexec).
    assert fcntl.fcntl(fd, abi.F_GET_SEALS) & ~abi.F_SEAL_EXEC == seals
    size = os.fstat(fd).st_size
    for other in (0, size - 1, size + 1, size + (1 << 30)):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, other)
    with pytest.raises(PermissionError):
        fcntl.fcntl(fd, abi.F_ADD_SEALS, abi.F_SEAL_FUTURE_WRITE)


def test_a_will_cannot_be_changed() -> None:
    fd = spawn.write_will({"regions": [(1, 5)]})
    try:
        assert_sealed(fd, memfd.DEFAULT_SEALS | abi.F_SEAL_WRITE)
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x", 0)
        assert marshal.loads(os.pread(fd, 1000, 0)) == {"regions": [(1, 5)]}
    finally:
        os.close(fd)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user: run the tests as root")
def test_another_user_finds_no_way_in(scene: Scene) -> None:
    """Not to the descriptors, the memory files among them, nor to the memory; and its signals are refused."""
    cat, ls, kill = (shutil.which(name) or name for name in ("cat", "ls", "kill"))
    for pid in scene.pids():
        files = [f"/proc/{pid}/{name}" for name in ("mem", "environ", "maps", "fdinfo/0", "fd/0")]
        files += [f"/proc/{pid}/fd/{fd}" for fd, link in links(pid).items() if "memfd" in link]
        for command in (*([cat, file] for file in files), [ls, f"/proc/{pid}/fd"], [kill, "-0", str(pid)]):
            result = subprocess.run(
                command, user=65534, group=65534, extra_groups=[], capture_output=True, text=True, check=False, cwd="/"
            )
            assert result.returncode, command
            assert not result.stdout, command
            assert re.search("denied|not permitted", result.stderr), (command, result.stderr)


# -- a program behind an exported descriptor ------------------------------------------------------------------------


def test_a_program_that_floods_its_descriptor_harms_nobody_else(scene: Scene) -> None:
    """Garbage is refused and counted, descriptors that come along are dropped, and regions are served all the while."""
    worker, region, store = scene.pager.worker_pid, scene.regions[2], Foreign(SIZE)
    before = len(links(worker))
    program = socket.socket(fileno=os.dup(scene.exported.fileno()))
    with program, open(os.devnull, "rb") as null:
        for number in range(200):
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, null.fileno().to_bytes(4, sys.byteorder) * 50)]
            garbage = os.urandom(number % 30), b"\0parked\0" + bytes(8), b"\xff" * 16, bytes(number)
            program.sendmsg([garbage[number % 4]], rights)
            if number % 50 == 0:
                region.evict()
                with region.memory as memory:
                    assert memory[number * 1000] == store.expected(number * 1000, 1)[0]
        deadline = time.monotonic() + 20
        while len(links(worker)) > before + 3:  # a moment's: a socket being read, /proc
            assert time.monotonic() < deadline, links(worker)
            time.sleep(0.005)
    assert scene.pager.worker_pid == worker
    assert "refused:\t" in scene.exported.fdinfo()


# -- system calls that stall ----------------------------------------------------------------------------------------


def stall(path: str) -> None:
    """Write to a pipe from memory that is not there; let somebody else write there too; then bring the memory."""
    region = Region(StallingStore(PatternStore(SIZE), path))
    assert not region.pager.user_mode_only
    reader, writer = os.pipe()
    ours = threading.Thread(target=os.write, args=(writer, region.memory[:100]))
    ours.start()
    await_true(lambda: process.waits_in_user_fault(os.getpid(), ours.native_id or 0))
    others = os.posix_spawn(
        "/bin/sh", ["sh", "-c", "echo other"], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, writer, 1)]
    )
    await_true(lambda: writes_to(others, 1) and process.state(others) == "D")  # for a lock: it cannot even be killed
    os.kill(others, 9)
    assert process.state(others) == "D"
    with open(path, "wb"):
        pass
    ours.join()
    assert os.read(reader, 100) == PatternStore(SIZE).expected(0, 100)
    assert os.waitpid(others, 0)[1] == 9


def writes_to(pid: int, fd: int) -> bool:
    """Whether a process sleeps in a system call on a descriptor, and not in `exec`, which waits for disks."""
    return Path(f"/proc/{pid}/syscall").read_text().split()[1:2] == [hex(fd)]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a privileged userfaultfd: see `userfault doctor`")
def test_a_stalled_system_call_keeps_its_locks(tmp_path: Path) -> None:
    """So that whoever grants the privilege knows. The lesser right, in test_region_unprivileged, is EFAULT."""
    run_child(stall, str(tmp_path / "healed")).check()
