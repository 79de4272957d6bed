"""no_leaks sees each kind of leak, and nothing else."""

from __future__ import annotations

import os
import subprocess
import threading

import pytest

from userfault.kernel import memfd, memory
from userfault.kernel.userfaultfd import Userfaultfd
from userfault.testing import no_leaks


def test_nothing_is_left_where_nothing_was_opened() -> None:
    with no_leaks():
        pass


def test_what_is_closed_again_is_no_leak() -> None:
    with no_leaks():
        fd = memfd.create("test", 8192)
        address = memory.map_memory(8192, fd=fd)
        memory.unmap(address, 8192)
        os.close(fd)
        with Userfaultfd.open(user_mode_only=True):
            pass
        subprocess.run(["true"], check=True)


def test_an_open_descriptor_is_a_leak() -> None:
    fd = -1
    with pytest.raises(AssertionError, match=r"left behind:\n  descriptor \d+: .*memfd:forgotten"), no_leaks(0):
        fd = memfd.create("forgotten", 4096)
    os.close(fd)


def test_a_descriptor_that_took_anothers_number_is_a_leak() -> None:
    first = os.open("/dev/null", os.O_RDONLY)
    second = os.open("/dev/zero", os.O_RDONLY)
    with pytest.raises(AssertionError, match=f"descriptor {first}: /dev/zero"), no_leaks(0):
        os.dup2(second, first)
    os.close(first)
    os.close(second)


def test_a_mapping_is_a_leak() -> None:
    address, fd = 0, memfd.create("forgotten", 8192)
    with pytest.raises(AssertionError, match=r"mapping .*: 8192 bytes of /memfd:forgotten"), no_leaks(0):
        address = memory.map_memory(8192, fd=fd)
    memory.unmap(address, 8192)
    os.close(fd)


def test_a_mapping_cut_into_pieces_is_no_leak() -> None:
    fd = memfd.create("test", 4 * memory.PAGE_SIZE)
    address = memory.map_memory(4 * memory.PAGE_SIZE, fd=fd)
    with no_leaks(0):
        memory.protect(address + memory.PAGE_SIZE, memory.PAGE_SIZE, memory.PROT_NONE)
    memory.unmap(address, 4 * memory.PAGE_SIZE)
    os.close(fd)


def test_a_running_child_is_a_leak() -> None:
    process = None
    with pytest.raises(AssertionError, match=r"child process \d+: sleep"), no_leaks(0):
        process = subprocess.Popen(["sleep", "60"])
    assert process
    process.kill()
    process.wait()


def die_unwaited() -> subprocess.Popen[bytes]:
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    return process


def test_a_dead_child_that_nobody_waited_for_is_a_leak() -> None:
    process = None
    with pytest.raises(AssertionError, match=r"child process \d+: true \(dead, not waited for\)"), no_leaks(0):
        process = die_unwaited()
    assert process
    process.wait()


def test_a_thread_is_a_leak() -> None:
    go_on = threading.Event()
    thread = threading.Thread(target=go_on.wait)
    with pytest.raises(AssertionError, match=r"thread \d+: "), no_leaks(0):
        thread.start()
    go_on.set()
    thread.join()


def test_what_ends_on_its_own_is_given_time() -> None:
    with no_leaks():
        threading.Timer(0.05, lambda: None).start()


def leave_open(opened: list[int]) -> None:
    opened.append(os.open("/dev/null", os.O_RDONLY))
    raise KeyError("first")


def test_an_exception_inside_matters_more() -> None:
    opened: list[int] = []
    with pytest.raises(KeyError, match="first"), no_leaks(0):
        leave_open(opened)
    os.close(opened[0])
