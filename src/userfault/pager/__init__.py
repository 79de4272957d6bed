"""The process that answers faults: a supervisor and its worker, and the application's side of them.

The application's side: `client` (what users hold), `link` (the connection), `mapping` (a region's memory), `lifeline`.
The two processes: `supervisor` and `worker`, with `wire` for what all of them say to each other, `spawn` and `boot` for
how they come to be, `recipe` for how a store travels.

The worker's parts: `faults` (the loop), `served` (a region as the worker sees it), `pool` (reads that may wait),
`evict` (the budget), `poison` and `failure`, `placement` (which core), `counters`, and `control` (requests).
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from userfault.pager.client import Pager, default_pager

__all__ = ["Pager", "default_pager"]


def __getattr__(name: str) -> object:
    """Import the application's side only where it is used: the pager's processes do without it."""
    if name in __all__:
        from userfault.pager import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
