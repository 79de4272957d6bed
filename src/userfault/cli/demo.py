"""`userfault demo`: everything that the library is for, on a file of 2 GiB, in some seconds, checked at the end."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, NoReturn

from userfault.cli import figures
from userfault.cli.command import CommandError

if TYPE_CHECKING:
    from userfault.cli.screen import Screen

_DESCRIPTION = """\
Make a .npy file (once, in a temporary folder), open it, touch rows scattered
over it, kill the worker that brings them in half-way, go on, and compare what
was read with the file. The exit status is 0 only if all of it was right.

  userfault demo
  userfault demo --size 8GiB --folder /var/tmp --keep
"""
_NAME = "userfault-demo.npy"
_SMALLEST = 16 << 20
_ENDS = (signal.SIGTERM, signal.SIGHUP)


class DemoCommand:
    """Show the library at work."""

    name = "demo"
    summary = "see it work on a large file, every byte compared"
    description = _DESCRIPTION

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments."""
        size = figures.size_argument
        parser.add_argument("--size", type=size, default="2GiB", metavar="SIZE", help="size of the file; default: 2GiB")
        parser.add_argument("--folder", metavar="DIR", help="where to make the file; default: a new temporary folder")
        parser.add_argument("--keep", action="store_true", help="keep the file; the next run with --folder uses it")

    def run(self, arguments: argparse.Namespace, screen: Screen) -> int:
        """Make the file, show, compare, clean up."""
        if find_spec("numpy") is None:
            raise CommandError("the demo needs NumPy: pip install 'userfault[numpy]'")
        if arguments.size < _SMALLEST:
            raise CommandError(
                f"--size is {figures.size(arguments.size)}, too little to show: use {figures.size(_SMALLEST)} or more"
            )
        with _undisturbed():
            from userfault.cli.sample import ROW, Sample
            from userfault.cli.show import Show
        with _unwinding(), _folder(arguments.folder, keep=arguments.keep) as folder:
            sample = Sample(os.path.join(folder, _NAME), arguments.size // ROW)
            return Show(screen, sample, keep=arguments.keep).run()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Let Ctrl-C wait: NumPy, interrupted while it loads, takes itself for broken, and says so at length."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _unwinding() -> Iterator[None]:
    """Let SIGTERM and SIGHUP clean up as SIGINT does."""

    def leave(number: int, _frame: object) -> NoReturn:
        sys.exit(128 + number)

    before = {number: signal.signal(number, leave) for number in _ENDS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _folder(path: str | None, *, keep: bool) -> Iterator[str]:
    """Give a folder to work in; a temporary one is removed unless something in it is kept."""
    if path is not None:
        if not os.path.isdir(path):
            raise CommandError(f"--folder {path} is not a folder")
        yield os.path.abspath(path)
        return
    made = tempfile.mkdtemp(prefix="userfault-demo-")
    try:
        yield made
    finally:
        if not keep or not os.listdir(made):
            with _undisturbed():  # by a second Ctrl-C
                shutil.rmtree(made, ignore_errors=True)
