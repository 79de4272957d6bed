"""Why a block could not be had, as text that crosses from the pager to the application.

Exceptions do not travel: they may not pickle, and the application reads no pickle of anybody's.
"""

from __future__ import annotations

import marshal
import os
import select

from userfault.errors import StoreError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from userfault.stores.base import Store

LOUD = 10
"""Failures of a region that are printed to standard error; the rest only counted."""


def describe(error: BaseException, store: Store, offset: int, length: int) -> StoreError:
    """Make the error that the application is to see of whatever a store raised. Never raises."""
    plain_error = plain(error)
    message, cause = plain_error.message, plain_error.cause
    return StoreError(message, store=name_of(store), offset=offset, length=length, attempts=1, cause=cause)


def plain(error: BaseException) -> StoreError:
    """Return a StoreError that says what any exception says. Never raises."""
    if isinstance(error, StoreError):
        return error
    return StoreError("the store could not be read", cause=f"{type(error).__name__}: {_text(error)}")


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException:  # noqa: BLE001  # an exception of the user's own
        return "(it cannot be printed)"


def name_of(store: Store) -> str:
    """Return what a store calls itself. Never raises."""
    try:
        return str(store.describe())
    except BaseException:  # noqa: BLE001  # a store of the user's own
        return type(store).__name__


def report(text: str) -> None:
    """Write a line to standard error if somebody takes it without delay. Never raises."""
    poll = select.poll()
    poll.register(2, select.POLLOUT)
    try:
        if any(events & select.POLLOUT for _, events in poll.poll(0)):
            os.write(2, f"userfault: {text}\n".encode(errors="replace")[: select.PIPE_BUF])
    except OSError:
        return


def encode(error: BaseException) -> bytes:
    """Turn an error into the text of a message."""
    e = plain(error)
    fields = (e.message, e.store, e.offset, e.length, e.attempts, e.cause)
    return marshal.dumps(tuple(f[:2000] if isinstance(f, str) else f for f in fields))


def decode(text: bytes) -> StoreError:
    """Turn the text of a message into an error."""
    message, store, offset, length, attempts, cause = marshal.loads(text)  # noqa: S302  # from our own pager
    return StoreError(message, store=store, offset=offset, length=length, attempts=attempts, cause=cause)
