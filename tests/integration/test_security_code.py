"""What SECURITY.md says of code and data, proved: pickles, the environment, files, headers, what a pager says."""

from __future__ import annotations

import ast
import contextlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import userfault
from userfault import FileStore, MemoryStore, Pager, PagerLostError, Region, StoreError, open_array
from userfault.stores import Store
from userfault.testing import CrashingStore, PatternStore, run_child

SOURCE = Path(userfault.__file__).parent
SIZE = 500_000


# -- what is evaluated, and where -----------------------------------------------------------------------------------

EVALUATES = {
    "pager/recipe.py": {"pickle.loads", "marshal.loads"},  # by the pager, from its application
    "pager/failure.py": {"marshal.loads"},  # by the application, from its pager
    "pager/spawn.py": {"marshal.loads"},  # by a process of the pager, from whoever started it
    "testing/child.py": {"pickle.loads"},  # tests, from themselves
    "testing/reading.py": {"pickle.loads"},
    "testing/stores.py": {"pickle.loads"},
}
_READERS = {"load", "loads", "Unpickler"}
_MODULES = {"pickle", "marshal", "shelve", "dill"}


def evaluators(path: Path) -> set[str]:
    """What in a module turns bytes into objects or code; and NumPy's leave to do so."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found |= {f"{(node.module or '').strip('_')}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.add(f"{node.value.id.strip('_')}.{node.attr}")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found.add(f"builtins.{node.func.id}")
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.add("numpy.allow_pickle")
    wanted = {f"{module}.{name}" for module in _MODULES for name in _READERS}
    return found & (wanted | {"builtins.eval", "builtins.exec", "numpy.allow_pickle"})


def test_pickles_are_read_in_one_place_only() -> None:
    found = {str(path.relative_to(SOURCE)): evaluators(path) for path in SOURCE.rglob("*.py")}
    assert {name: kinds for name, kinds in found.items() if kinds} == EVALUATES


class HostileError(Exception):
    """Would run in whichever process unpickles it."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self),)


class HostileStore(Store):
    """Raises what must not be unpickled, and describes itself at length."""

    size = SIZE
    concurrency = 4

    def __init__(self, trap: str) -> None:
        self.trap = trap

    def read_into(self, offset: int, buffer: memoryview) -> None:
        raise HostileError(self.trap)

    def describe(self) -> str:
        return "\ud800 a lone surrogate " * 100_000


def read_hostile(trap: str) -> tuple[str, int, list[object]]:
    """Meet the store's error; return its cause, how long the store's name has become, and what was unpickled here."""
    found: list[object] = []
    sys.addaudithook(lambda event, args: found.append(args) if event == "pickle.find_class" else None)
    with Region(HostileStore(trap)) as region:
        try:
            region.ensure(0, 1)
        except StoreError as error:
            region.stats()
            return f"{type(error).__name__} {error.cause}", len(error.store), found
    raise AssertionError("it was read")


def test_the_application_unpickles_nothing_that_comes_from_its_pager(tmp_path: Path) -> None:
    """What a store raises, and says of itself, arrives as text, and not too much of it."""
    trap = str(tmp_path / "sprung")
    assert pickle.dumps(HostileError(trap))
    cause, length, unpickled = run_child(read_hostile, trap).check().value
    assert cause == f"StoreError HostileError: {trap}"
    assert 10 < length < 10_000
    assert unpickled == []
    assert not os.path.exists(trap)


OWN_STORE = """
from userfault.testing.patterns import PatternStore

class OwnStore(PatternStore):
    def read_into(self, offset, buffer):
        import colorsys  # of the standard library, and not imported before
        super().read_into(offset, buffer)
"""


