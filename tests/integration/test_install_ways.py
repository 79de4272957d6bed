"""The benchmark of the ways to install a block runs, and each way brings in the right bytes. Figures are not judged."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "install_ways.py"


@pytest.mark.benchmark
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler: the touching loop cannot be built")
def test_install_ways_measures_every_way_and_writes_its_figures(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "faulthandler", "-W", "error", str(_BENCHMARK)]
    result = subprocess.run(
        [*command, "--quick", "--output", str(tmp_path)], capture_output=True, text=True, timeout=170, check=False
    )

    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "install_ways.json").read_text())["rows"]
    ways = {"copy-mapping", "copy-staging", "continue-preadv", "continue-pwrite"}
    for order in ("shuffled", "sequential", "bulk"):
        expected = ways | ({"continue-filled"} if order == "bulk" else set())
        for block in (4096, 65536, 2 << 20):
            found = [row for row in rows if (row["order"], row["block"]) == (order, block)]
            assert {row["pager"] for row in found} == expected
            assert {len(row["nanoseconds"]) for row in found} == {1}
    assert "placement: toucher and worker both pinned" in result.stdout
    for way in ways:
        assert result.stdout.count(f"| {way} |") == 9
