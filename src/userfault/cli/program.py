"""The program: its words, what is said of a mistake, and the exit status."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from userfault import __version__
from userfault.cli.command import MISTAKE, UNHEARD, CommandError, Parser
from userfault.cli.demo import DemoCommand
from userfault.cli.doctor import DoctorCommand
from userfault.cli.fdinfo import FdinfoCommand
from userfault.cli.info import InfoCommand
from userfault.cli.screen import choose_screen
from userfault.errors import Error

if TYPE_CHECKING:
    from userfault.cli.command import Command

COMMANDS: tuple[Command, ...] = (DoctorCommand(), DemoCommand(), InfoCommand(), FdinfoCommand())

_DESCRIPTION = """\
Memory whose pages come from somewhere else, at the first touch.

  userfault doctor          can this machine do it, and if not, what is to be done
  userfault demo            see it work, on a file of 2 GiB
"""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="userfault", description=_DESCRIPTION, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"userfault {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", parser_class=Parser)
    for command in COMMANDS:
        described = commands.add_parser(
            command.name, help=command.summary, description=command.description, formatter_class=raw
        )
        described.set_defaults(run=command.run)
        command.prepare_parser(described)
    return parser


def run(argv: Sequence[str] | None) -> int:
    """Run the command line, and return its exit status."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return MISTAKE
    try:
        return _run(arguments)
    except (CommandError, Error) as error:
        return _complain(arguments.command, str(error))
    except BrokenPipeError:
        _hush()
        return UNHEARD
    except OSError as error:
        return _complain(arguments.command, _explain(error))


def _run(arguments: argparse.Namespace) -> int:
    if sys.platform != "linux":
        raise CommandError(f"userfaultfd is a part of Linux, and this is {sys.platform}")
    screen = choose_screen()
    status: int = arguments.run(arguments, screen)
    screen.file.flush()  # what nobody reads shows here, not while the interpreter ends
    return status


def _complain(command: str, text: str) -> int:
    with contextlib.suppress(OSError, AttributeError):  # a full disk, or no standard output at all
        sys.stdout.flush()
    sys.stderr.write(f"userfault {command}: {' '.join(text.split())}\n")
    return MISTAKE


def _explain(error: OSError) -> str:
    """Say what a file's error means, as other programs do: the path, then the reason."""
    return f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)


def _hush() -> None:
    """Nobody reads standard output any more: let what is buffered go nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
