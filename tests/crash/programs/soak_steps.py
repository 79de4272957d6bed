"""What a thread of the soak does: one step after the other, each at random, each checked."""

from __future__ import annotations

import os
import pickle
import random
import tempfile
import zlib
from typing import TYPE_CHECKING

import numpy as np
from tests.crash.programs.common import PAGE, preadv_all
from tests.crash.programs.soak_patches import STUBBORN, WRITABLE, Patch

import userfault

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.crash.programs.soak_tally import Tally

LENGTHS = (1, 8, 1000, PAGE, 3 * PAGE, 65536, 65536, 300_000)
FRESH = 0.01
"""The share of steps that open a region of their own."""


class Walker:
    """One thread's way through the patches."""

    def __init__(self, patches: Sequence[Patch], seed: int, tally: Tally) -> None:
        self._patches = patches
        self._rng = random.Random(seed)
        self._tally = tally
        self._scratch = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the thread
        self._source = self._scratch.fileno()
        self._is_privileged = not patches[0].region.pager.user_mode_only
        self._asks = {
            "pinned": self._pin,
            "ensure": self._ensure,
            "prefetch": self._prefetch,
            "evict": self._evict,
            "stats": self._look,
        }
        self._ways = [*self._asks, *(way for way in READS if self._is_privileged or way not in SYSTEM_CALLS)]

    def step(self) -> None:
        """Do one thing."""
        if self._rng.random() < FRESH:
            with self._tally.timed("fresh region"):
                self._open_fresh()
            return
        patch = self._rng.choice(self._patches)
        if patch.kind.mode == "r":
            (self._try_fickle if patch.kind.fickle else self._use)(patch)
        elif patch.turn.acquire(blocking=False):
            try:
                (self._change if self._rng.random() < 0.5 else self._use)(patch)
            finally:
                patch.turn.release()

    def check_all(self, patch: Patch) -> None:
        """Read all of a patch, from its store where possible, and compare; heal what has failed."""
        patch.region.evict()
        step = patch.kind.block_size
        for start in range(0, len(patch.truth), step):
            while patch.kind.fickle and not self._settle(patch, start, min(step, len(patch.truth) - start)):
                pass
            if not patch.kind.fickle:
                self._compare(patch, "slice", start, min(start + step, len(patch.truth)))

    # -- reading ---------------------------------------------------------------------------------------------

    def _use(self, patch: Patch) -> None:
        what = self._rng.choice(self._ways)
        start, stop = self._range(patch)
        with self._tally.timed(what, patch.name):
            if what in self._asks:
                self._asks[what](patch, start, stop)
            else:
                self._compare(patch, what, start, stop)

    def _range(self, patch: Patch) -> tuple[int, int]:
        start = self._rng.randrange(len(patch.truth))
        return start, min(start + self._rng.choice(LENGTHS), len(patch.truth))

    def _compare(self, patch: Patch, what: str, start: int, stop: int) -> None:
        due = patch.truth[start:stop]
        if what == "every page":
            due = due[::PAGE]
        got = READS[what](patch.memory[start:stop])
        if what == "checksum":
            due = bytearray(zlib.crc32(due).to_bytes(4, "little"))
            self._tally.bytes += stop - start - 4
        self._tally.check(patch, what, start, got, due)

    def _pin(self, patch: Patch, start: int, stop: int) -> None:
        """Nothing drops what is pinned; who asks for too much at once is told so."""
        stop = min(stop, start + patch.kind.block_size)
        try:
            with patch.region.pinned(start, stop - start) as view:
                patch.region.evict(start, stop - start)
                self._tally.check(patch, "pinned", start, bytes(view), patch.truth[start:stop])
        except ValueError:
            self._tally.counts["refused"] += 1

    def _ensure(self, patch: Patch, start: int, stop: int) -> None:
        stop = min(stop, start + patch.kind.block_size)
        try:
            patch.region.ensure(start, stop - start)
        except ValueError:
            self._tally.counts["refused"] += 1
        self._compare(patch, "slice", start, stop)

    def _prefetch(self, patch: Patch, start: int, stop: int) -> None:
        patch.region.prefetch(start, stop - start, wait=self._rng.random() < 0.5)
        self._compare(patch, "slice", start, stop)

    def _evict(self, patch: Patch, start: int, stop: int) -> None:
        if self._rng.random() < 0.2:
            patch.region.evict()
        else:
            patch.region.evict(start, stop - start)

    def _look(self, patch: Patch, start: int, stop: int) -> None:
        stats, states = patch.region.stats(), patch.region.residency()
        if len(states) != patch.kind.blocks or stats.resident_bytes > len(patch.truth):
            self._tally.complain(f"{patch.name}: {len(states)} states, {stats}")

    # -- blocks that fail ------------------------------------------------------------------------------------

    def _try_fickle(self, patch: Patch) -> None:
        start, stop = self._range(patch)
        stop = min(stop, start + patch.kind.block_size)
        with self._tally.timed("fickle store", patch.name):
            if self._rng.random() < 0.2:
                self._evict(patch, start, stop)
            elif self._rng.random() < 0.3 and self._is_privileged:
                self._send_fickle(patch, start, stop)
            else:
                self._settle(patch, start, stop - start)

    def _settle(self, patch: Patch, start: int, length: int) -> bool:
        """Read a range while it is pinned, asking again for what has failed; return whether that went well."""
        try:
            with patch.region.pinned(start, length) as view:
                self._tally.check(patch, "pinned", start, bytes(view), patch.truth[start : start + length])
                return True
        except ValueError:
            self._tally.counts["refused"] += 1
        except userfault.StoreError:
            self._tally.counts["ranges failed"] += 1
            self._heal(patch, start, length)
        return False

    def _heal(self, patch: Patch, start: int, length: int) -> None:
        try:
            patch.region.retry(start, length)
            self._tally.counts["ranges healed"] += 1
        except userfault.StoreError:
            self._tally.counts["ranges failed again"] += 1

    def _send_fickle(self, patch: Patch, start: int, stop: int) -> None:
        """A system call meets the block: EFAULT if it has failed, and never a wrong byte."""
        try:
            self._tally.check(patch, "pipe", start, _through_a_pipe(patch.memory[start:stop]), patch.truth[start:stop])
        except OSError:
            self._tally.counts["system calls failed"] += 1
            self._heal(patch, start, stop - start)

    # -- changing --------------------------------------------------------------------------------------------

    def _change(self, patch: Patch) -> None:
        what = self._rng.choices(("write", "preadv", "private", "reopen"), (30, 20 * self._is_privileged, 10, 1))[0]
        with self._tally.timed(what, patch.name):
            if what == "reopen":
                patch.reopen()
                return
            start, stop = self._writable(patch)
            if what == "private":
                patch.region.ensure(start, stop - start, write=True)
                return
            data = self._rng.randbytes(stop - start)
            if what == "write":
                patch.memory[start:stop] = data
            else:
                os.pwrite(self._source, data, 0)
                preadv_all(self._source, patch.memory[start:stop])
            patch.truth[start:stop] = data

    def _writable(self, patch: Patch) -> tuple[int, int]:
        block = self._rng.randrange(0, patch.kind.blocks - 1, WRITABLE)
        start = block * patch.kind.block_size + self._rng.randrange(patch.kind.block_size)
        return start, min(start + self._rng.choice(LENGTHS), (block + 1) * patch.kind.block_size)

    # -- regions that come and go ----------------------------------------------------------------------------

    def _open_fresh(self) -> None:
        patch = self._rng.choice([patch for patch in self._patches if patch.kind.mode == "r" and not patch.kind.fickle])
        start, stop = self._range(patch)
        if start % 2:
            region = pickle.loads(pickle.dumps(patch.region))
        else:
            region = userfault.Region(patch.store, "rc"[start % 4 // 2], PAGE, 64 * PAGE, retry_policy=STUBBORN)
        view = region.memory
        self._tally.check(patch, "fresh region", start, bytes(view[start:stop]), patch.truth[start:stop])
        if self._rng.random() < 0.5:
            region.owned_by_views()
        else:
            view.release()
            region.close()


def _through_a_pipe(view: memoryview) -> bytes:
    reader, writer = os.pipe()
    received = bytearray()
    try:
        while len(received) < len(view):
            sent = os.write(writer, view[len(received) : len(received) + 65536])  # what a pipe holds
            received += os.read(reader, sent)
    finally:
        os.close(reader)
        os.close(writer)
    return bytes(received)


def _through_a_file(view: memoryview) -> bytes:
    with tempfile.TemporaryFile(buffering=0) as file:
        sent = 0
        while sent < len(view):
            sent += os.pwrite(file.fileno(), view[sent:], sent)
        return os.pread(file.fileno(), len(view), 0)


READS: dict[str, Callable[[memoryview], bytes]] = {
    "slice": bytes,
    "numpy": lambda view: np.frombuffer(view, np.uint8).copy().tobytes(),
    "every page": lambda view: bytes(view[::PAGE]),
    "checksum": lambda view: zlib.crc32(view).to_bytes(4, "little"),
    "pipe": _through_a_pipe,
    "file": _through_a_file,
}
"""Ways to read memory. Those in the kernel take a privileged userfaultfd."""
SYSTEM_CALLS = ("pipe", "file")
