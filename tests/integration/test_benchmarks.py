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

_BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "fault_latency.py"


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "faulthandler", "-W", "error", str(_BENCHMARK), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=150, check=False, env=os.environ | environment
    )


@pytest.mark.benchmark
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler: the reference pager cannot be built")
def test_fault_latency_measures_every_row_and_writes_its_files(tmp_path: Path) -> None:
    result = _run("--quick", "--output", str(tmp_path))

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
    result = _run("--quick", "--required", PATH=str(tmp_path))

    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "fault_latency: no C compiler: install one that answers to 'cc'\n"
