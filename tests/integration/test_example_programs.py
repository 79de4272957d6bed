"""The programs in examples/ run, from any folder, and say what they promise."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import userfault

_ROOT = Path(__file__).parents[2]
_EXAMPLES = _ROOT / "examples"
_SAID = {
    "scattered_rows": "faults brought",
    "sqlite_store": "765432 [0, 250000, 500000, 750000]",
    "compressed_store": "error: Error -3 while decompressing data",
    "own_pager": "read [0, 7, 999]",
    "changed_pages": "100 of 4096 pages copied, equal: True",
    "array_from_c": "40000000 of 40000000 bytes equal, 9766 faults answered",
    "asyncio_pager": "16 pages filled",
    "external_sort": "in memory; right: True",
}


def _run(name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", "-W", "error", str(_EXAMPLES / f"{name}.py")],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"PYTHONPATH": str(_ROOT / "src"), "TMPDIR": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
    )


@pytest.mark.parametrize("name", _SAID)
def test_program_runs_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    if name == "changed_pages" and not userfault.capabilities().dirty_tracking:
        pytest.skip("needs WP_ASYNC and PAGEMAP_SCAN: Linux 6.7 or later")
    if name == "array_from_c" and shutil.which("cc") is None:
        pytest.skip("no C compiler: c_pager.c cannot be compiled")

    result = _run(name, tmp_path)

    assert result.returncode == 0, result.stderr
    assert _SAID[name] in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_every_program_is_tested_and_in_the_list() -> None:
    programs = {path.stem for path in _EXAMPLES.glob("*.py")}
    page = (_EXAMPLES / "README.md").read_text(encoding="utf-8")

    assert programs == _SAID.keys()
    assert [path.name for path in _EXAMPLES.glob("*.[cp]*") if f"[{path.name}]({path.name})" not in page] == []
