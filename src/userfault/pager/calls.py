"""Requests of the application that wait for an answer.

A request may be sent twice: when a worker says hello, everything unanswered goes to it.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections import deque

from userfault.errors import KernelError, PagerLostError
from userfault.latch import Latch
from userfault.pager import wire
from userfault.pager.wire import Message

TYPE_CHECKING = False
if TYPE_CHECKING:
    from userfault.pager.mapping import Mapping


class Call:
    """A request that waits for its answer; None if there will be none."""

    __slots__ = ("answer", "answered", "message")

    def __init__(self, message: Message) -> None:
        self.message = message
        self.answered = Latch()
        self.answer: Message | None = None

    def settle(self, answer: Message | None) -> None:
        """Take the answer."""
        self.answer = answer
        self.answered.set()


class _Retired(Call):
    """The CLOSE of a region that nobody holds; keeps its memory until the pager has answered."""

    __slots__ = ("mapping",)

    def __init__(self, message: Message, mapping: Mapping) -> None:
        super().__init__(message)
        self.mapping: Mapping | None = mapping

    def settle(self, answer: Message | None) -> None:
        mapping, self.mapping = self.mapping, None
        if mapping is not None and mapping.finish():
            mapping.link.closed()
        super().settle(answer)


class Calls:
    """All of them, on one socket. Any thread may begin one; the listening thread alone hears answers."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._ids = itertools.count(1)
        self._waiting: dict[int, Call] = {}
        self._unsent: deque[Message] = deque()
        """What `retire` could not send yet."""
        self._over = False

    def next_id(self) -> int:
        """Return a number never used before on this socket."""
        return next(self._ids)

    def begin(self, message: Message) -> Call:
        """Send a request.

        Raises:
            KernelError: if there is no memory for it.
            PagerLostError: if the socket does not take it.
        """
        message.id = self.next_id()
        call = Call(message)
        self._waiting[message.id] = call
        try:
            wire.deliver(self._control, message)
        except OSError as error:
            self._waiting.pop(message.id, None)
            if error.errno in wire.NO_MEMORY:
                raise KernelError(error.errno or 0, "sendmsg", "a request to the pager") from error
            raise PagerLostError(f"the pager's socket failed: {error}") from error
        except BaseException:  # Ctrl-C
            self._waiting.pop(message.id, None)
            raise
        if self._over:  # while we sent
            call.settle(None)
        self._send_retired()
        return call

    def forget(self, call: Call) -> None:
        """Nobody waits for the answer any more; another worker must not be asked."""
        self._waiting.pop(call.message.id, None)

    def tell(self, message: Message) -> None:
        """Send a request that nobody waits for. Lost with the worker that got it."""
        with contextlib.suppress(OSError):
            wire.deliver(self._control, message)

    def retire(self, mapping: Mapping) -> None:
        """End a region that nobody holds any more. Called by finalizers, in any thread: does not wait."""
        message = Message(wire.CLOSE, self.next_id(), mapping.identity, flags=wire.FORCE)
        self._waiting[message.id] = _Retired(message, mapping)
        self._unsent.append(message)
        self._send_retired()

    def retiring(self) -> list[Call]:
        """Return the ends of regions that have not been answered: changes are still being written back, perhaps."""
        return [call for call in list(self._waiting.values()) if isinstance(call, _Retired)]

    def _send_retired(self) -> None:
        """Send what the socket takes; the rest goes out as answers come in."""
        while not self._over:
            try:
                message = self._unsent.popleft()
            except IndexError:  # sent, by another thread perhaps
                return
            try:
                wire.send(self._control, message, socket.MSG_DONTWAIT)
            except OSError as error:
                if not isinstance(error, BlockingIOError) and error.errno not in wire.NO_MEMORY:
                    break
                self._unsent.appendleft(message)
                return
        if self._over:
            self.end()

    def hear(self, answer: Message) -> None:
        """Give an answer to whoever waits for it."""
        call = self._waiting.pop(answer.id, None)
        if call is not None:
            call.settle(answer)
            self._send_retired()

    def repeat(self) -> None:
        """Ask a new worker everything that the old one may have taken along."""
        for call in list(self._waiting.values()):
            with contextlib.suppress(OSError):
                wire.deliver(self._control, call.message)

    def end(self) -> None:
        """Nobody answers any more."""
        self._over = True
        self._unsent.clear()
        for call in list(self._waiting.values()):
            call.settle(None)
        self._waiting.clear()
