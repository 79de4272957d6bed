"""Where commands write: plain text, and rich in a terminal."""

from __future__ import annotations

import io
import sys

import pytest

from userfault.cli.screen import Finding, PlainScreen, RichScreen, Screen, choose_screen

_FINDINGS = [
    Finding("ok", "memfd", "yes", "files in memory"),
    Finding("missing", "POISON", "no", "a SIGBUS", "It needs Linux 6.6 or later."),
]


class _Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class _AsciiFile(io.StringIO):
    encoding = "ascii"


def test_a_finding_is_a_line_and_its_remedy_another() -> None:
    file = io.StringIO()

    PlainScreen(file).findings(_FINDINGS)

    assert file.getvalue().splitlines() == [
        "  ok       memfd   yes  files in memory",
        "  missing  POISON  no   a SIGBUS",
        "                   → It needs Linux 6.6 or later.",
    ]


def test_no_findings_are_no_lines() -> None:
    file = io.StringIO()

    PlainScreen(file).findings([])

    assert file.getvalue() == ""


def test_a_file_that_is_ascii_gets_ascii() -> None:
    file = _AsciiFile()
    screen = PlainScreen(file)

    screen.line("54 µs → \udcff ü")

    assert not screen.unicode
    assert file.getvalue() == "54 us -> \\udcff \\xfc\n"


def test_facts_stand_under_each_other() -> None:
    file = io.StringIO()

    PlainScreen(file).facts([("a", "1"), ("longer", "2")])

    assert file.getvalue() == "  a       1\n  longer  2\n"


def test_progress_is_silent_where_nobody_looks() -> None:
    file = io.StringIO()

    with PlainScreen(file).progress("making", 10) as advance:
        advance(10)

    assert file.getvalue() == ""


def test_plain_progress_draws_a_bar_and_wipes_it() -> None:
    file = _Terminal()

    with PlainScreen(file).progress("making", 10) as advance:
        advance(5)
        advance(5)

    assert f"making [{'#' * 20:40}]  50 %" in file.getvalue()
    assert f"[{'#' * 40}] 100 %" in file.getvalue()
    assert file.getvalue().endswith(" \r")


def test_rich_shows_findings_with_marks() -> None:
    pytest.importorskip("rich")
    file = _Terminal()

    RichScreen(file).findings(_FINDINGS)

    text = file.getvalue()
    assert "✓" in text
    assert "✗" in text
    assert "It needs Linux 6.6 or later." in " ".join(text.split())


def test_rich_takes_text_as_it_is() -> None:
    pytest.importorskip("rich")
    file = _Terminal()

    RichScreen(file).line("[bold]a.npy[/bold] :smile: \udcff")

    assert "[bold]a.npy[/bold] :smile: \\udcff" in file.getvalue()


def test_rich_progress_goes_away() -> None:
    pytest.importorskip("rich")
    file = _Terminal()

    with RichScreen(file).progress("making", 10) as advance:
        advance(10)

    assert "making" in file.getvalue()
    assert file.getvalue().endswith("\x1b[2K")


def _chosen(monkeypatch: pytest.MonkeyPatch, file: io.StringIO, term: str) -> type[Screen]:
    monkeypatch.setenv("TERM", term)
    return type(choose_screen(file))


def test_rich_is_chosen_for_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")

    assert _chosen(monkeypatch, _Terminal(), "xterm") is RichScreen
    assert _chosen(monkeypatch, _Terminal(), "dumb") is PlainScreen
    assert _chosen(monkeypatch, io.StringIO(), "xterm") is PlainScreen


def test_a_program_without_standard_output_has_a_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)

    screen = choose_screen()
    screen.line("unheard")
    screen.file.close()

    assert type(screen) is PlainScreen
