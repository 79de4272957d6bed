"""The benchmarks run, read the right bytes and write what they say. Their figures are not judged here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

_BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def _run(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "faulthandler", "-W", "error", str(_BENCHMARKS / f"{name}.py"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=150, check=False, env=os.environ | environment
    )


@pytest.mark.benchmark
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler: the reference pager cannot be built")
def test_fault_latency_measures_every_row_and_writes_its_files(tmp_path: Path) -> None:
    result = _run("fault_latency", "--quick", "--output", str(tmp_path))

    assert result.returncode == 0, result.stderr
    document = json.loads((tmp_path / "fault_latency.json").read_text())
    pagers = {row["pager"] for row in document["rows"]}
    assert pagers == {"C process", "C thread", "userfault", "userfault, NumPy", "numpy.memmap", "bulk COPY"}
    assert {len(row["nanoseconds"]) for row in document["rows"]} == {1}
    checks = 3 if document["machine"]["other_cpu"] >= 0 else 2
    assert len(document["checks"]) == checks
    for check in document["checks"]:
        assert check["name"] in result.stdout
    assert ET.parse(tmp_path / "fault_latency.svg").getroot().tag.endswith("svg")


@pytest.mark.benchmark
def test_fault_latency_says_that_a_compiler_is_missing(tmp_path: Path) -> None:
    result = _run("fault_latency", "--quick", "--required", PATH=str(tmp_path))

    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "fault_latency: no C compiler: install one that answers to 'cc'\n"


@pytest.mark.benchmark
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler: the program and the reference cannot be built")
def test_exported_measures_every_row_and_writes_its_files(tmp_path: Path) -> None:
    result = _run("exported", "--quick", "--output", str(tmp_path))

    assert result.returncode == 0, result.stderr
    document = json.loads((tmp_path / "exported.json").read_text())
    assert {row["pager"] for row in document["rows"]} == {"C process", "userfault", "exported, C program"}
    assert {len(row["nanoseconds"]) for row in document["rows"]} == {1}
    assert len(document["checks"]) == (8 if document["machine"]["other_cpu"] >= 0 else 6)
    for check in document["checks"]:
        assert check["name"] in result.stdout
    assert ET.parse(tmp_path / "exported.svg").getroot().tag.endswith("svg")
