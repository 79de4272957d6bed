"""The worker: the process that fills blocks.

Two threads run for as long as it lives: the fault loop (the main thread, so that placement moves just it) and the
control thread.  Readers come and go.  It begins by taking over whatever its will names: for the first worker nothing,
for a later one every region, from the ledgers.
"""

from __future__ import annotations

import os
import sys

from userfault.kernel.userfaultfd import Userfaultfd
from userfault.pager import placement
from userfault.pager.control import Control
from userfault.pager.faults import FaultLoop
from userfault.pager.placement import Placement
from userfault.pager.recovery import recover
from userfault.pager.served import Served
from userfault.shield import begin

TYPE_CHECKING = False
if TYPE_CHECKING:
    from userfault.pager.spawn import Will

SWITCH_INTERVAL_S = 0.0002
"""How long a reader's Python code may keep the fault loop from running (CPython's default is 5 ms)."""


def run(will: Will) -> None:
    """The worker's life."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    placement.settle(will["pid"])
    uffd = Userfaultfd(will["uffd"], features=will["features"])
    loop = FaultLoop(uffd, Placement(will["pid"]))
    control = Control(will, uffd, loop)
    control.fellow.introduce()
    for _, fd in will["regions"]:
        take_over(fd, uffd, control)
    for _, fds in will["exports"]:
        control.exports.adopt(tuple(fds), again=True)
    begin(lambda: live(control))
    loop.run()


def take_over(fd: int, uffd: Userfaultfd, control: Control) -> None:
    """Serve a region that a dead worker served."""
    region = Served(fd, uffd, again=True)
    recover(region)
    control.adopt(region)


def live(control: Control) -> None:
    """Run the control thread; its end is the process's."""
    code = 1
    try:
        control.run()
        code = 0
    except BaseException as error:  # noqa: BLE001  # die visibly: the supervisor starts another worker
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        os._exit(code)
