"""The command line: `userfault doctor`, `userfault demo`, `userfault info`, `userfault fdinfo`.

`program` is the whole, `command` says what a command is, `screen` where it writes, `figures` how numbers read.  Each
command stands in a module of its own name, with what belongs to it alone beside it: `machine`, `limits` and `trial` for
the doctor, `show`, `sample` and `drawing` for the demo, `storage` for info, `descriptors` and `meaning` for fdinfo.
rich makes it pleasant and is not needed; NumPy is imported by the commands that use arrays.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

INTERRUPTED = 130
"""As a shell reports a program that SIGINT has ended: 128 + 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return its exit status: 0 yes, 1 no, 2 it could not be asked.

    Args:
        argv: The words after the program's name; by default those of this process.
    """
    try:
        from userfault.cli.program import run  # in here: Ctrl-C is no less polite while modules are loaded

        return run(argv)
    except KeyboardInterrupt:
        sys.stderr.write("userfault: interrupted\n")
        return INTERRUPTED
