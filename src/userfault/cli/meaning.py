"""What the numbers of a userfaultfd mean, in words: from the records of `descriptors` to sentences.

One look cannot tell a pager that is slow from one that hangs; the sentences say what it is if it stays so.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal, TypeAlias

from userfault.cli import figures
from userfault.kernel.abi import Feature
from userfault.kernel.maps import UFFD_MINOR, UFFD_MISSING, UFFD_WP
from userfault.pager.link import FEATURES
from userfault.protocol.constants import FEATURES as PROTOCOL
from userfault.protocol.constants import GUARD_FEATURES

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from userfault.cli.descriptors import Process, Situation
    from userfault.kernel.fdinfo import FdInfo
    from userfault.kernel.maps import MapEntry

Kind: TypeAlias = Literal["pager", "protocol", "guard", "new", "other"]

KINDS: dict[Kind, str] = {
    "pager": "a userfault pager's, which serves the regions of an application",
    "protocol": "one that speaks the 2014 protocol, made by userfault.userfaultfd()",
    "guard": "userfault's guard of marked memory: a touch there is a SIGBUS, and nobody waits",
    "new": "one without a handshake: nothing can be registered with it yet",
    "other": "another program's",
}
_KINDS_BY_FEATURES: dict[int, Kind] = {FEATURES: "pager", PROTOCOL: "protocol", GUARD_FEATURES: "guard"}
_MODES = {UFFD_MISSING: "missing", UFFD_WP: "write-protected", UFFD_MINOR: "minor"}
_HUGETLB = "ht"  # of the VmFlags line, as those above
_STAYS = "If it is the same when you look again, "
_UNREAD = f"{_STAYS}nobody reads: the pager hangs."
_ALONE = (
    "No other process is seen to hold this userfaultfd, so that a thread of this one must answer, and a thread of "
    "Python cannot while one that waits here holds the GIL: a pager needs a process of its own."
)
_UNREAD_ALONE = f"{_STAYS}nobody reads. {_ALONE}"
_UNANSWERED_ALONE = f"{_STAYS}the pager hangs while it fetches the page. {_ALONE}"
_UNANSWERED_EXPORTED = (
    f"{_STAYS}the program behind the exported descriptor hangs, or has ended: Exported.renew() lets another one begin."
)
_UNANSWERED = (
    f"{_STAYS}the pager hangs while it fetches the pages, or it has died and whoever came after it has not woken the "
    "threads."
)


# -- one descriptor --------------------------------------------------------------------------------------------------


def kind(info: FdInfo) -> Kind:
    """Return whose userfaultfd it looks like; the features are all that /proc tells about that."""
    if not info.initialized:
        return "new"
    # MOVE is asked for where the kernel has it; nothing else depends on the kernel.
    return _KINDS_BY_FEATURES.get(int(info.features & ~Feature.MOVE), "other")


def waiting(info: FdInfo) -> str:
    """Say how many threads wait, and how many of their messages have been read."""
    total, read = info.total, max(info.total - info.pending, 0)  # the kernel counts without a lock
    if not total:
        return "nobody waits"
    waits = f"{figures.count(total, 'thread')} {'waits' if total == 1 else 'wait'}"
    if total == 1:
        return f"{waits}; the pager has {'read' if read else 'not read'} its message"
    return f"{waits}; the pager has read {'all' if read == total else read or 'none'} of their messages"


def advice(info: FdInfo, process: Process, others: Sequence[Process]) -> str:
    """Say what is wrong with a pager whose threads go on waiting; nothing if nobody waits."""
    if not info.total:
        return ""
    stopped = [_stopped(one) for one in (process, *others) if "stop" in one.state]
    if stopped:
        return " ".join(stopped)
    if info.pending:
        return _UNREAD if others else _UNREAD_ALONE
    if not others:
        return _UNANSWERED_ALONE
    exported = kind(info) == "protocol" and any(one.role for one in others)
    return _UNANSWERED_EXPORTED if exported else _UNANSWERED


def _stopped(process: Process) -> str:
    if process.state == "stopped":
        return f"{called(process)} is stopped: kill -CONT {process.pid} lets it go on."
    return f"{called(process)} is stopped by a debugger."


def features(info: FdInfo) -> list[str]:
    """Return the features by name, and those without one in hexadecimal."""
    known = [feature for feature in Feature if feature & info.features]
    unknown = int(info.features) & ~sum(known)
    return [feature.name or "" for feature in known] + ([hex(unknown)] if unknown else [])


def opened(info: FdInfo) -> list[str]:
    """Return how it is open."""
    return [
        "non-blocking" if info.flags & os.O_NONBLOCK else "blocking",
        "close-on-exec" if info.flags & os.O_CLOEXEC else "inherited by programs that are started",
    ]


# -- processes -------------------------------------------------------------------------------------------------------


def called(process: Process) -> str:
    """Return number and name of a process."""
    return f"process {process.pid} ({printable(process.name)})"


def printable(text: str) -> str:
    """Return a text that does nothing to a terminal: others choose their names and their files' names."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def holders(copies: Iterable[int], others: Iterable[Process]) -> str:
    """Say which other descriptors and processes hold a userfaultfd."""
    here = [f"descriptor {fd}" for fd in copies]
    there = [f"{called(one)}, {one.state}" for one in others]
    return "; ".join(here + (there or ["no other process, as far as can be seen"]))


def part(situation: Situation) -> str:
    """Say what follows if the process belongs to a pager of this library; empty if it does not."""
    role = situation.process.role
    if not role:
        return ""
    others = {one.pid: one for descriptor in situation.descriptors for one in descriptor.others}
    served = ", ".join(called(one) for one in others.values() if not one.role)
    return (
        f"It is the {role} of a userfault pager. What it holds belongs to the memory of the application it serves"
        f"{': ' + served if served else ''}; the registered ranges are there."
    )


# -- ranges ----------------------------------------------------------------------------------------------------------


def modes(entry: MapEntry) -> list[str]:
    """Return which pages of a range are reported when they are touched."""
    return [word for flag, word in _MODES.items() if flag in entry.flags]


def memory(entry: MapEntry) -> str:
    """Say what lies beneath a range."""
    name = printable(entry.path) or "anonymous memory"
    return f"{name}, huge pages" if _HUGETLB in entry.flags else name


def ownership(situation: Situation) -> str:
    """Say which userfaultfd the ranges belong to: the kernel does not."""
    descriptors, ranges = situation.registrars, situation.ranges
    if not ranges:
        return _without_ranges(situation)
    if not descriptors:
        return "No descriptor here serves them: another process holds their userfaultfd."
    if len(descriptors) == 1:
        return f"They belong to descriptor {descriptors[0].fd}, the only userfaultfd of the process."
    numbers = ", ".join(str(descriptor.fd) for descriptor in descriptors)
    return f"The kernel does not tell which of them belongs to which userfaultfd: {numbers}."


def _without_ranges(situation: Situation) -> str:
    if not situation.descriptors or situation.process.role:
        return ""
    return (
        "No range of this process is registered. Whoever waits touches the memory of another process, "
        "which has handed its userfaultfd to this one."
    )
