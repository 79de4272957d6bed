"""The page of promises: every row names tests that prove it, and those exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_PAGE = _ROOT / "docs/what-can-go-wrong.md"
_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def _rows() -> list[list[str]]:
    lines = [line for line in _PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if row[0] != "what happens" and set(row[0]) != {"-"}]


@pytest.mark.parametrize("row", _rows(), ids=lambda row: row[0][:60])
def test_a_row_is_proved_by_tests_that_exist(row: list[str]) -> None:
    happens, sees, proved = row
    assert happens
    assert sees
    named = _TEST.findall(proved)
    assert named, "this row names no test"
    assert len(named) == proved.count("::"), "a test is named in another way"
    for path, name in named:
        source = (_ROOT / path).read_text(encoding="utf-8")
        assert re.search(rf"^def {name}\(", source, re.MULTILINE), f"{path} has no test {name}"


def test_no_promise_is_lost() -> None:
    assert len(_rows()) >= 20
