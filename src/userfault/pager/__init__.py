"""The process that answers faults: a supervisor and its worker, and the application's side of them.

`client` is the application's side; `supervisor` and `worker` are the two processes; `wire` is what they say to each
other, `spawn` how they come to be.  The worker is made of `faults` (the loop), `served` (a region as the worker sees
it), `pool` (reads that may wait), `evict` (the budget), `placement` (which core) and `control` (requests).
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
