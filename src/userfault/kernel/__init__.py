"""Linux as userfault needs it: facts, no policy.

Each operation stands under the name that its manual page gives it, with the errors it may raise. Modules:

* `abi`: every number and structure; `Feature`, `RegisterMode` and the other flag classes.
* `userfaultfd`: the descriptor; opening, registering, resolving, reading. Its first lines say what the kernel
  does.
* `events`: the messages, as typed objects. `fdinfo`: the descriptor's state, from /proc.
* `memory`: mapping, advice, views. `memfd`: files that are memory.
* `pagemap`: what the kernel knows of pages. `maps`: the mappings of a process, and which are registered.
* `process`: processes, their rights and their memory.
* `capabilities`: what this machine offers. `gates`: who refused a userfaultfd, and the remedy.

Names are imported when first used, so that the pager's processes pay for what they need only.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from userfault.kernel import (
        abi,
        capabilities,
        events,
        fdinfo,
        gates,
        maps,
        memfd,
        memory,
        pagemap,
        process,
        userfaultfd,
    )
    from userfault.kernel.abi import (
        ContinueMode,
        CopyMode,
        EventKind,
        FaultFlag,
        Feature,
        Ioctl,
        MoveMode,
        PageCategory,
        PoisonMode,
        RegisterMode,
        ScanFlag,
        Seal,
        WriteProtectMode,
        ZeropageMode,
    )
    from userfault.kernel.capabilities import Capabilities, probe
    from userfault.kernel.events import Event, Fork, PageFault, Remap, Remove, Unknown, Unmap, parse
    from userfault.kernel.fdinfo import FdInfo
    from userfault.kernel.gates import Gate
    from userfault.kernel.maps import MapEntry
    from userfault.kernel.memory import PAGE_SIZE
    from userfault.kernel.pagemap import PageEntry, Pagemap, PageRange, ScanResult
    from userfault.kernel.userfaultfd import Userfaultfd

_HOMES = {
    "abi": (
        "ContinueMode CopyMode EventKind FaultFlag Feature Ioctl MoveMode PageCategory PoisonMode"
        " RegisterMode ScanFlag Seal WriteProtectMode ZeropageMode"
    ),
    "capabilities": "Capabilities probe",
    "events": "Event Fork PageFault Remap Remove Unknown Unmap parse",
    "fdinfo": "FdInfo",
    "gates": "Gate",
    "maps": "MapEntry",
    "memfd": "",
    "memory": "PAGE_SIZE",
    "pagemap": "PageEntry PageRange Pagemap ScanResult",
    "process": "",
    "userfaultfd": "Userfaultfd",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = [
    "PAGE_SIZE",
    "Capabilities",
    "ContinueMode",
    "CopyMode",
    "Event",
    "EventKind",
    "FaultFlag",
    "FdInfo",
    "Feature",
    "Fork",
    "Gate",
    "Ioctl",
    "MapEntry",
    "MoveMode",
    "PageCategory",
    "PageEntry",
    "PageFault",
    "PageRange",
    "Pagemap",
    "PoisonMode",
    "RegisterMode",
    "Remap",
    "Remove",
    "ScanFlag",
    "ScanResult",
    "Seal",
    "Unknown",
    "Unmap",
    "Userfaultfd",
    "WriteProtectMode",
    "ZeropageMode",
    "abi",
    "capabilities",
    "events",
    "fdinfo",
    "gates",
    "maps",
    "memfd",
    "memory",
    "pagemap",
    "parse",
    "probe",
    "process",
    "userfaultfd",
]


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name in _HOMES:
        return import_module(f".{name}", __name__)
    if name in _HOME:
        value: object = getattr(import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
