"""What the manual repeats of the program: names, signatures, help texts, the diagram; and its links."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import userfault
from userfault.blocks import states
from userfault.cli.program import COMMANDS, make_parser
from userfault.kernel import Userfaultfd, maps, memfd, memory, process
from userfault.protocol import states as protocol_states

_ROOT = Path(__file__).parents[2]
_DOCS = _ROOT / "docs"
_PAGES = [_ROOT / "README.md", *sorted(_DOCS.glob("*.md"))]
_REFERENCE = (_DOCS / "reference.md").read_text(encoding="utf-8")
_INTERNAL = {"link"}  # of Pager: for the package only, as its docstring says
_NAMES = [name for name in userfault.__all__ if name != "__version__"]


def _section(name: str) -> str:
    """The part of the reference under a name's heading."""
    parts = re.split(r"^#{2,3} ", _REFERENCE, flags=re.MULTILINE)
    return next((part for part in parts if part.splitlines()[0].strip() == name), "")


def _signature(function: object) -> str:
    """A signature as the reference writes it: names, kinds and defaults, without types and without self."""
    signature = inspect.signature(function)  # type: ignore[arg-type]  # whatever is callable
    parameters = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    if parameters and parameters[0].name == "self":
        del parameters[0]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


def _own_members(kind: type) -> dict[str, object]:
    """Public members that a class itself defines; what only repeats a base class's is not one."""
    bases = {name for base in kind.__mro__[1:] for name in base.__dict__}
    return {
        name: inspect.getattr_static(kind, name)
        for name in kind.__dict__
        if not name.startswith("_") and name not in bases and name not in _INTERNAL
    }


@pytest.mark.parametrize("name", _NAMES)
def test_every_public_name_has_its_section(name: str) -> None:
    assert _section(name), f"docs/reference.md has no heading for {name}"


def _is_called(value: object) -> bool:
    """Whether users call it: functions, and classes that they make objects of."""
    if inspect.isclass(value):
        return "__init__" in value.__dict__ and not dataclasses.is_dataclass(value)
    return callable(value)


@pytest.mark.parametrize("name", [name for name in _NAMES if _is_called(getattr(userfault, name))])
def test_signatures_are_those_of_the_code(name: str) -> None:
    assert f"`{name}{_signature(getattr(userfault, name))}`" in _section(name)


@pytest.mark.parametrize("name", [name for name in _NAMES if inspect.isclass(getattr(userfault, name))])
def test_members_are_those_of_the_code(name: str) -> None:
    kind, text = getattr(userfault, name), _section(name)

    missing = []
    for member, value in _own_members(kind).items():
        written = f"`{member}{_signature(value)}`" if inspect.isfunction(value) else f"`{member}`"
        if written not in text:
            missing.append(written)
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    missing += [field.name for field in fields if f"`{field.name}`" not in text]

    assert missing == []


def test_every_block_state_is_explained() -> None:
    page = (_DOCS / "blocks.md").read_text(encoding="utf-8")

    assert [state.name for state in userfault.BlockState if f"\n| {state.name.lower()} |" not in page] == []


def test_the_diagram_is_drawn_from_the_table() -> None:
    page = (_DOCS / "blocks.md").read_text(encoding="utf-8")

    assert f"```mermaid\n{states.diagram()}\n```" in page


def test_the_diagram_of_the_protocol_is_drawn_from_its_table() -> None:
    page = (_DOCS / "protocol.md").read_text(encoding="utf-8")

    assert f"```mermaid\n{protocol_states.diagram()}\n```" in page
    assert [state.name for state in protocol_states.State if f"\n| {state.name} |" not in page] == []


@pytest.mark.parametrize("words", [[], *([command.name] for command in COMMANDS)], ids=" ".join)
def test_help_texts_are_those_of_the_program(words: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "userfault", *words, "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=os.environ | {"COLUMNS": "80", "PYTHONPATH": str(_ROOT / "src")},
    )
    page = (_DOCS / "cli.md").read_text(encoding="utf-8")
    shown = " ".join(["$ userfault", *words, "--help"])

    assert f"```console\n{shown}\n{result.stdout.rstrip()}\n```" in page


def test_every_command_is_in_the_list_and_has_its_part() -> None:
    page = (_DOCS / "cli.md").read_text(encoding="utf-8")

    assert [command.name for command in COMMANDS if f"\n## userfault {command.name}\n" not in page] == []
    assert [command.name for command in COMMANDS if command.name not in make_parser().format_help()] == []


def test_every_operation_of_the_kernel_package_is_on_its_page() -> None:
    page = (_DOCS / "kernel.md").read_text(encoding="utf-8")
    operations = {name for name in vars(Userfaultfd) if not name.startswith("_")} - {"adopt", "detach", "fileno"}
    properties = {"fd", "closed", "ioctls", "via", "read_raw", "user_mode_only", "close"}
    functions = {name for module in (maps, memory, memfd, process) for name in module.__all__ if name.islower()}

    assert [name for name in sorted(operations - properties | functions) if name not in page] == []


def _anchors(page: Path) -> set[str]:
    """The names that headings of a page can be linked by, as on GitHub."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: str(page.name))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))

    broken = []
    for target in targets:
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in _anchors(file)):
            broken.append(target)

    assert broken == []


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: str(page.name))
def test_modules_that_examples_import_are_shown_to_the_reader(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    written = re.findall(r"^Path\(\"\w+\.py\"\)\.write_text\('''(.*?)'''\)", text, flags=re.MULTILINE | re.DOTALL)
    shown = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)

    assert [module for module in written if module not in shown] == []
