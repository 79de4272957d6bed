"""Memory whose pages come from somewhere else, at the first touch, on Linux's userfaultfd.

`open_array` opens a file far larger than memory as an ordinary NumPy array; `Region` is the memory beneath it.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from userfault import errors, kernel, protocol, stores
    from userfault.arrays import ArrayRecipe, PagedArray, open_array
    from userfault.blocks import BlockState
    from userfault.blocks.policies import EvictionPolicy
    from userfault.errors import (
        Error,
        KernelError,
        LocalProtocolError,
        PagerLostError,
        ProtocolError,
        RegionClosedError,
        RemoteProtocolError,
        StoreError,
        UnsupportedError,
    )
    from userfault.exported import Exported, UserfaultFD, userfaultfd
    from userfault.interrupts import interruptible
    from userfault.kernel.capabilities import Capabilities, capabilities
    from userfault.pager import Pager, default_pager
    from userfault.protocol import Piece, Reservation, madvise, remap_anon_pages
    from userfault.region import Region
    from userfault.retry import RetryPolicy
    from userfault.stats import Latency, RegionStats
    from userfault.stores import FileStore, MemoryStore, Store

__version__ = "0.1.0"

_HOME = {
    "arrays": ("ArrayRecipe", "PagedArray", "open_array"),
    "blocks": ("BlockState",),
    "blocks.policies": ("EvictionPolicy",),
    "errors": (
        "Error",
        "KernelError",
        "LocalProtocolError",
        "PagerLostError",
        "ProtocolError",
        "RegionClosedError",
        "RemoteProtocolError",
        "StoreError",
        "UnsupportedError",
    ),
    "exported": ("Exported", "UserfaultFD", "userfaultfd"),
    "interrupts": ("interruptible",),
    "kernel.capabilities": ("Capabilities", "capabilities"),
    "pager": ("Pager", "default_pager"),
    "protocol": ("Piece", "Reservation", "madvise", "remap_anon_pages"),
    "region": ("Region",),
    "retry": ("RetryPolicy",),
    "stats": ("Latency", "RegionStats"),
    "stores": ("FileStore", "MemoryStore", "Store"),
}
_ROOMS = {name: room for room, names in _HOME.items() for name in names}

__all__ = [
    "ArrayRecipe",
    "BlockState",
    "Capabilities",
    "Error",
    "EvictionPolicy",
    "Exported",
    "FileStore",
    "KernelError",
    "Latency",
    "LocalProtocolError",
    "MemoryStore",
    "PagedArray",
    "Pager",
    "PagerLostError",
    "Piece",
    "ProtocolError",
    "Region",
    "RegionClosedError",
    "RegionStats",
    "RemoteProtocolError",
    "Reservation",
    "RetryPolicy",
    "Store",
    "StoreError",
    "UnsupportedError",
    "UserfaultFD",
    "__version__",
    "capabilities",
    "default_pager",
    "errors",
    "interruptible",
    "kernel",
    "madvise",
    "open_array",
    "protocol",
    "remap_anon_pages",
    "stores",
    "userfaultfd",
]


def __getattr__(name: str) -> object:
    """Import a public name where it is first used: the pager's processes need few of them, NumPy least of all."""
    if name in _ROOMS:
        value = getattr(importlib.import_module(f"userfault.{_ROOMS[name]}"), name)
    elif name in {"errors", "kernel", "protocol", "stores"}:
        value = importlib.import_module(f"userfault.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
