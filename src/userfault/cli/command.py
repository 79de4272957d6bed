"""What a command is, and how it says that it cannot go on.

Exit status, the same for every command: 0, the answer is yes; 1, the answer is no (regions do not work here, what was
read is not what the file holds, a process has no userfaultfd); 2, the question could not be asked: a wrong argument, a
missing file, no such process, no room.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, NoReturn, Protocol

if TYPE_CHECKING:
    from userfault.cli.screen import Screen

YES, NO, MISTAKE = 0, 1, 2
UNHEARD = 141
"""As a shell reports a program that SIGPIPE has ended: 128 + 13."""


class CommandError(Exception):
    """A command cannot do what it was asked; the message is one line that says why, and the remedy."""


class Parser(argparse.ArgumentParser):
    """A parser whose complaint is one line that names the way to help; the usage is printed by `--help` alone."""

    def error(self, message: str) -> NoReturn:
        """End the program with one line on standard error and status 2."""
        sys.stderr.write(f"{self.prog}: {message} (see {self.prog} --help)\n")
        sys.exit(MISTAKE)


class Command(Protocol):
    """One word after `userfault` on the command line. Each stands in a module of its own."""

    name: str
    summary: str
    """A phrase for the list of commands."""
    description: str
    """What `--help` says first; it shows two real command lines."""

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments."""

    def run(self, arguments: argparse.Namespace, screen: Screen) -> int:
        """Do it, and return the exit status.

        Raises:
            CommandError: the user's mistake, or the machine's limit.
        """