def test_nothing_in_folder_or_environment_stands_in_for_a_module(tmp_path: Path) -> None:
    """Modules with the names of the library's lie in the current folder, on PYTHONPATH, and on a store's path."""
    evil, marker = tmp_path / "evil", tmp_path / "executed"
    evil.mkdir()
    names = "os socket struct ctypes select threading contextlib resource faulthandler numpy re site signal encodings"
    for name in (*names.split(), "colorsys", "sitecustomize", "usercustomize", "userfault", "_pickle", "mmap"):
        (evil / f"{name}.py").write_text(f"open({str(marker)!r}, 'a').write(__name__ + ' ')\n")
    (evil / "own_store.py").write_text(OWN_STORE)
    program = f"""
import faulthandler, os, sys
faulthandler.dump_traceback_later(30, exit=True)
sys.path.insert(0, {str(SOURCE.parent)!r})
import userfault
from userfault import Region
sys.path.insert(0, {str(evil)!r})  # everything that an application imports from here on is its own affair
import own_store
with Region(own_store.OwnStore(500_000)) as region:
    region.ensure(0, 100_000)
    os.kill(region.pager.worker_pid, 9)
    region.ensure()
    os.kill(region.pager.pid, 9)
    region.evict()
    region.ensure()
    print(region.memory[4_321] == region.store.expected(4_321, 1)[0], region.pager.restarts)
"""
    environment = {"PYTHONPATH": str(evil), "PYTHONHOME": str(evil), "PYTHONSTARTUP": str(evil / "os.py")}
    result = subprocess.run(
        [sys.executable, "-I", "-c", program],
        cwd=evil,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (result.stdout, result.returncode) == ("True 1\n", 0), result.stderr
    assert not marker.exists(), marker.read_text()


# -- files ----------------------------------------------------------------------------------------------------------

HEADER = "{'descr': '<f8', 'fortran_order': False, 'shape': (10,), }"
NESTED = {
    "signs": "-" * 9_000 + "1",
    "signs in the shape": HEADER.replace("10", "-" * 3_000 + "10"),
    "sums in the shape": HEADER.replace("10", "1+" * 3_000 + "1"),
    "attributes": "a" + ".b" * 4_000,
    "calls": "f" + "()" * 4_000,
    "lists": "[" * 4_500 + "]" * 4_500,
    "a key that does not hash": "{[]: 1}",
    "a set of dictionaries": "{{}}",
    "keys of two kinds": "{b'descr': '<f8', 'fortran_order': False, 'shape': (10,)}",
    "a key too many": HEADER[:-2] + "'x': 1}",
    "a number too long": HEADER.replace("10", "9" * 5_000),
    "an array of arrays too large": HEADER.replace("'<f8'", "'(4611686018427387904,)f8'"),
    "an offset below nothing": HEADER.replace("'<f8'", "{'names': ['a'], 'formats': ['f8'], 'offsets': [-8]}"),
    "objects beneath numbers": HEADER.replace(
        "'<f8'", "{'names': ['a', 'b'], 'formats': ['O', 'f8'], 'offsets': [0, 0]}"
    ),
    "too long": HEADER + " " * 20_000,
}


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("header", NESTED)
def test_a_header_made_to_break_the_parser_is_a_value_error(header: str, version: int) -> None:
    """Whatever Python's parser makes of it: RecursionError, MemoryError, TypeError."""
    text = NESTED[header].encode()
    length = len(text).to_bytes(2 if version == 1 else 4, "little")
    with pytest.raises(ValueError, match="MemoryStore"):
        open_array(MemoryStore(b"\x93NUMPY" + bytes([version, 0]) + length + text + bytes(80)))


SWAPS: dict[str, Callable[[Path, Path], object]] = {
    "pipe": lambda path, _: os.mkfifo(path),
    "link": lambda path, other: path.symlink_to(other),
    "folder": lambda path, _: path.mkdir(),
}


@pytest.mark.parametrize("swap", SWAPS)
def test_a_file_that_gives_way_to_something_else(default_pager: Pager, tmp_path: Path, swap: str) -> None:
    """A pipe, which one could wait for; a link to what the application may read and its user did not mean."""
    path, other = tmp_path / "file", tmp_path / "other"
    path.write_bytes(bytes(SIZE))
    other.write_bytes(b"secret" * (SIZE // 6))
    with Region(FileStore(path)) as region:
        path.unlink()
        SWAPS[swap](path, other)
        with pytest.raises(StoreError, match="has changed beneath us"):
            region.ensure()
    assert default_pager.restarts == 0


# -- the pager's own words ------------------------------------------------------------------------------------------


class LitteringStore(PatternStore):
    """Leaves a file open."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        open(os.devnull, "rb")  # noqa: SIM115  # that is the mistake
        super().read_into(offset, buffer)


def litter() -> list[bool]:
    """Return for each process of the pager whether it is in development mode."""
    with Pager() as pager, Region(LitteringStore(SIZE), pager=pager) as region:
        region.ensure()
        os.kill(pager.worker_pid, 9)
        region.evict()
        commands = [Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in (pager.pid, pager.worker_pid)]
    return [b"dev" in words for words in commands]


@pytest.mark.parametrize("mode", ["1", ""])
def test_stores_are_checked_in_development_mode_and_then_only(mode: str) -> None:
    result = run_child(litter, env={"PYTHONDEVMODE": mode}).check()
    assert result.value == [bool(mode)] * 2
    assert ("ResourceWarning: unclosed file" in result.stderr) == bool(mode)


def die_unheard(how: str) -> tuple[str, int]:
    """Have a store that ends its worker, which has much to say to a standard error that nobody reads."""
    _, full = os.pipe()
    os.set_blocking(full, False)
    for size in (4096, 1):
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(full, bytes(size))
    os.set_blocking(full, True)
    os.dup2(full, 2)
    with Pager() as pager, Region(CrashingStore(SIZE, how, (0,)), pager=pager) as region:
        try:
            region.ensure(0, 1)
        except (StoreError, PagerLostError) as error:
            return type(error).__name__, pager.restarts
    raise AssertionError("it was read")


@pytest.mark.parametrize("how", ["segv", "abort"])
def test_a_worker_dies_at_once_even_if_nobody_reads_its_last_words(how: str) -> None:
    name, restarts = run_child(die_unheard, how, timeout=20).check().value
    assert name in ("StoreError", "PagerLostError")
    assert restarts
