"""What a test of stores, regions and pagers needs; shipped, so that authors of stores can use it too.

* ``stores``: ``StoreTests``, a conformance kit: subclass it, and pytest checks your store against all that
  ``Store`` promises. Needs pytest.
* ``patterns``: stores whose bytes follow from their offset, up to any size, and one that counts its reads.
* ``misbehaving``: stores that are slow, stall, fail, crash, lie, or hold the GIL.
* ``reading``: ``read_bytes``, and ``read_elsewhere`` in another process.
* ``child``: ``run_child``, for whatever may hang or crash.   * ``leaks``: ``no_leaks``.
* ``toucher``: reading and writing memory by address with the GIL released.

The stores work in the pager: they are importable, travel by pickle, and say what they did through files.
Nothing of userfault imports this package.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .child import ChildError, ChildResult, ChildTimeoutError, run_child
    from .leaks import no_leaks
    from .misbehaving import (
        CrashingStore,
        FailingStore,
        GilHoldingStore,
        LyingSizeStore,
        RefusingStore,
        ShortStore,
        SlowStore,
        StallingStore,
        UnpicklableStore,
        WrongErrorStore,
    )
    from .patterns import CountingStore, PatternStore
    from .reading import read_bytes, read_elsewhere
    from .stores import StoreTests
    from .toucher import poke, touch

_HOMES = {
    "child": "ChildError ChildResult ChildTimeoutError run_child",
    "leaks": "no_leaks",
    "misbehaving": (
        "CrashingStore FailingStore GilHoldingStore LyingSizeStore RefusingStore ShortStore SlowStore StallingStore"
        " UnpicklableStore WrongErrorStore"
    ),
    "patterns": "CountingStore PatternStore",
    "reading": "read_bytes read_elsewhere",
    "stores": "StoreTests",
    "toucher": "poke touch",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = [
    "ChildError",
    "ChildResult",
    "ChildTimeoutError",
    "CountingStore",
    "CrashingStore",
    "FailingStore",
    "GilHoldingStore",
    "LyingSizeStore",
    "PatternStore",
    "RefusingStore",
    "ShortStore",
    "SlowStore",
    "StallingStore",
    "StoreTests",
    "UnpicklableStore",
    "WrongErrorStore",
    "no_leaks",
    "poke",
    "read_bytes",
    "read_elsewhere",
    "run_child",
    "touch",
]


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
