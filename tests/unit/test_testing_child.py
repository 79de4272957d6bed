"""run_child: how children end, and that none can hang us."""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
from typing import Any

import pytest

from userfault.testing import ChildError, ChildTimeoutError, child, no_leaks, run_child


def add(first: int, second: int) -> int:
    print("adding")
    print("complaining", file=sys.stderr)
    return first + second


class Thing:
    """A class that lives in this file only."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Thing) and self.value == other.value

    __hash__ = None  # type: ignore[assignment]

    @staticmethod
    def double(thing: Thing) -> Thing:
        return Thing(2 * thing.value)


STOP = "import sys; sys.exit(args[0])"
DIE = "import os; os.kill(os.getpid(), args[0])"


def fail() -> None:
    raise RuntimeError("no luck")


def hold_the_gil_for_ever() -> None:
    ctypes.PyDLL(None).pause()


def leave_a_process_behind() -> int:
    return os.spawnvp(os.P_NOWAIT, "sleep", ["sleep", "20"])


def test_a_function_gives_its_value_and_its_output() -> None:
    result = run_child(add, 1, 2)

    assert (result.status, result.value, result.stdout, result.stderr) == (0, 3, "adding\n", "complaining\n")
    assert result.signal is None
    assert result.check() is result


def test_source_finds_its_arguments() -> None:
    result = run_child("import sys\nprint(args, sys.argv, __name__)", 1, "two")

    assert result.stdout == "(1, 'two') ['<child>', '1', 'two'] __main__\n"


def test_arguments_and_values_may_be_of_this_file() -> None:
    assert run_child(Thing.double, Thing(21)).check().value == Thing(42)


def test_a_function_of_a_package_is_found() -> None:
    assert run_child(os.path.join, "a", "b").value == "a/b"


def test_large_arguments_and_values_pass() -> None:
    data = os.urandom(1 << 20)

    assert run_child(pickle.loads, pickle.dumps(data)).value == data


@pytest.mark.parametrize("status", [0, 1, 3, 255])
def test_the_exit_status_comes_back(status: int) -> None:
    assert run_child(STOP, status).status == status


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGTERM])
def test_a_signal_comes_back(number: signal.Signals) -> None:
    result = run_child(DIE, number)

    assert (result.status, result.signal, result.value) == (-number, number, None)
    with pytest.raises(ChildError, match=f"the child failed \\(signal {number.name}\\)"):
        result.check()


def test_a_crash_shows_its_stack() -> None:
    stderr = run_child("def sink():\n    import ctypes\n    ctypes.string_at(8)\nsink()").stderr

    assert 'File "<child>", line 3 in sink' in stderr


def test_an_exception_is_shown_by_check() -> None:
    result = run_child(fail)

    assert result.status == 1
    with pytest.raises(ChildError, match=r"(?s)\(status 1\).*-- its stderr --.*RuntimeError: no luck"):
        result.check()


def test_a_child_that_hangs_with_the_gil_held_is_ended_and_shows_its_stack() -> None:
    with no_leaks(), pytest.raises(ChildTimeoutError, match=r"longer than 1 seconds") as caught:
        run_child(hold_the_gil_for_ever, timeout=1)

    assert "in hold_the_gil_for_ever" in caught.value.result.stderr


def test_a_child_that_is_stopped_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_GRACE_S", -19.5)

    with no_leaks(), pytest.raises(ChildTimeoutError, match="not even its watchdog"):
        run_child(DIE, signal.SIGSTOP, timeout=20)


def test_what_a_child_leaves_running_does_not_keep_us() -> None:
    result = run_child(leave_a_process_behind, timeout=20)

    os.kill(result.check().value, signal.SIGKILL)


def test_children_see_the_environment_given() -> None:
    result = run_child("import os; print(os.environ['GIVEN'], 'PATH' in os.environ)", env={"GIVEN": "yes"})

    assert result.stdout == "yes True\n"


def test_crashes_write_no_core_files() -> None:
    source = "import resource; print(resource.getrlimit(resource.RLIMIT_CORE)[0])"

    assert run_child(source).stdout == "0\n"


@pytest.mark.parametrize("function", [lambda: None, pytest.param(lambda: 1, id="another")])
def test_a_function_without_a_name_is_refused(function: Any) -> None:
    with pytest.raises(ValueError, match="define it at module level"):
        run_child(function)


def test_a_child_leaves_nothing_with_us() -> None:
    with no_leaks():
        run_child("pass").check()
