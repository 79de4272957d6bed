"""The rooms of the house: who may import whom, and what the pager's processes may load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

_PACKAGE = Path(__file__).parents[2] / "src" / "userfault"

# A room imports from rooms of a lower level only; rooms of one level do not know each other.
_LEVELS = {
    "errors": 0,
    "latch": 0,
    "shield": 0,
    "kernel": 1,
    "protocol": 2,
    "stores": 2,
    "blocks": 2,
    "pager": 3,
    "retry": 2,
    "interrupts": 2,
    "stats": 4,
    "residence": 4,
    "region": 5,
    "exported": 5,
    "arrays": 6,
    "cli": 7,
    "testing": 7,
    "": 8,  # the package itself: the public names
}
# These are written against the public names, as a user's program is; nothing imports them.
_OUTSIDE = {"cli", "testing"}

# What the supervisor and the worker load stays small: each of these costs megabytes or milliseconds.
_HEAVY = frozenset(
    [
        "argparse",
        "ast",
        "asyncio",
        "concurrent.futures",
        "dataclasses",
        "importlib.metadata",
        "inspect",
        "logging",
        "multiprocessing",
        "numpy",
        "pathlib",
        "pickle",
        "re",
        "shutil",
        "subprocess",
        "tempfile",
        "tokenize",
        "traceback",
        "typing",
        "urllib.parse",
    ]
)
# What the pager's processes load: these rooms whole, and of the kernel's room these modules.
_LEAN_ROOMS = {"errors", "stores", "blocks", "pager"}
_LEAN_KERNEL = {"__init__", "abi", "userfaultfd", "maps", "memory", "memfd", "process"}


def _modules() -> list[Path]:
    return sorted(_PACKAGE.rglob("*.py"))


def _name(path: Path) -> str:
    parts = path.relative_to(_PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _room(module: str) -> str:
    """The room a dotted name of ours belongs to; the package's own public names are the room ""."""
    room = module.split(".")[1] if "." in module else ""
    return room if (_PACKAGE / room).is_dir() or (_PACKAGE / f"{room}.py").exists() else ""


def _imports(path: Path) -> set[str]:
    """Every module of ours that a file names in an import statement, wherever it stands."""
    found = set()
    package = _name(path) if path.name == "__init__.py" else _name(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            # "from userfault import kernel" names the room, not the package.
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "userfault" else {module}
    return {name for name in found if name.split(".")[0] == "userfault"}


def _offences(path: Path) -> list[str]:
    room = _room(_name(path))
    rooms = {target: _room(target) for target in _imports(path)}
    return [
        f"{_name(path)} imports {target}"
        for target, other in sorted(rooms.items())
        if other != room
        and (other in _OUTSIDE or (room not in _OUTSIDE and _LEVELS.get(other, 99) >= _LEVELS.get(room, 0)))
    ]


def test_every_room_has_a_level() -> None:
    rooms = {_room(_name(path)) for path in _modules()}

    assert rooms - _LEVELS.keys() - {"__main__"} == set()


# `__main__` is the command line's own entrance, above all levels.
@pytest.mark.parametrize("path", [path for path in _modules() if path.name != "__main__.py"], ids=_name)
def test_imports_point_downwards(path: Path) -> None:
    assert _offences(path) == []


def _is_lean(path: Path) -> bool:
    room = path.relative_to(_PACKAGE).with_suffix("").parts[0]
    return room in _LEAN_ROOMS or (room == "kernel" and path.stem in _LEAN_KERNEL)


@pytest.mark.parametrize("path", [_PACKAGE / "__init__.py", *filter(_is_lean, _modules())], ids=_name)
def test_module_of_the_pager_loads_nothing_heavy(path: Path) -> None:
    # -I and -S: neither the environment's start-up files nor the caller's path may load anything first.
    code = (
        f"import sys; sys.path.insert(0, {str(_PACKAGE.parent)!r}); import {_name(path)}; "
        f"print(*sorted({set(_HEAVY)!r} & set(sys.modules)))"
    )

    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=60, check=False
    )

    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.split() == []
