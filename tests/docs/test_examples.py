"""The README and the manual are executed: what they show is what happens.

Every ``python`` block runs in a child process, in an empty folder, with a time limit. Every ``$ userfault``
line of a ``console`` block runs too, and must succeed. Three HTML comments, which no reader of the page sees,
may stand before a block:

- ``<!-- not run: reason -->`` says why it is not executed; of a console block the commands must still exist;
- ``<!-- setup`` … ``-->`` holds Python that runs before the block, to make the files that it opens;
- ``<!-- continues -->`` runs the block after the ones before it on the page, as one program.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_PAGES = [*sorted(_ROOT.glob("README.md")), *sorted(_ROOT.glob("docs/**/*.md"))]
_TIMEOUT_S = 120
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})\s*([\w+-]*).*$")
_NOT_RUN = re.compile(r"<!--\s*not run:\s*(.*?)\s*-->$", re.DOTALL)
_SETUP = re.compile(r"<!--\s*setup\s*\n(.*?)-->$", re.DOTALL)
_CONTINUES = re.compile(r"<!--\s*continues\s*-->$")


@dataclass(frozen=True)
class Block:
    """One fenced block, and the comment that stands before it."""

    page: str
    line: int
    language: str
    text: str
    comment: str

    @property
    def reason(self) -> str | None:
        found = _NOT_RUN.match(self.comment)
        return found.group(1) if found else None

    @property
    def setup(self) -> str:
        found = _SETUP.match(self.comment)
        return found.group(1) if found else ""

    @property
    def continues(self) -> bool:
        return bool(_CONTINUES.match(self.comment))

    @property
    def commands(self) -> list[list[str]]:
        shown = (line.removeprefix("$ ") for line in self.text.splitlines() if line.startswith("$ "))
        return [shlex.split(line, comments=True)[1:] for line in shown if line.split()[0] == "userfault"]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def read_blocks(page: str, text: str) -> list[Block]:
    """All fenced blocks of a page, in order."""
    blocks: list[Block] = []
    lines = text.splitlines()
    opened = 0
    fence = language = comment = ""
    for number, line in enumerate(lines, 1):
        match = _FENCE.match(line)
        if fence:
            if match and line.strip().startswith(fence) and not match.group(2):
                blocks.append(Block(page, opened, language, "\n".join(lines[opened : number - 1]) + "\n", comment))
                fence = ""
        elif match:
            fence, language = match.groups()
            opened, comment = number, _comment_before(lines[: number - 1])
    assert not fence, f"{page}:{opened}: this block is never closed"
    return blocks


def _comment_before(lines: list[str]) -> str:
    """The HTML comment that ends right before a block, blank lines aside."""
    above = "\n".join(lines).rstrip()
    return above[above.rindex("<!--") :] if above.endswith("-->") else ""


_BLOCKS = [
    block for page in _PAGES for block in read_blocks(str(page.relative_to(_ROOT)), page.read_text(encoding="utf-8"))
]
_PYTHON = [block for block in _BLOCKS if block.language == "python" and block.reason is None]
_CONSOLE = [block for block in _BLOCKS if block.language == "console"]


def _program(block: Block) -> str:
    """What to run for a block: its setup, and the blocks that it continues."""
    same_page = [other for other in _BLOCKS if other.page == block.page and other.language == "python"]
    parts = [block]
    while parts[0].continues:
        parts.insert(0, same_page[same_page.index(parts[0]) - 1])
    return "\n".join(part.setup + part.text for part in parts)


def _run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "faulthandler", "-W", "error", *arguments]
    return subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("block", _PYTHON, ids=str)
def test_python_block_runs(block: Block, tmp_path: Path) -> None:
    program = tmp_path / "example.py"
    program.write_text(_program(block), encoding="utf-8")

    result = _run([str(program)], tmp_path)

    assert result.returncode == 0, f"{block}\n{result.stdout}{result.stderr}"


@pytest.mark.parametrize("block", [block for block in _CONSOLE if block.commands], ids=str)
def test_console_commands_succeed(block: Block, tmp_path: Path) -> None:
    if block.setup:
        assert _run(["-c", block.setup], tmp_path).returncode == 0
    for words in block.commands:
        arguments = words if block.reason is None else [*words[:1], "--help"]
        code = "import sys; from userfault.cli import main; sys.exit(main())"

        result = _run(["-c", code, *arguments], tmp_path)

        assert result.returncode == 0, f"{block}: {words}\n{result.stdout}{result.stderr}"


def test_each_block_says_its_language() -> None:
    silent = [str(block) for block in _BLOCKS if not block.language]

    assert silent == []


def test_each_block_that_is_not_run_has_a_reason() -> None:
    unexplained = [str(block) for block in _BLOCKS if block.reason == ""]

    assert unexplained == []


def test_blocks_are_found_with_their_comments() -> None:
    page = (
        "a\n<!-- not run: needs a network -->\n\n```python\nx\n```\n<!-- setup\ny = 1\n-->\n```python\nprint(y)\n```\n"
    )

    first, second = read_blocks("page", page)

    assert first.reason == "needs a network"
    assert (first.line, first.text) == (4, "x\n")
    assert (second.setup, second.reason, second.text) == ("y = 1\n", None, "print(y)\n")


def test_commands_are_found_in_console_blocks() -> None:
    block = Block("page", 1, "console", "$ userfault info 'a b.npy'  # hint\noutput\n$ ls\n$ userfault doctor\n", "")

    assert block.commands == [["info", "a b.npy"], ["doctor"]]
