"""Why a block could not be had, as text that crosses from the pager to the application.

Exceptions do not travel: they may not pickle, and the application reads no pickle of anybody's.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import select

from userfault.blocks.errors import MAX_TEXT
from userfault.errors import StoreError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from userfault.stores.base import Store

LOUD = 10
"""Failures of a region that are printed to standard error, and told to the application; the rest only counted."""
_LIMITS = 2000, 200, 100, 50, 20
"""Characters of a text: as many as fit."""


NOT_READ = "the store could not be read"


def describe(  # all that an error says
    error: BaseException, store: str, offset: int, length: int, attempts: int, message: str = NOT_READ
) -> StoreError:
    """Make the error that the application is to see of whatever a store raised. Never raises."""
    said = plain(error, message)
    attempts = max(attempts, said.attempts)
    return StoreError(
        said.message,
        store=store,
        offset=offset,
        length=length,
        attempts=attempts,
        cause=said.cause,
        permanent=said.permanent,
    )


def plain(error: BaseException, message: str = NOT_READ) -> StoreError:
    """Return a StoreError that says what any exception says. Never raises.

    One of a store's own may be of any make: a subclass without fields, a cause that is no text.
    """
    if isinstance(error, StoreError):
        with contextlib.suppress(BaseException):
            return StoreError(
                str(error.message),
                store=str(error.store),
                offset=int(error.offset),
                length=int(error.length),
                attempts=int(error.attempts),
                cause=str(error.cause),
                permanent=bool(error.permanent),
            )
    return StoreError(message, cause=f"{type(error).__name__}: {_text(error)}")


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
    text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)  # a store's words, on a terminal
    poll = select.poll()
    poll.register(2, select.POLLOUT)
    try:
        if any(events & select.POLLOUT for _, events in poll.poll(0)):
            os.write(2, f"userfault: {text}\n".encode(errors="replace")[: select.PIPE_BUF])
    except OSError:
        return


def encode(error: BaseException, most: int = 16 << 10) -> bytes:
    """Turn an error into the text of a message of at most `most` bytes."""
    e = plain(error)
    for limit in _LIMITS:
        texts = (part[:limit] for part in (e.message, e.store, e.cause))
        text = marshal.dumps((*texts, e.offset, e.length, e.attempts, e.permanent))
        if len(text) <= most:
            break
    return text


def abridge(text: bytes) -> bytes:
    """Return the text of an error so that it fits into the region's log of errors."""
    return text if len(text) <= MAX_TEXT else encode(decode(text), MAX_TEXT)


def decode(text: bytes) -> StoreError:
    """Turn the text of a message into an error."""
    message, store, cause, offset, length, attempts, permanent = marshal.loads(text)  # noqa: S302  # our own pager's
    return StoreError(
        message, store=store, offset=offset, length=length, attempts=attempts, cause=cause, permanent=permanent
    )
