"""The worker dies between a state and the kernel call that goes with it: afterwards everything is right."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from tests.crash.conftest import Start

IOCTL = "userfault.kernel.userfaultfd.ioctl"
PUNCH = "userfault.kernel.memfd.punch_hole"
SEND = "userfault.pager.wire.send"
MADE_OF = [
    *((IOCTL, f"{when} UFFDIO_COPY") for when in ("before", "half", "after")),
    *((IOCTL, f"{when} UFFDIO_{call}") for call in ("WAKE", "WRITEPROTECT", "POISON") for when in ("before", "after")),
    *((PUNCH, when) for when in ("before", "half", "after")),
]
MESSAGES = [
    (SEND, f"{when} {kind}") for kind in ("OK", "FAILED", "KEEP", "DROP", "PROGRESS") for when in ("before", "after")
]
KINDS = ("file", "hot", "at hand", "inline", "pool")
EVERYTHING = [
    (kind, function, moment)
    for kind in KINDS
    for function, moment in (*MADE_OF, *MESSAGES)
    if kind != "file" or not {"UFFDIO_POISON", "FAILED"} & set(moment.split())  # a file's blocks do not fail here
]
# A file at every point; readers where that differs, and around each message.
CHOSEN = [
    (kind, function, moment)
    for kind, function, moment in EVERYTHING
    if (kind == "file" and (function, moment) in MADE_OF)
    or (kind == "pool" and ("COPY" in moment or "POISON" in moment or function != IOCTL))
]
TIMES, MANY = 3, 20
"""Deaths of one kind in one run: every other call ends the worker, so that it always gets something done as well."""


def die(
    start: Start,
    tmp_path: Path,
    kind: str,
    function: str,
    moment: str,
    times: int,
    *,
    program: str = "transitions.run",
) -> None:
    with start(program, kind, (function, moment, times), str(tmp_path), limit=60) as victim:
        (deaths,) = victim.expect("over")
        victim.end().check()
    assert 0 < deaths <= times


@pytest.mark.parametrize(("kind", "function", "moment"), CHOSEN)
def test_between_state_and_kernel(start: Start, tmp_path: Path, kind: str, function: str, moment: str) -> None:
    die(start, tmp_path, kind, function, moment, TIMES)


@pytest.mark.soak
@pytest.mark.parametrize(("kind", "function", "moment"), EVERYTHING)
def test_again_and_again(start: Start, tmp_path: Path, kind: str, function: str, moment: str) -> None:
    die(start, tmp_path, kind, function, moment, MANY)
