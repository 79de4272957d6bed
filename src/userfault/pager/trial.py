"""Reading a block that may kill its reader: in a process of its own.

When two workers have died while they were in a store of the user's own for the same block, that block is a suspect.  A
third worker that read it might die as well, with the faults of every region.  So a suspect is read by a process that
does nothing else: it makes the store from the region's recipe, writes the block into a memfd, and ends.  What it cannot
do is harm: if it dies, that was the third strike, and the block fails.

Many suspects are innocent (somebody killed the workers, or another block did): they are read, a twentieth of a second
later than otherwise, and suspected no more.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal

from userfault.blocks.ledger import Ledger
from userfault.errors import StoreError
from userfault.kernel import memfd, process
from userfault.pager import failure, recipe, spawn
from userfault.pager.filling import fill
from userfault.shield import begin

TYPE_CHECKING = False
if TYPE_CHECKING:
    from userfault.pager.spawn import Will

STRIKES = 3
"""Processes that may die of a block, the first two of them workers."""
GOOD, BAD = 0, 2
"""Exit statuses: the memfd holds the block; it holds an error."""
_ROOM = 16 << 10
"""Bytes for the error."""
_BEGUN = b"\1"
"""The last byte of the memfd, from when the store is asked: a process that could not even start proves nothing."""


def read(region: int, block: int, view: memoryview, timeout_ns: int) -> None:
    """Have a process of its own read a block of a region into `view`. Called by a reader of the worker.

    Args:
        region: The region's memfd.
        block: Which block.
        view: Where the bytes go.
        timeout_ns: How long it may take, in nanoseconds; 0: as long as it likes.

    Raises:
        StoreError: as the store says; or if this process has died as well.
    """
    mark = max(len(view), _ROOM)
    buffer = memfd.create("userfault-trial", mark + 1)
    try:
        status = _attempt(region, block, buffer, timeout_ns)
        if status == GOOD:
            os.preadv(buffer, [view], 0)
            return
        if status == BAD:
            raise failure.decode(os.pread(buffer, _ROOM, 0))
        if os.pread(buffer, 1, mark) != _BEGUN:
            raise StoreError("the process that was to read it did not come to that", cause=_death(status))
    finally:
        os.close(buffer)
    cause = f"the last one {_death(status)}"
    raise StoreError(f"{STRIKES} processes died while they read it", attempts=STRIKES, cause=cause, permanent=True)


def _attempt(region: int, block: int, buffer: int, limit: int) -> int:
    """Run one process; return its status as `waitstatus_to_exitcode` does."""
    own = process.pidfd_open(os.getpid())
    will = {"region": region, "buffer": buffer, "worker": own, "block": block}
    try:
        pid = spawn.start_successor(spawn.TRIAL, will)
    finally:
        os.close(own)
    watch = process.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(watch, select.POLLIN)
        if not poll.poll(limit // 1_000_000 if limit else None):
            process.pidfd_send_signal(watch, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise StoreError("the read did not return in time", cause=f"timeout of {limit / 1e9:g} s")
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        os.close(watch)


def _death(status: int) -> str:
    if status >= 0:
        return f"ended with exit status {status}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-status).name}"
    return f"was killed by signal {-status}"


# -- the process ---------------------------------------------------------------------------------------------


def run(will: Will) -> None:
    """Read one block, and end; earlier if the worker ends."""
    begin(lambda: _work(will))
    poll = select.poll()
    poll.register(will["worker"], select.POLLIN)
    poll.poll()


def _work(will: Will) -> None:
    code = GOOD
    try:
        _read(will)
    except BaseException as error:  # noqa: BLE001  # whatever the store raises
        os.pwrite(will["buffer"], failure.encode(error, _ROOM), 0)
        code = BAD
    os._exit(code)


def _read(will: Will) -> None:
    os.pwrite(will["buffer"], _BEGUN, os.fstat(will["buffer"]).st_size - 1)
    ledger = Ledger.attach(will["region"])
    offset, length = ledger.geometry.span(will["block"])
    store = recipe.load(ledger.recipe, ledger.geometry.size)
    data = memoryview(bytearray(length))
    fill(store, offset, data)
    os.pwrite(will["buffer"], data, 0)
