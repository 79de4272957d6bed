"""Where a command writes: a terminal with rich, or plain text.

A command says what it has to say (`heading`, `line`, `findings`, `progress`) and never how it looks.  Rich is used
when standard output is a terminal and rich is installed; otherwise the text is plain, a finding to a line, so that
`grep` and `cut` work on it.  Nothing is cut off to fit a width that nobody sees.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TextIO, TypeAlias

Status: TypeAlias = Literal["ok", "limited", "missing", "note"]
Advance: TypeAlias = Callable[[int], None]

_ASCII = str.maketrans({"µ": "u", "→": "->", "✓": "+", "✗": "x"})
_TRIED = "µ→█░✓"
_BAR_CELLS = 40
_MARKS = {"ok": ("✓", "green"), "limited": ("!", "yellow"), "missing": ("✗", "bold red"), "note": ("·", "dim")}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a command found out.

    Attributes:
        status: `"ok"`; `"limited"`, something works less well; `"missing"`, something needed is not there; `"note"`.
        name: What was looked at.
        found: What it is.
        meaning: What follows from it.
        remedy: What to do about it, if anything needs to be done.
        value: The same as `found`, for programs.
    """

    status: Status
    name: str
    found: str
    meaning: str
    remedy: str = ""
    value: object = None


class Screen(ABC):
    """A place to write to. One thread.

    Attributes:
        file: Where it goes.
        unicode: Whether that can show more than ASCII.
        terminal: Whether somebody looks at it while it is written.
    """

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.terminal = file.isatty()
        self.unicode = _shows(file, _TRIED)

    @abstractmethod
    def heading(self, text: str) -> None:
        """Begin a part."""

    @abstractmethod
    def line(self, text: str = "", style: str = "") -> None:
        """Write one line as it is; `style` is a word or two of colour where there is some."""

    @abstractmethod
    def findings(self, findings: Sequence[Finding]) -> None:
        """Write a table of findings."""

    @abstractmethod
    def progress(self, label: str, total: int) -> contextlib.AbstractContextManager[Advance]:
        """Show how far something has come until the `with` block ends; its value is called with each step in bytes."""

    def printable(self, text: str) -> str:
        """Return a text that the file can take: a file's name may hold anything, and not every terminal shows `µ`."""
        text = text if self.unicode else text.translate(_ASCII)
        encoding = self.file.encoding or "utf-8"
        return text.encode(encoding, "backslashreplace").decode(encoding)

    def facts(self, facts: Sequence[tuple[str, str]]) -> None:
        """Write names and what they are, one to a line."""
        width = max(len(name) for name, _ in facts)
        for name, value in facts:
            self.line(f"  {name:{width}}  {value}")


class PlainScreen(Screen):
    """Text and nothing else."""

    def _write(self, text: str) -> None:
        self.file.write(self.printable(text))

    def heading(self, text: str) -> None:
        """Write it after a blank line."""
        self._write(f"\n{text}\n")

    def line(self, text: str = "", style: str = "") -> None:
        """Write it."""
        self._write(text.rstrip() + "\n")

    def findings(self, findings: Sequence[Finding]) -> None:
        """Write each on a line, columns under each other, the remedy beneath."""
        names = max((len(finding.name) for finding in findings), default=0)
        found = min(max((len(finding.found) for finding in findings), default=0), 40)
        for finding in findings:
            head = f"  {finding.status:7}  {finding.name:{names}}  {finding.found:{found}}"
            self.line(f"{head}  {finding.meaning}")
            if finding.remedy:
                self.line(f"  {'':7}  {'':{names}}  → {finding.remedy}")

    @contextlib.contextmanager
    def progress(self, label: str, total: int) -> Iterator[Advance]:
        """Draw a bar on one line of a terminal; elsewhere nothing, since nobody waits."""
        done = 0
        shown = -1

        def advance(step: int) -> None:
            nonlocal done, shown
            done += step
            cells = _BAR_CELLS * done // max(total, 1)
            if self.terminal and cells != shown:
                shown = cells
                self._write(f"\r{label} [{'#' * cells:{_BAR_CELLS}}] {100 * done // max(total, 1):3} %")
                self.file.flush()

        try:
            yield advance
        finally:
            if self.terminal:
                self._write(f"\r{'':{len(label) + _BAR_CELLS + 9}}\r")


class RichScreen(Screen):
    """A terminal, through rich."""

    def __init__(self, file: TextIO) -> None:
        super().__init__(file)
        from rich.console import Console

        self._console = Console(file=file, highlight=False, markup=False, emoji=False)

    def heading(self, text: str) -> None:
        """Write it bold, after a blank line."""
        self._console.print()
        self._console.print(text, style="bold cyan")

    def line(self, text: str = "", style: str = "") -> None:
        """Write it; long lines wrap at words."""
        self._console.print(self.printable(text), style=style or None)

    def findings(self, findings: Sequence[Finding]) -> None:
        """Draw a table, and beneath it the remedies, which need the whole width."""
        from rich.padding import Padding
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, show_header=False, padding=(0, 1, 0, 1))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, style="bold")
        table.add_column(max_width=34)
        table.add_column(ratio=1)
        for finding in findings:
            mark, style = _MARKS[finding.status]
            table.add_row(Text(self.printable(mark), style=style), finding.name, finding.found, finding.meaning)
        self._console.print(table)
        for finding in findings:
            if finding.remedy:
                remedy = Text(self.printable(f"→ {finding.name}: {finding.remedy}"), style="yellow")
                self._console.print(Padding(remedy, (0, 1, 0, 4)))

    def facts(self, facts: Sequence[tuple[str, str]]) -> None:
        """Write names and what they are; long ones wrap in their own column."""
        from rich.table import Table

        table = Table(box=None, show_header=False, padding=(0, 0, 0, 2))
        table.add_column(no_wrap=True)
        table.add_column(ratio=1)
        for name, value in facts:
            table.add_row(name, self.printable(value))
        self._console.print(table)

    @contextlib.contextmanager
    def progress(self, label: str, total: int) -> Iterator[Advance]:
        """Draw a bar with rate and time left, which is gone afterwards."""
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (
            TextColumn("  {task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as bar:
            task = bar.add_task(label, total=total)
            yield lambda step: bar.advance(task, step)


def choose_screen(file: TextIO | None = None) -> Screen:
    """Return the best screen for a file, standard output by default."""
    if file is None:
        file = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # closed with the program
    rich = file.isatty() and os.environ.get("TERM") != "dumb" and importlib.util.find_spec("rich") is not None
    return RichScreen(file) if rich else PlainScreen(file)


def _shows(file: TextIO, text: str) -> bool:
    try:
        text.encode(file.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True
