"""Scenes of a region that is written back to its file: whatever fails, no change is lost."""

from __future__ import annotations

import os
import signal
from functools import partial
from typing import TYPE_CHECKING

from tests.crash.injection.region_scenes import EXPECTED, SIZE
from tests.crash.injection.trial import own
from tests.crash.programs.common import BLOCK, PAGE

from userfault.stores import FileStore

if TYPE_CHECKING:
    from tests.crash.injection.trial import Trial

    import userfault


class Written:
    """A region, its file, and what both should hold."""

    def __init__(self, trial: Trial) -> None:
        self.trial, self.path, self.model = trial, f"{trial.folder}/written", bytearray(EXPECTED)
        with own():
            self._put_down(self.path, EXPECTED)

    @staticmethod
    def _put_down(path: str, content: bytes) -> None:
        with open(path, "wb") as file:
            file.write(content)

    def store(self) -> FileStore:
        return FileStore(self.path, writable=True)

    def change(self, region: userfault.Region, data: bytes) -> None:
        """Write to each block; more blocks than the budget holds, so that some are written back at once."""
        for at in range(PAGE - 2, SIZE, BLOCK):
            region.memory[at : at + len(data)] = data
            self.model[at : at + len(data)] = data

    def check_memory(self, name: str, region: userfault.Region) -> None:
        with self.trial.step(f"read {name}"):
            self.trial.check(name, bytes(region.memory), bytes(self.model))

    def check_file(self, name: str, path: str = "") -> None:
        with own(), open(path or self.path, "rb") as file:
            found = file.read()
        self.trial.check(f"the file after {name}", found, bytes(self.model))

    def save(self, region: userfault.Region, path: str) -> None:
        """Save to another file, which may be what cannot be written."""
        with self.trial.step("save"):
            try:
                region.save(path)
            except OSError as error:
                self.trial.errors.append(f"save: {error}")
            else:
                self.check_file("save", path)

    def end(self, region: userfault.Region) -> None:
        """Flush and close, however often that has to be asked for: errors lose nothing."""
        for name, action in (("flush at last", region.flush), ("close at last", region.close)):
            if self.trial.do(name, action):
                self.check_file(name)


def write_back(trial: Trial) -> None:
    """Change, flush, evict, read, change, save, flush, close."""
    written = Written(trial)
    for region in trial.region("written", written.store, "r+", blocks=8):
        written.change(region, b"first")
        with trial.step("flush"):
            region.flush()
            written.check_file("flush")
        with trial.step("evict"):
            region.evict()
        written.check_memory("evicted", region)
        written.change(region, b"again")
        written.save(region, f"{trial.folder}/saved")
        written.check_memory("changed", region)
        written.end(region)


def kill_writer(trial: Trial) -> None:
    """Have the worker die while there are changes: its successor writes them back."""
    written = Written(trial)
    for region in trial.region("written", written.store, "r+", blocks=20):
        written.change(region, b"first")
        with own():
            dead = region.pager.worker_pid
            os.kill(dead, signal.SIGKILL)
        with trial.step("flush"):
            region.flush()
            written.check_file("flush")
        written.change(region, b"again")
        written.check_memory("changed", region)
        with own():
            trial.until("a successor", partial(_has_successor, region.pager, dead))
        written.end(region)


def _has_successor(pager: userfault.Pager, dead: int) -> bool:
    return pager.closed or pager.worker_pid != dead
