"""What tests of regions look at, and how they wait for it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from userfault import BlockState, Region

if TYPE_CHECKING:
    from collections.abc import Callable


def resident(region: Region) -> list[int]:
    """The blocks that are not absent."""
    return [block for block, state in enumerate(region.residency()) if state != BlockState.ABSENT]


def await_true(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait until something becomes true that nobody tells of."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never became true"
        time.sleep(0.002)
