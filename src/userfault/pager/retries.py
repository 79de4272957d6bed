"""When a read that failed is tried again: the worker's side of `userfault.RetryPolicy`."""

from __future__ import annotations

from _random import Random  # the C half: the Python half loads hashes and logarithms

from userfault.blocks import ledger as book

TYPE_CHECKING = False
if TYPE_CHECKING:
    from userfault.errors import StoreError

_random = Random()


class Retries:
    """The policy of one region. Immutable."""

    __slots__ = ("_backoff", "_jitter", "_longest", "attempts", "timeout_ns")

    def __init__(self, words: memoryview) -> None:
        self.attempts: int = words[book.W_ATTEMPTS]
        self._backoff = words[book.W_BACKOFF] / 1e6
        self._longest = words[book.W_LONGEST] / 1e6
        self._jitter = words[book.W_JITTER] / 1e6
        self.timeout_ns: int = words[book.W_TIMEOUT] * 1000
        """Nanoseconds that one read may take; 0: as long as it likes."""

    def allow(self, failed: int, error: StoreError) -> bool:
        """Whether there is another attempt after `failed` failed ones, the last of them with `error`."""
        return failed < self.attempts and not error.permanent

    def patience_ns(self) -> int:
        """Return how long one range may be at its store until it fails, in nanoseconds: a day if there is no limit."""
        if not self.timeout_ns:
            return 86_400 * 10**9
        return self.attempts * (self.timeout_ns + round(self._longest * 1e9))

    def pause(self, failed: int) -> float:
        """Return the seconds to wait after the `failed`-th attempt has failed."""
        pause: float = min(self._longest, self._backoff * 2.0 ** min(failed - 1, 64))
        return pause * (1 - self._jitter * _random.random())
