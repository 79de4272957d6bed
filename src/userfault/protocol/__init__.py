"""The userfault protocol of 2014: a range of memory marked for user faults, and a descriptor to read, write and poll.

The proposal of July 2014, its second version of October, and what the review asked for.  The manual's page
`protocol.md` says what it is, what differs from the mails and why.

* `states`, `messages`, `connection`: the conversation as a table and a machine, without any system call.
* `descriptor`: `Descriptor`, the machine over a kernel userfaultfd. (`userfault.UserfaultFD` adds `export` to it.)
* `advice`: `madvise`. `remap`: `remap_anon_pages`. `reservation`: `Reservation`.
* `marks`, `ranges`, `holes`, `verdicts`: which memory is marked, how it changes hands without a zero in between, and
  why a range is refused. `waiting`: for a fault, in both modes.

The constants are here under the names of the mails.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from userfault.protocol.advice import madvise
    from userfault.protocol.connection import Connection, Written
    from userfault.protocol.constants import (
        MADV_NOUSERFAULT,
        MADV_USERFAULT,
        RAP_ALLOW_SRC_HOLES,
        UFFD_CLOEXEC,
        UFFD_NONBLOCK,
        USERFAULTFD_PROTOCOL,
        USERFAULTFD_RANGE_MASK,
        USERFAULTFD_RANGE_REGISTER,
        USERFAULTFD_RANGE_UNREGISTER,
        USERFAULTFD_UNKNOWN_PROTOCOL,
        Advice,
    )
    from userfault.protocol.descriptor import Descriptor
    from userfault.protocol.messages import Acknowledgement, Fault, Refusal, Register, Unregister, Version, Wake
    from userfault.protocol.remap import remap_anon_pages
    from userfault.protocol.reservation import Piece, Reservation
    from userfault.protocol.states import State, Step

_HOMES = {
    "advice": "madvise",
    "connection": "Connection Written",
    "constants": (
        "Advice MADV_NOUSERFAULT MADV_USERFAULT RAP_ALLOW_SRC_HOLES UFFD_CLOEXEC UFFD_NONBLOCK USERFAULTFD_PROTOCOL"
        " USERFAULTFD_RANGE_MASK USERFAULTFD_RANGE_REGISTER USERFAULTFD_RANGE_UNREGISTER USERFAULTFD_UNKNOWN_PROTOCOL"
    ),
    "descriptor": "Descriptor",
    "messages": "Acknowledgement Fault Refusal Register Unregister Version Wake",
    "remap": "remap_anon_pages",
    "reservation": "Piece Reservation",
    "states": "State Step",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = [
    "MADV_NOUSERFAULT",
    "MADV_USERFAULT",
    "RAP_ALLOW_SRC_HOLES",
    "UFFD_CLOEXEC",
    "UFFD_NONBLOCK",
    "USERFAULTFD_PROTOCOL",
    "USERFAULTFD_RANGE_MASK",
    "USERFAULTFD_RANGE_REGISTER",
    "USERFAULTFD_RANGE_UNREGISTER",
    "USERFAULTFD_UNKNOWN_PROTOCOL",
    "Acknowledgement",
    "Advice",
    "Connection",
    "Descriptor",
    "Fault",
    "Piece",
    "Refusal",
    "Register",
    "Reservation",
    "State",
    "Step",
    "Unregister",
    "Version",
    "Wake",
    "Written",
    "madvise",
    "remap_anon_pages",
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
