"""The descriptor's side of a conversation, without a descriptor: no system call, no clock, no thread.

Whoever has faults feeds them in (`fault`); what the pager wrote goes through `write`, what it may read comes out of
`read`.  Two things speak it: `Descriptor`, over a kernel userfaultfd of this process, and the pager's worker, over a
socket (`userfault.pager.outlet`).

Rules that are easily got wrong:

* A fault is *unread* until it has been read, then *read* until a range write covers it.  A range write never touches
  an unread one: whoever polled it must be able to read it.
* Each thread is an entry of its own: two threads on one page are two reads.
* A thread waits in one place only.  So when it is heard of again, what was known of it before is out of date: a signal
  has interrupted it, or somebody has woken it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from errno import EAGAIN, EINVAL, ENOENT
from itertools import islice
from typing import TYPE_CHECKING

from userfault.errors import LocalProtocolError
from userfault.protocol.constants import USERFAULTFD_PROTOCOL, USERFAULTFD_UNKNOWN_PROTOCOL
from userfault.protocol.messages import RANGE, WORD, Acknowledgement, Fault, Refusal, Version, Wake, parse_range
from userfault.protocol.states import LEAST, POLL, TRANSITIONS, State, Step, poll_bits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from userfault.protocol.messages import Command


@dataclass(frozen=True, slots=True)
class Written:
    """What came of a write.

    Attributes:
        command: What was written.
        length: What write() returns: the bytes that counted.
        woken: The faults that it ends; their threads are to be woken.
    """

    command: Command
    length: int
    woken: tuple[Fault, ...] = ()


class Connection:
    """One conversation.

    Any exception but those named is a bug here.  Not for several threads at once: the caller has a lock.

    Args:
        versions: The protocol versions that are known. Their order means nothing: the pager chooses.
        state: Where a conversation stands that is taken over.
        version: What was asked for in it.

    Raises:
        ValueError: A version that is no 64-bit number, or is the one that means a refusal.
    """

    __slots__ = ("_read", "_unread", "state", "version", "versions")

    def __init__(
        self,
        versions: Iterable[int] = (USERFAULTFD_PROTOCOL,),
        *,
        state: State = State.ASK_PROTOCOL,
        version: int = 0,
    ) -> None:
        self.versions = frozenset(versions)
        if not all(0 <= version < USERFAULTFD_UNKNOWN_PROTOCOL for version in self.versions):
            raise ValueError(f"versions {sorted(self.versions)}: each is a number from 0 to 2**64 - 2")
        self.state = state
        self.version = version
        self._unread: deque[Fault] = deque()
        self._read: list[Fault] = []

    # -- the pager's verbs ---------------------------------------------------------------------------------------

    def write(self, data: bytes) -> Written:
        """Take one command. Bytes beyond it are ignored.

        Raises:
            LocalProtocolError: EINVAL: too short, nothing may be written now, not aligned, both command bits. ERANGE:
                an empty range. ENOENT: nobody waits there whose fault has been read.
        """
        return self.obey(self.parse(data))

    def expects(self) -> int:
        """Tell how many bytes a write takes now.

        Raises:
            LocalProtocolError: EINVAL: nothing may be written.
        """
        if self.state not in LEAST:
            raise self._refused("write", EINVAL, "the answer to what was written before has not been read")
        return LEAST[self.state]

    def parse(self, data: bytes) -> Command:
        """The first half of `write`: tell which command it is. Nothing is changed.

        Raises:
            LocalProtocolError: EINVAL, ERANGE.
        """
        least = self.expects()
        if self.state is State.RUNNING:
            return parse_range(data)
        if len(data) < least:
            raise self._refused("write", EINVAL, f"{len(data)} bytes: a protocol version is a 64-bit word")
        return Version(*WORD.unpack_from(data))

    def obey(self, command: Command) -> Written:
        """The second half: do what `parse` has told.

        Raises:
            LocalProtocolError: ENOENT.
        """
        if isinstance(command, Version):
            return self._ask(command)
        woken = self._take(command) if isinstance(command, Wake) else ()
        self._step(Step.RANGE)
        return Written(command, RANGE.size, woken)

    def read(self, length: int) -> bytes:
        """Give one answer or one fault: 8 bytes, however many are asked for.

        Raises:
            LocalProtocolError: EINVAL: less than 8 asked for, or nothing has been written yet.
            BlockingIOError: EAGAIN: there is no fault that has not been read.
        """
        if length < WORD.size:
            raise self._refused("read", EINVAL, f"{length} bytes asked for, and an address has {WORD.size}")
        if (self.state, Step.READ) not in TRANSITIONS:
            raise self._refused("read", EINVAL, "write a protocol version first")
        data = self.outgoing(0)
        if data is None:
            raise BlockingIOError(EAGAIN, "read(userfaultfd): no fault is unread")
        if self.state is State.RUNNING:
            self._hand_out(self._unread[0])
            self._unread.popleft()  # last: a signal handler may raise in between, and told twice is better than never
        self._step(Step.READ)
        return data

    def poll(self) -> int:
        """Return `select.POLLIN`, `select.POLLOUT`, both or 0."""
        if self.state is State.RUNNING:
            return poll_bits(self.unread, self.read_faults)
        return POLL[self.state]

    def fdinfo(self) -> str:
        """Return what /proc would show: faults unread, threads waiting, and the protocols known."""
        return fdinfo_text(self.unread, self.unread + self.read_faults, self.versions)

    # -- the memory's verbs --------------------------------------------------------------------------------------

    def fault(self, address: int, thread: int = 0) -> bool:
        """A thread has stopped at an address. Return False if that had been told, and not been read, before."""
        fault = Fault(address, thread)
        if thread:
            self._read = [other for other in self._read if other.thread != thread]
            if any(other.thread == thread and other.page == fault.page for other in self._unread):
                return False
        self._unread.append(fault)
        return True

    def retain(self, waiting: Callable[[Fault], bool]) -> None:
        """Of the faults that were read, remember those whose threads still wait."""
        self._read = [fault for fault in self._read if waiting(fault)]

    # -- what is queued ------------------------------------------------------------------------------------------

    @property
    def unread(self) -> int:
        """How many faults have not been read."""
        return len(self._unread)

    @property
    def read_faults(self) -> int:
        """How many faults have been read and not been ended by a range write."""
        return len(self._read)

    def outgoing(self, number: int) -> bytes | None:
        """Return what the `number`th next read gives, counted from 0; None as long as that is not known.

        (While the answer of the handshake is unread, nothing behind it is.)
        """
        if self.state is State.RUNNING:
            return self._unread[number].encode() if number < len(self._unread) else None
        if number or self.state is State.ASK_PROTOCOL:
            return None
        accepted = self.state is State.ACK_PROTOCOL
        return (Acknowledgement(self.version) if accepted else Refusal()).encode()

    # -- inside --------------------------------------------------------------------------------------------------

    def _ask(self, version: Version) -> Written:
        self.version = version.number
        self._step(Step.KNOWN if version.number in self.versions else Step.UNKNOWN)
        return Written(version, WORD.size)

    def ended_by(self, wake: Wake) -> tuple[Fault, ...]:
        """Return the faults that a range write ends.

        Raises:
            LocalProtocolError: ENOENT: there is none.
        """
        woken = tuple(fault for fault in self._read if wake.start <= fault.address < wake.end)
        if not woken:
            detail = f"nobody waits in [{wake.start:#x}, {wake.end:#x}) whose fault has been read; no harm is done"
            raise self._refused("write", ENOENT, detail)
        return woken

    def _take(self, wake: Wake) -> tuple[Fault, ...]:
        """Take those out."""
        woken = self.ended_by(wake)
        self._read = [fault for fault in self._read if not wake.start <= fault.address < wake.end]
        return woken

    def _hand_out(self, fault: Fault) -> None:
        """Count a fault as read, unless its thread has gone on and waits elsewhere: that is unread yet."""
        if not fault.thread or all(later.thread != fault.thread for later in islice(self._unread, 1, None)):
            self._read.append(fault)

    def _step(self, step: Step) -> None:
        self.state = TRANSITIONS[self.state, step]

    def _refused(self, call: str, errno: int, detail: str) -> LocalProtocolError:
        return LocalProtocolError(errno, f"{call}(userfaultfd)", f"{detail} (state {self.state.name})")

    def __repr__(self) -> str:
        return f"<Connection {self.state.name} unread={self.unread} read={self.read_faults}>"


def fdinfo_text(pending: int, total: int, versions: Iterable[int]) -> str:
    """Write the lines of a descriptor's fdinfo, as the second version of the proposal had them."""
    known = " ".join(f"{version:x}" for version in sorted(versions))
    return f"pending:\t{pending}\ntotal:\t{total}\nprotocols:\t{known}\n"
