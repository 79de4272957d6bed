"""The store of a region, as the worker calls it.

A store of the user's own may do anything: raise what it likes, answer nonsense, wait, die and take this process along.
What it raises ends here; that it is being asked is written down for a successor (the note READING), and a block about
which a former worker has left such a note is read in a process of its own (`trial`).
"""

from __future__ import annotations

import contextlib

from userfault.blocks import ledger as book
from userfault.pager import failure, recipe, trial
from userfault.pager.filling import fill
from userfault.pager.retries import Retries
from userfault.stores.base import Store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from userfault.blocks.ledger import Ledger
    from userfault.pager.staging import Staging


def nowhere(offset: int, length: int) -> int:  # noqa: ARG001  # as Store.locate
    """Answer as a store does that has nothing in memory."""
    return 0


class Source:
    """One store. `locate` is as of `Store`, and raises nothing.

    Raises:
        StoreError: if it cannot be made here, or is not what it was.
    """

    def __init__(self, fd: int, ledger: Ledger, *, again: bool) -> None:
        self.retries = Retries(ledger.words)
        self._fd = fd
        self._ledger = ledger
        late = again and recipe.is_foreign(ledger.recipe)
        self.store: Store = recipe.LateStore(ledger) if late else recipe.load_counted(ledger)
        self.name = recipe.described(ledger.recipe)
        """What it calls itself. Asked once, in the application: here it might wait for a lock of a read that hangs."""
        self.inline = self.store.concurrency == 0
        """Whether it answers from memory, in the fault loop."""
        kind = type(self.store)
        self.foreign = not kind.__module__.startswith("userfault.stores.")
        """Whether it is of a class of the user's own."""
        self._answers_now = kind.read_now is not Store.read_now
        self.locate = self._locate_carefully if self.foreign else self.store.locate
        self.may_hang = self.foreign and kind.locate is not Store.locate
        """Whether `locate` runs code that is not ours."""
        if kind.locate is Store.locate:
            self.locate = nowhere

    def read(self, block: int, staging: Staging) -> tuple[int, BaseException | None]:
        """Have it write a block, which the caller owns, into `staging`.

        Returns:
            Its address, and None; or 0, and what went wrong: a store may raise anything at all.
        """
        offset, length = self._ledger.geometry.span(block)
        view = staging.view[:length]
        try:
            if self._ledger.notes[block] & book.SUSPECT:
                trial.read(self._fd, block, view, self.retries.timeout_ns)
            else:
                with self._noted(block):
                    fill(self.store, offset, view)
            return staging.padded(length), None
        except BaseException as error:  # noqa: BLE001  # see above
            return 0, error

    def at_hand(self, block: int, staging: Staging) -> int:
        """Return an address of a block's bytes if that needs no waiting, else 0. For the fault loop alone."""
        if not self._answers_now or self._ledger.notes[block] & book.SUSPECT:
            return 0
        offset, length = self._ledger.geometry.span(block)
        try:
            with self._noted(block):
                found = self.store.read_now(offset, staging.view[:length])
        except BaseException:  # noqa: BLE001  # a store of the user's own; read_into will say what is wrong
            found = False
        return staging.padded(length) if found else 0

    def _locate_carefully(self, offset: int, length: int) -> int:
        block = offset >> self._ledger.geometry.shift
        if self._ledger.notes[block] & book.SUSPECT:
            return 0
        try:
            with self._noted(block):
                return int(self.store.locate(offset, length))
        except BaseException:  # noqa: BLE001  # a store of the user's own must not end the fault loop
            return 0

    @contextlib.contextmanager
    def _noted(self, block: int) -> Iterator[None]:
        if not self.foreign:
            yield
            return
        self._ledger.notes[block] |= book.READING
        try:
            yield
        finally:
            self._ledger.notes[block] &= ~book.READING

    def write(self, offset: int, data: memoryview) -> BaseException | None:
        """Have it take some bytes; return what went wrong: a store may raise anything at all."""
        try:
            self.store.write(offset, data)
        except BaseException as error:  # noqa: BLE001  # see above
            return error
        return None

    def flush(self) -> BaseException | None:
        """Have it make durable what it has taken; return what went wrong."""
        try:
            self.store.flush()
        except BaseException as error:  # noqa: BLE001  # see above
            return error
        return None

    def close(self) -> None:
        """Close the store, which may wait, or raise. Called by a thread that does nothing else."""
        try:
            self.store.close()
        except Exception as error:  # noqa: BLE001  # there is nobody to tell but the reader of standard error
            failure.report(f"closing {self.name}: {failure.plain(error)}")
