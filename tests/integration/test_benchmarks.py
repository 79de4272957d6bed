"""The benchmarks run, read the right bytes and write what they say. Their figures are not judged here."""

from __future__ import annotations

import glob
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from userfault.kernel import process

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


@pytest.mark.benchmark
def test_policy_simulates_every_trace(tmp_path: Path) -> None:
    drawn, figures = tmp_path / "policy.svg", tmp_path / "policy.json"

    result = _run("policy", "--blocks", "400", "--touches", "8000", "--plot", str(drawn), "--json", str(figures))

    assert result.returncode == 0, result.stderr
    rows = json.loads(figures.read_text())
    assert {row["trace"] for row in rows} == {"zipf", "uniform", "zipf + scan", "loop", "phases"}
    for row in rows:
        missed = [value for name, value in row.items() if name not in {"trace", "overcommit"}]
        assert row["optimal"] == min(missed)
        assert max(missed) <= 1
        assert row["trace"] != "zipf" or row["s3fifo"] < row["fifo"]
    assert ET.parse(drawn).getroot().tag.endswith("svg")


@pytest.mark.benchmark
def test_many_regions_measures_every_row_and_keeps_the_budget(tmp_path: Path) -> None:
    result = _run(
        "many_regions", "--regions", "1", "50", "--touches", "4000", "--repetitions", "1", "--output", str(tmp_path)
    )

    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "many_regions.json").read_text())
    assert [row["regions"] for row in rows] == [1, 50]
    for row in rows:
        assert 0 < row["resident"] <= 1.01
        assert (len(row["micros"]), row["restarts"]) == (1, 0)
        assert row["faults"][0] > 2000
    assert ET.parse(tmp_path / "many_regions.svg").getroot().tag.endswith("svg")


@pytest.mark.benchmark
@pytest.mark.skipif(os.geteuid() != 0, reason="memory cgroups are made by root; run the tests as root")
def test_out_of_core_measures_every_row_and_leaves_nothing(tmp_path: Path) -> None:
    drawn, figures, made = tmp_path / "drawn.svg", tmp_path / "figures.json", tmp_path / "made"
    made.mkdir()
    before = _orphans()

    result = _run(
        "out_of_core", "--brief", "--json", str(figures), "--plot", str(drawn), "--folder", str(made), TMPDIR=str(made)
    )

    if "no memory cgroup can be made" in result.stderr:
        pytest.skip(result.stderr.strip())
    assert result.returncode == 0, result.stderr
    rows = json.loads(figures.read_text())["rows"]
    variants = {(row["workload"], row["cache"]): set[str]() for row in rows}
    checksums = {key: set[int]() for key in variants}
    for row in rows:
        variants[row["workload"], row["cache"]].add(row["variant"])
        checksums[row["workload"], row["cache"]] |= {run["checksum"] for run in row["runs"]}
        assert (len(row["runs"]), row["failures"]) == (1, [])
        assert row["runs"][0]["peak"] > 0
    two, four = {"ours, 64 KiB", "memmap"}, {"ours, 64 KiB", "ours, 4 KiB", "memmap", "memmap, MADV_RANDOM"}
    expected = {"scan": two | {"ours, 1 MiB"}, "sort": two, "uniform": four, "zipf": four, "change": four}
    assert variants == {(name, cache): expected[name] for name in expected for cache in ("cold", "hot")}
    assert {len(found) for found in checksums.values()} == {1}
    assert ET.parse(drawn).getroot().tag.endswith("svg")
    assert (list(made.iterdir()), _orphans() - before) == ([], set())


@pytest.mark.benchmark
@pytest.mark.skipif(os.geteuid() != 0, reason="memory cgroups are made by root; run the tests as root")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_out_of_core_leaves_nothing_when_it_is_interrupted(tmp_path: Path, number: int, status: int) -> None:
    before = _orphans()
    command = [sys.executable, str(_BENCHMARKS / "out_of_core.py"), "--brief", "--folder", str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as program:
        assert program.stderr is not None
        said = program.stderr.readline()  # the first run begins
        if "no memory cgroup can be made" in said:
            pytest.skip(said.strip())
        program.send_signal(number)
        assert program.wait(60) == status, program.stderr.read()

    assert (list(tmp_path.iterdir()), _orphans() - before) == ([], set())


def _orphans() -> set[str]:
    """Cgroups of benchmarks that have ended."""
    made = {path for top, _ in process.memory_cgroups() for path in glob.glob(f"{top}/userfault-bench-*")}
    return {path for path in made if not Path("/proc", path.rpartition("/")[2].split("-")[2]).exists()}
