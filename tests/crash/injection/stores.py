"""A store that lets the first process that reads one of its blocks die, and no other."""

from __future__ import annotations

import os

from userfault.testing import PatternStore


class OnceCrashingStore(PatternStore):
    """As `PatternStore`, but for the first read of one offset.

    Args:
        size: Bytes.
        bad: The offset.
        path: A file that is there as soon as somebody has died.
    """

    def __init__(self, size: int, bad: int, path: str) -> None:
        super().__init__(size)
        self.bad, self.path = bad, path

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """End the process, or compute the bytes."""
        if offset <= self.bad < offset + buffer.nbytes and not os.path.exists(self.path):
            os.close(os.open(self.path, os.O_CREAT | os.O_CLOEXEC))
            os._exit(3)
        super().read_into(offset, buffer)
