"""`userfault fdinfo` and real processes: children with userfaultfds, with waiting threads, and a pager."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest

import userfault
from userfault.cli import main
from userfault.kernel import Userfaultfd, process
from userfault.kernel.fdinfo import read_fdinfo
from userfault.protocol import constants
from userfault.testing import PatternStore, touch

Run: TypeAlias = Callable[..., tuple[int, str, str]]
Start: TypeAlias = Callable[..., subprocess.Popen[str]]

_SOURCE = str(Path(userfault.__file__).parents[1])
_TIMEOUT_S = 60
_PRELUDE = f"""
import faulthandler, os, select, sys, threading
faulthandler.dump_traceback_later({_TIMEOUT_S}, exit=True)
from userfault.kernel import *
from userfault.kernel import memory
from userfault.testing import touch

P = memory.PAGE_SIZE

def say(*words):
    print(*words, flush=True)

def registered(uffd, pages=4, mode=RegisterMode.MISSING):
    address = memory.map_memory(pages * P)
    uffd.register(address, pages * P, mode)
    return address
"""
_BLOCKED = """
uffd = Userfaultfd.open(nonblock=True)
address = registered(uffd)
thread = threading.Thread(target=touch, args=(address,))
thread.start()
poll = select.poll()
poll.register(uffd, select.POLLIN)
poll.poll()
say("waits", uffd.fd)
sys.stdin.readline()
uffd.read()
say("read")
sys.stdin.read()
uffd.close()
thread.join()
"""
_HANDED_OVER = """
import socket
with Userfaultfd.open() as uffd, socket.socket(fileno={fd}) as pager:
    registered(uffd)
    socket.send_fds(pager, [b"u"], [uffd.fd])
say("handed over")
sys.stdin.read()
"""


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a child, and wait for its first line."""
    started: list[subprocess.Popen[str]] = []

    def start(code: str, *fds: int) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-S", "-c", _PRELUDE + code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": _SOURCE},
            pass_fds=fds,
        )
        started.append(child)
        assert child.stdout is not None
        assert child.stdout.readline()
        return child

    yield start
    for child in started:
        child.kill()
        child.communicate(timeout=_TIMEOUT_S)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process; return status, output and error."""

    def run(*words: object) -> tuple[int, str, str]:
        status = main(["fdinfo", *map(str, words)])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def _json(run: Run, pid: int) -> dict[str, Any]:
    status, out, err = run("--json", pid)
    found: dict[str, Any] = json.loads(out)
    assert (err, status) == ("", 0 if found["userfaultfds"] else 1)
    return found


def _wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what the kernel offers no wait for."""
    deadline = time.monotonic() + _TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        select.select([], [], [], 0.002)


# -- children --------------------------------------------------------------------------------------------------------


def test_a_process_without_userfaultfds_is_a_no(start: Start, run: Run) -> None:
    child = start("say('ready'); sys.stdin.read()")

    status, out, err = run(child.pid)

    assert (status, err) == (1, "")
    assert out.startswith(f"process {child.pid} (python")
    assert out.endswith("has no descriptor for userfaultfd\n")


def test_the_ranges_belong_to_the_only_userfaultfd(start: Start, run: Run) -> None:
    child = start("""
uffd = Userfaultfd.open(Feature.PAGEFAULT_FLAG_WP, nonblock=True)
copy = os.dup(uffd.fd)
address = registered(uffd, 16, RegisterMode.MISSING | RegisterMode.WP)
say("ready")
sys.stdin.read()
""")

    status, out, _ = run(child.pid)
    found = _json(run, child.pid)

    [range_] = found["ranges"]
    one, copy = found["userfaultfds"]
    assert status == 0
    assert (one["kind"], one["features"], one["open"]) == (
        "other",
        ["PAGEFAULT_FLAG_WP"],
        ["non-blocking", "close-on-exec"],
    )
    assert one["inode"] == copy["inode"]
    assert (range_["size"], range_["modes"]) == (16 * 4096, ["missing", "write-protected"])
    assert f"  {range_['start']:x}-{range_['end']:x}  64 KiB, missing and write-protected pages of anonymous" in out
    assert f"They belong to descriptor {one['fd']}, the only userfaultfd of the process." in out


