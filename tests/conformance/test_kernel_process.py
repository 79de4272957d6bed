"""What /proc tells of processes, looked at on real ones."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from userfault.errors import KernelError
from userfault.kernel import memory, process

if TYPE_CHECKING:
    from tests.conformance.conftest import Arena, RunChild, StartChild


def test_a_pidfd_tells_when_a_process_has_ended(start_child: StartChild) -> None:
    child = start_child("sys.stdin.read()")
    fd = process.pidfd_open(child.pid)
    try:
        assert process.pidfd_alive(fd)
        process.pidfd_send_signal(fd, 0)

        process.pidfd_send_signal(fd, signal.SIGKILL)
        os.waitid(os.P_PIDFD, fd, os.WEXITED | os.WNOWAIT)

        assert not process.pidfd_alive(fd)
        assert child.wait(timeout=20) == -signal.SIGKILL
        with pytest.raises(KernelError) as caught:
            process.pidfd_send_signal(fd, 0)
    finally:
        os.close(fd)
    assert (caught.value.syscall, caught.value.strerror) == ("pidfd_send_signal", "No such process")


def test_a_process_that_never_was_has_no_pidfd() -> None:
    with pytest.raises(KernelError, match="pidfd_open"):
        process.pidfd_open(2**22 + 1)


def test_the_cpu_of_a_pinned_thread_is_told() -> None:
    allowed = os.sched_getaffinity(0)
    found = {}

    def pinned() -> None:
        for cpu in allowed:
            os.sched_setaffinity(0, {cpu})
            found[cpu] = process.task_cpu(os.getpid(), threading.get_native_id())

    thread = threading.Thread(target=pinned)
    thread.start()
    thread.join()

    assert found == {cpu: cpu for cpu in allowed}


def test_the_cpu_is_told_whatever_the_process_is_called(run_child: RunChild) -> None:
    result = run_child("""
        open("/proc/self/comm", "w").write(") R 1 (a) 7")
        cpu = min(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cpu})
        print(process.task_cpu(os.getpid(), os.getpid()) == cpu)
    """)

    assert result.stdout == "True\n", result.stderr


def test_a_thread_that_is_gone_has_no_cpu() -> None:
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()

    assert process.task_cpu(os.getpid(), 2**22 + 1) is None


def test_status_is_a_table_of_text() -> None:
    fields = process.status()

    assert fields["Pid"] == str(os.getpid())
    assert fields["Seccomp"] in {"0", "1", "2"}
    assert int(fields["VmRSS"].split()[0]) > 0
    assert {"CapEff", "SigBlk", "SigIgn", "SigCgt"} <= fields.keys()
    assert process.status(os.getppid())["Pid"] == str(os.getppid())


def test_capabilities_follow_the_effective_set() -> None:
    effective = int(process.status()["CapEff"], 16)

    assert process.has_capability(process.CAP_SYS_PTRACE) == bool(effective & 1 << process.CAP_SYS_PTRACE)


def test_a_process_that_is_gone_has_no_status() -> None:
    with pytest.raises(KernelError, match=r"open\(/proc/4194305/status\): \[Errno 2\]"):
        process.status(2**22 + 1)


def test_the_proportional_size_grows_with_what_is_touched(arena: Arena) -> None:
    before = process.pss()

    arena.anonymous(1000, fill=False)
    page = arena.anonymous(2000)
    memory.populate(page, 2000 * memory.PAGE_SIZE, write=True)

    assert 1900 * memory.PAGE_SIZE < process.pss() - before < 2600 * memory.PAGE_SIZE


def test_userfaultfds_are_found_among_the_descriptors(arena: Arena) -> None:
    before = process.userfaultfds()

    first, second = arena.uffd(), arena.uffd()
    arena.memfd(1)

    assert sorted({*before, first.fd, second.fd}) == process.userfaultfds(os.getpid())
    with pytest.raises(KernelError):
        process.userfaultfds(2**22 + 1)


def test_available_memory_is_no_more_than_the_machine_has() -> None:
    available = process.memory_available()
    total = os.sysconf("SC_PHYS_PAGES") * memory.PAGE_SIZE

    assert 0 < available <= total
    assert process.huge_pages_free() >= 0


def test_swap_is_in_use_if_proc_lists_any(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = Path("/proc/swaps").read_text().splitlines()

    assert process.swap_in_use() == (len(listed) > 1)
    monkeypatch.setattr(process, "read_text", lambda _: "Filename Type\n/dev/sdb2 partition\n")
    assert process.swap_in_use()


def test_a_cgroup_with_a_limit_bounds_what_is_available(start_child: StartChild) -> None:
    # A group of our own, below the one we are in; where none may be made, the rules are tested on made-up
    # trees only.
    folder, limit_file = _make_group()
    limit = 256 << 20
    try:
        with open(f"{folder}/{limit_file}", "w", encoding="ascii") as file:
            file.write(str(limit))
        child = start_child("sys.stdin.readline(); print(process.cgroup_headroom(), process.memory_available())")
        with open(f"{folder}/cgroup.procs", "w", encoding="ascii") as file:
            file.write(str(child.pid))
        output, _ = child.communicate("go\n", timeout=20)
    finally:
        os.rmdir(folder)

    headroom, available = map(int, output.split())
    # The child's own memory was charged to the group that it came from, so that little is missing.
    assert limit // 2 < headroom <= limit
    assert limit // 2 < available <= limit


def _make_group() -> tuple[str, str]:
    for folder, version in process.memory_cgroups():
        limit_file = "memory.max" if version == 2 else "memory.limit_in_bytes"
        group = f"{folder}/userfault-test-{os.getpid()}"
        try:
            os.mkdir(group)
        except OSError:
            continue
        if os.path.exists(f"{group}/{limit_file}"):
            return group, limit_file
        os.rmdir(group)
    pytest.skip("no right to make a memory cgroup: run the tests as root outside a container")
