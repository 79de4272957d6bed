"""Why a block could not be had, as text that crosses from the pager to the application.

Exceptions do not travel: they may not pickle, and the application reads no pickle of anybody's.
"""

from __future__ import annotations

import marshal

from userfault.errors import StoreError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from userfault.stores.base import Store

LOUD = 10
"""Failures of a region that are printed to standard error; the rest only counted."""


def describe(error: BaseException, store: Store, offset: int, length: int) -> StoreError:
    """Make the error that the application is to see of whatever a store raised."""
    if isinstance(error, StoreError) and not error.cause:
        message, cause = error.message, ""
    else:
        message, cause = "the store could not be read", f"{type(error).__name__}: {error}"
    return StoreError(message, store=_name(store), offset=offset, length=length, attempts=1, cause=cause)


def _name(store: Store) -> str:
    try:
        return store.describe()
    except Exception:  # noqa: BLE001  # a store of the user's own
        return type(store).__name__


def encode(error: BaseException) -> bytes:
    """Turn an error into the text of a message."""
    if not isinstance(error, StoreError):
        error = StoreError("the pager failed", cause=f"{type(error).__name__}: {error}")
    fields = (error.message, error.store, error.offset, error.length, error.attempts, error.cause)
    return marshal.dumps(tuple(f[:2000] if isinstance(f, str) else f for f in fields))


def decode(text: bytes) -> StoreError:
    """Turn the text of a message into an error."""
    message, store, offset, length, attempts, cause = marshal.loads(text)  # noqa: S302  # from our own pager
    return StoreError(message, store=store, offset=offset, length=length, attempts=attempts, cause=cause)
