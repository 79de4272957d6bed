"""The worker dies between two steps of a write-back: afterwards memory, file and states are right."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.crash.test_transitions import MANY, TIMES, die

if TYPE_CHECKING:
    from pathlib import Path

    from tests.crash.conftest import Start

WRITER, SOURCE, SERVED = "userfault.pager.writer", "userfault.pager.source.Source", "userfault.pager.served.Served"
STEPS = {
    "FLUSHING is written, nothing protected": (f"{WRITER}.Writer._protect", "before"),
    "half of it is protected": (f"{WRITER}.Writer._protect", "half"),
    "protected, not copied out": (f"{WRITER}.Writer._protect", "after"),
    "copied out, not released": (f"{WRITER}._read_all", "after"),
    "released, not handed to the store": (f"{SOURCE}.write", "before"),
    "half of it is in the store": (f"{SOURCE}.write", "half"),
    "in the store, still FLUSHING": (f"{SOURCE}.write", "after"),
    "CLEAN is written for a part of the run": (f"{WRITER}.Writer._settle", "after"),
    "all is CLEAN, not durable": (f"{SOURCE}.flush", "before"),
    "durable, nobody told": (f"{SOURCE}.flush", "after"),
    "EVICTING is written, no hole": ("userfault.kernel.memfd.punch_hole", "before r+"),
    "half of the hole": ("userfault.kernel.memfd.punch_hole", "half r+"),
    "a hole, not ABSENT": ("userfault.kernel.memfd.punch_hole", "after r+"),
    "a write fault is read, not DIRTY": (f"{SERVED}._note_write", "before"),
    "DIRTY is written, no access given": (f"{SERVED}._note_write", "after"),
    "access is given, nobody told": (f"{SERVED}.give_write_access", "after"),
}
OWN = ("protected, not copied out", "half of it is in the store", "all is CLEAN, not durable", "half of the hole")
"""Where a store of the user's own is tried too."""


@pytest.mark.parametrize(("kind", "step"), [*(("file", step) for step in STEPS), *(("own", step) for step in OWN)])
def test_between_steps_of_a_write_back(start: Start, tmp_path: Path, kind: str, step: str) -> None:
    die(start, tmp_path, kind, *STEPS[step], TIMES, program="flushes.run")


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["file", "own"])
@pytest.mark.parametrize("step", STEPS)
def test_again_and_again(start: Start, tmp_path: Path, kind: str, step: str) -> None:
    die(start, tmp_path, kind, *STEPS[step], MANY, program="flushes.run")
