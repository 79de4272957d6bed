"""The command line as a whole: what is said of a mistake, and with which exit status."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest

import userfault
from userfault.cli import main
from userfault.cli.command import CommandError
from userfault.cli.info import InfoCommand
from userfault.cli.program import COMMANDS
from userfault.errors import UnsupportedError

if TYPE_CHECKING:
    from userfault.cli.command import Command
    from userfault.cli.screen import Screen


def _exit_status(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    return int(str(left.value))


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_status(["--version"]) == 0
    assert capsys.readouterr().out == f"userfault {userfault.__version__}\n"


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2

    out, err = capsys.readouterr()
    assert out == ""
    assert all(command.name in err for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: str(command.name))
def test_help_shows_two_command_lines(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_status([command.name, "--help"]) == 0

    text = capsys.readouterr().out
    assert text.count(f"  userfault {command.name}") == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["dcotor"], "invalid choice: 'dcotor'"),
        (["info"], "required: FILE"),
        (["info", "x", "--block-size", "3"], "power of two"),
        (["info", "x", "y"], "unrecognized arguments: y"),
        (["demo", "--size", "huge"], "'huge' is not a size"),
        (["doctor", "--yaml"], "--yaml"),
    ],
)
def test_a_wrong_argument_is_one_line_that_names_the_help(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _exit_status(arguments) == 2

    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert said in err
    assert "--help)" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo", "--size", "1"], "--size is 1 byte"),
        (["demo", "--size", "8EiB"], "use a smaller --size"),
        (["demo", "--folder", "/nowhere/at/all"], "is not a folder"),
    ],
)
def test_an_argument_that_cannot_be_met_is_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2

    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert said in err


def _failing(error: BaseException) -> type:
    class Failing:
        def run(self, arguments: Namespace, screen: Screen) -> NoReturn:
            raise error

    return Failing


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (CommandError("no room"), 2, "userfault info: no room\n"),
        (UnsupportedError("userfaultfd", "Do this."), 2, "Do this.\n"),
        (FileNotFoundError(2, "No such file or directory", "a.npy"), 2, "a.npy: No such file or directory\n"),
        (KeyboardInterrupt(), 130, "userfault: interrupted\n"),
    ],
)
def test_errors_end_in_one_line(
    error: BaseException, status: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(InfoCommand, "run", _failing(error).run)  # type: ignore[attr-defined]

    assert main(["info", "x"]) == status

    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.endswith(said)


def test_another_system_is_refused_in_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")

    assert main(["info", "x"]) == 2
    assert "part of Linux, and this is darwin" in capsys.readouterr().err


def test_help_imports_neither_numpy_nor_rich() -> None:
    code = (
        "import sys; from userfault.cli.program import make_parser; make_parser().format_help();"
        "print(*sorted({'numpy', 'rich'} & set(sys.modules)))"
    )
    source = Path(userfault.__file__).parents[1]

    result = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=60, check=False
    )

    assert (result.stdout, result.stderr) == ("\n", "")
