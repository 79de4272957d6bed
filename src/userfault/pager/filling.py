"""Having a store fill a buffer, and not believing it blindly.

A store that fills too little and does not say so leaves in the buffer what was there: bytes of another block.  Nobody
can know what it should have written; but a read that ends early leaves the end as it was.  So some random bytes are put
there first, and whoever finds them afterwards knows.
"""

from __future__ import annotations

import os

from userfault.errors import StoreError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from userfault.stores.base import Store

_CANARY = os.urandom(16)
"""Data end with these bytes by chance once in 2**128 blocks."""


def fill(store: Store, offset: int, buffer: memoryview) -> None:
    """Have a store write its bytes from `offset` on into all of `buffer`.

    Raises:
        StoreError: if it says, or shows, that it has not.
        BaseException: whatever it raises.
    """
    end = len(buffer) - len(_CANARY)
    if end >= 0:
        buffer[end:] = _CANARY
    got: object = store.read_into(offset, buffer)
    if got is not None and got != len(buffer):
        raise StoreError(f"read_into returned {got!r} instead of filling the buffer")
    if end >= 0 and buffer[end:] == _CANARY:
        raise StoreError("read_into did not fill the buffer to its end, and did not say so")
