"""Ten times what the budget holds, changed at random by sixteen threads: all is in the file, and memory holds.

The long form is an hour, of 2.5 GiB with a budget of 256 MiB (`USERFAULT_OVERCOMMIT_S` says how many seconds instead).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from tests.crash.test_kills import Killer

if TYPE_CHECKING:
    import random
    from pathlib import Path

    from tests.crash.conftest import Report, Start

SHORT = 16 << 20, 4.0
LONG = 256 << 20, float(os.environ.get("USERFAULT_OVERCOMMIT_S", "3600"))


@pytest.mark.parametrize("kills", [False, True], ids=["undisturbed", "killed"])
def test_sixteen_threads_on_ten_times_the_budget(
    start: Start, rng: random.Random, tmp_path: Path, report: Report, soak: bool, kills: bool
) -> None:
    budget, seconds = LONG if soak else SHORT
    path = tmp_path / "data"
    with path.open("wb") as file:
        file.truncate(10 * budget)
    with start("overcommit.add", str(path), 16, f"{budget}", seconds, limit=seconds * 1.5 + 120) as victim:
        victim.expect("ready")
        if kills:
            killer = Killer(victim, rng)
            for _ in range(max(6, int(seconds / 10))):
                killer.kill("worker")
        assert victim.expect("wrong") == [0]
        memory, resident, limit = victim.expect("memory")
        additions, faults, evictions, refaults = victim.expect("did")
        written, slowest = victim.expect("wrote")
        assert victim.expect("different") == [0]
        victim.end().check()
    how = "with kills" if kills else "undisturbed"
    report(
        f"overcommit, {how}: {seconds:g} s, {10 * budget >> 20} MiB in {budget >> 20}",
        f"additions {additions:,}, faults {faults:,}, evictions {evictions:,}, refaults {refaults:,}",
        f"written {written >> 20} MiB, 99 % of the writes within {slowest} µs",
        f"most memory, all processes: {memory / limit:.3f} of the budget; blocks alone: {resident / limit:.3f}",
    )
    assert resident <= limit
    assert memory <= 1.1 * limit + (8 << 20), "8 MiB: buffers of threads that write, whatever the budget"
    assert evictions > 0
