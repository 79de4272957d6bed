"""The states of a conversation and the transitions between them, as one table.

The table is the law: `Connection` asks it, the manual's diagram is drawn from it, and a test walks it.  A step that is
not in it is EINVAL.  (What is written in ASK_PROTOCOL is a version, whatever it was meant to be.)

One line differs from the code that was posted: it had no answer to a write while a refusal was unread, and stopped the
machine (`BUG_ON`).  Here that is EINVAL, as it was in the state beside it.
"""

from __future__ import annotations

import select
from enum import Enum, IntEnum

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Final


class State(IntEnum):
    """Where a conversation stands. The names are the proposal's."""

    ASK_PROTOCOL = 0
    """Nobody has asked for a version yet, or the last one was refused and the refusal has been read."""
    ACK_PROTOCOL = 1
    """A known version was asked for; the acknowledgement waits to be read."""
    ACK_UNKNOWN_PROTOCOL = 2
    """Another one was asked for; the refusal waits to be read."""
    RUNNING = 3
    """Addresses are read, ranges are written. For one pager there is no way back."""


class Step(Enum):
    """What the pager can do to a conversation."""

    KNOWN = "write a known version"
    UNKNOWN = "write any other"
    READ = "read 8 bytes"
    RANGE = "write a range"


_S = State

TRANSITIONS: Final[Mapping[tuple[State, Step], State]] = {
    (_S.ASK_PROTOCOL, Step.KNOWN): _S.ACK_PROTOCOL,
    (_S.ASK_PROTOCOL, Step.UNKNOWN): _S.ACK_UNKNOWN_PROTOCOL,
    (_S.ACK_PROTOCOL, Step.READ): _S.RUNNING,
    (_S.ACK_UNKNOWN_PROTOCOL, Step.READ): _S.ASK_PROTOCOL,
    (_S.RUNNING, Step.READ): _S.RUNNING,
    (_S.RUNNING, Step.RANGE): _S.RUNNING,
}
"""Every transition there is."""

LEAST: Final[Mapping[State, int]] = {_S.ASK_PROTOCOL: 8, _S.RUNNING: 16}
"""How many bytes a write takes; in the other states nothing may be written."""

POLL: Final[Mapping[State, int]] = {
    _S.ASK_PROTOCOL: select.POLLOUT,
    _S.ACK_PROTOCOL: select.POLLIN,
    _S.ACK_UNKNOWN_PROTOCOL: select.POLLIN,
}
"""What poll() says; while RUNNING it depends on the faults (`poll_bits`)."""


def poll_bits(unread: int, read: int) -> int:
    """Return what poll() says while RUNNING.

    Args:
        unread: Faults that nobody has read.
        read: Faults that were read, and whose threads still wait.
    """
    return (select.POLLIN if unread else 0) | (select.POLLOUT if read else 0)


def diagram() -> str:
    """Draw the table as a Mermaid state diagram (the manual's picture is this text)."""
    lines = ["stateDiagram-v2", f"    [*] --> {_S.ASK_PROTOCOL.name}"]
    lines += [f"    {before.name} --> {after.name}: {step.value}" for (before, step), after in TRANSITIONS.items()]
    return "\n".join(lines)
