"""The end of the application: what it has changed must not go with it."""

from __future__ import annotations

import functools

from userfault.latch import Latch
from userfault.pager import failure, wire
from userfault.pager.wire import Message

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from userfault.pager.fellow import Fellow
    from userfault.pager.served import Served
    from userfault.pager.writeback import WriteBack

BEAT_S = 0.5


def write_all_back(regions: Iterable[Served], fellow: Fellow) -> None:
    """Write the changes of all regions to their stores; the supervisor hears that we still do."""
    for region in regions:
        if region.writeback is not None:
            _write_back(region, region.writeback, fellow)


def _write_back(region: Served, writeback: WriteBack, fellow: Fellow) -> None:
    done = Latch()

    def ended(error: bytes | None) -> None:
        if error is not None:
            failure.report(f"{failure.decode(error)}; changes are lost, since the application has ended")
        done.set()

    patience = region.source.retries.patience_ns()
    region.on_settled = functools.partial(fellow.tell, Message(wire.WRITING, a=patience))
    region.on_settled()
    writeback.flush(ended)
    while not done.wait(BEAT_S):
        fellow.beat()