def test_of_two_userfaultfds_the_kernel_does_not_tell_whose_a_range_is(start: Start, run: Run) -> None:
    child = start("""
one, other = Userfaultfd.open(), Userfaultfd.open()
registered(one)
say("ready")
sys.stdin.read()
""")

    found = _json(run, child.pid)

    first, second = (one["fd"] for one in found["userfaultfds"])
    assert found["ownership"].endswith(f"which userfaultfd: {first}, {second}.")


def test_a_descriptor_without_a_handshake_is_told(start: Start, run: Run) -> None:
    child = start("""
from userfault.kernel.opening import open_by_syscall
open_by_syscall(os.O_CLOEXEC)
say("ready")
sys.stdin.read()
""")

    [found] = _json(run, child.pid)["userfaultfds"]

    assert (found["kind"], found["handshake"], found["features"]) == ("new", False, [])
    assert "0xaa, no handshake yet" in run(child.pid)[1]


def test_a_waiting_thread_is_counted_before_and_after_its_message_is_read(start: Start, run: Run) -> None:
    child = start(_BLOCKED)
    assert child.stdin is not None
    assert child.stdout is not None

    [unread] = _json(run, child.pid)["userfaultfds"]
    child.stdin.write("read\n")
    child.stdin.flush()
    child.stdout.readline()
    [read] = _json(run, child.pid)["userfaultfds"]

    assert (unread["pending"], unread["total"]) == (1, 1)
    assert unread["waiting"] == "1 thread waits; the pager has not read its message"
    assert "a thread of Python cannot while one that waits here holds the GIL" in unread["advice"]
    assert (read["pending"], read["total"]) == (0, 1)
    assert read["waiting"] == "1 thread waits; the pager has read its message"
    assert "hangs while it fetches the page" in read["advice"]


def test_ranges_whose_descriptor_is_elsewhere_are_shown(start: Start, run: Run) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = start(_HANDED_OVER.format(fd=theirs.fileno()), theirs.fileno())
        _, [fd], _, _ = socket.recv_fds(ours, 1, 1)  # this process is the child's pager now, and alone
        with Userfaultfd(fd):
            found = _json(run, child.pid)
            [mine] = [one for one in _json(run, os.getpid())["userfaultfds"] if one["fd"] == fd]

    assert (found["userfaultfds"], len(found["ranges"])) == ([], 1)
    assert found["ownership"] == "No descriptor here serves them: another process holds their userfaultfd."
    assert mine["others"] == []


def test_a_thread_stands_for_its_process(start: Start, run: Run) -> None:
    child = start(_BLOCKED)
    thread = next(int(name) for name in os.listdir(f"/proc/{child.pid}/task") if int(name) != child.pid)

    found = _json(run, thread)

    assert (found["pid"], len(found["userfaultfds"]), found["userfaultfds"][0]["others"]) == (child.pid, 1, [])


def test_the_protocol_of_2014_is_known(run: Run) -> None:
    with Userfaultfd.open(constants.FEATURES) as descriptor, Userfaultfd.open(constants.GUARD_FEATURES) as guard:
        kinds = {one["fd"]: one["kind"] for one in _json(run, os.getpid())["userfaultfds"]}

        assert (kinds[descriptor.fd], kinds[guard.fd]) == ("protocol", "guard")


# -- a pager ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def region(default_pager: userfault.Pager) -> Iterator[userfault.Region]:
    with userfault.Region(PatternStore(1 << 20), mode="c") as region:
        yield region


