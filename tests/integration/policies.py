"""Eviction policies of a user's own, for the tests: importable by the pager."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from userfault import EvictionPolicy

if TYPE_CHECKING:
    from collections.abc import Callable


class NewestFirst(EvictionPolicy):
    """Drops the newest."""

    def __init__(self) -> None:
        self.blocks: dict[int, None] = {}

    def admit(self, block: int) -> None:
        self.blocks[block] = None

    def victim(self, used: Callable[[int], bool]) -> int:
        return self.blocks.popitem()[0]

    def remove(self, block: int) -> None:
        self.blocks.pop(block, None)


class Broken(NewestFirst):
    """Does something that it must not, from a certain call on."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.left = 5

    def admit(self, block: int) -> None:
        super().admit(block)
        if self.how == "dies on arrival" and len(self.blocks) > 20:
            os._exit(3)

    def victim(self, used: Callable[[int], bool]) -> int:
        self.left -= 1
        if self.left:
            return super().victim(used)
        if self.how == "hangs":
            time.sleep(1000)  # what the test is about
        if self.how == "dies":
            os._exit(3)
        if self.how == "raises":
            raise ZeroDivisionError("no victim today")
        return {"invents": 1 << 40, "answers text": "x"}[self.how]  # type: ignore[return-value]


class Unborn(NewestFirst):
    """Cannot be made in the pager."""

    def __init__(self) -> None:
        super().__init__()
        self.pid = os.getpid()

    def __setstate__(self, state: object) -> None:
        raise ValueError("not in this process")