def test_the_application_of_a_pager(region: userfault.Region, default_pager: userfault.Pager, run: Run) -> None:
    found = _json(run, os.getpid())

    [ours] = [one for one in found["userfaultfds"] if one["kind"] == "pager"]
    [range_] = [one for one in found["ranges"] if one["start"] == region.address]
    assert {one["pid"] for one in ours["others"]} == {default_pager.pid, default_pager.worker_pid}
    assert (range_["size"], range_["modes"]) == (1 << 20, ["missing", "write-protected"])
    assert range_["path"] == "/memfd:userfault-region (deleted)"


def test_the_processes_of_a_pager(region: userfault.Region, default_pager: userfault.Pager, run: Run) -> None:
    for pid, role in ((default_pager.pid, "supervisor"), (default_pager.worker_pid, "worker")):
        found = _json(run, pid)

        [one] = found["userfaultfds"]
        assert (found["role"], one["kind"], found["ranges"], found["ownership"]) == (role, "pager", [], "")
        assert f"the application it serves: process {os.getpid()} (" in found["meaning"]
        assert f"It is the {role} of a userfault pager." in run(pid)[1]


def test_a_stopped_pager_is_why_a_program_hangs(
    region: userfault.Region, default_pager: userfault.Pager, run: Run
) -> None:
    worker = default_pager.worker_pid
    [fd] = process.userfaultfds(worker)
    os.kill(worker, signal.SIGSTOP)
    try:
        _wait_until(lambda: process.status(worker)["State"].startswith("T"))
        thread = threading.Thread(target=touch, args=(region.address,))
        thread.start()
        _wait_until(lambda: read_fdinfo(fd, worker).pending == 1)

        status, out, _ = run(os.getpid())
    finally:
        os.kill(worker, signal.SIGCONT)
    thread.join(_TIMEOUT_S)

    assert (status, thread.is_alive()) == (0, False)
    assert "1 thread waits; the pager has not read its message" in out
    assert f"process {worker} (userfault-worke) is stopped: kill -CONT {worker} lets it go on." in out


# -- as a program ----------------------------------------------------------------------------------------------------


def _program(*words: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    code = "import sys; from userfault.cli import main; sys.exit(main())"
    return subprocess.run(
        [*prefix, sys.executable, "-W", "error", "-c", code, "fdinfo", *words],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
        env=os.environ | {"PYTHONPATH": _SOURCE, "PYTHONUTF8": "1", "PYTHONDONTWRITEBYTECODE": "1"},
    )


def test_piped_output_is_plain_text() -> None:
    with Userfaultfd.open() as uffd:
        number = uffd.fd
        result = _program(str(os.getpid()))

    assert (result.returncode, result.stderr) == (0, "")
    assert f"\nDescriptor {number}\n" in result.stdout
    assert "\x1b" not in result.stdout


def test_without_a_process_the_argument_is_named() -> None:
    result = _program()

    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "userfault fdinfo: the following arguments are required: PID (see userfault fdinfo --help)\n"
    )


def test_a_process_that_never_was_is_named(run: Run) -> None:
    assert run(2**22 + 1) == (
        2,
        "",
        f"userfault fdinfo: there is no process {2**22 + 1}; ps -e lists those that there are\n",
    )


def test_a_process_that_has_ended_is_told(run: Run) -> None:
    with subprocess.Popen(["true"]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)

        assert run(child.pid) == (2, "", f"userfault fdinfo: process {child.pid} has ended\n")


def test_a_process_of_somebody_else_is_refused_with_the_remedy() -> None:
    if os.geteuid():
        pytest.skip("needs root, to give its rights up")
    # CAP_DAC_READ_SEARCH is kept, so that the interpreter can be read wherever it is.
    drop = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    keep = ("--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search")

    result = _program(str(os.getpid()), prefix=drop + keep)

    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert f"process {os.getpid()} is not yours to look at: run as the process's owner, or as root" in result.stderr
