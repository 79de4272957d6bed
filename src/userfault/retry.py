"""How often, and how patiently, a store is asked for a block before the block fails."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real

_LONGEST_S = 1e9


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how patiently a store is asked.

    A read that raises, fills too little or takes longer than `timeout` is tried again after a pause, until `attempts`
    reads have failed; then the block fails: a touch of it is a SIGBUS, `ensure` raises `StoreError`, and only
    `Region.retry` asks again.  The pause before the second attempt is `backoff` seconds and doubles with each further
    one, up to `longest`; of each pause a random part, up to the fraction `jitter` of it, is left out, so that many
    readers do not come back at once.  An error that is marked as `permanent` is not tried again.

    A read that never returns cannot be ended, only abandoned: its thread stays behind until it returns, and what it
    brings then is thrown away.  While many of them hang, further reads fail at once.  The timeout is kept to within
    half a second.  A store with `concurrency = 0` is called in the fault loop, where nothing can be abandoned: a block
    whose read is late fails at the first attempt, and the worker is replaced.

    Raises:
        TypeError, ValueError: naming the argument and what it may be.
    """

    attempts: int = 3
    """Reads before the block fails; 1: never again."""
    backoff: float = 0.1
    """Seconds before the second attempt."""
    longest: float = 5.0
    """Seconds, the most that the pause grows to."""
    jitter: float = 0.5
    """From 0 (pauses exactly as above) to 1 (anything down to none at all)."""
    timeout: float | None = 60.0
    """Seconds that one read may take; None: for ever."""

    def __post_init__(self) -> None:
        attempts: object = self.attempts
        if isinstance(attempts, bool) or not isinstance(attempts, Integral):
            raise TypeError(f"attempts must be an integer, not {attempts!r}")
        if not 1 <= self.attempts < 1 << 32:
            raise ValueError(f"attempts must be at least 1, the first one; got {self.attempts}")
        _check_number("backoff", self.backoff, 0, _LONGEST_S)
        _check_number("longest", self.longest, 0, _LONGEST_S)
        _check_number("jitter", self.jitter, 0, 1)
        if self.timeout is not None:
            _check_number("timeout", self.timeout, 0.001, math.inf, " (None: for ever)")

    def numbers(self) -> tuple[int, int, int, int, int]:
        """Return the fields as integers, as the ledger keeps them: microseconds, millionths, 0 for no timeout."""
        timeout = 0 if self.timeout is None or self.timeout > _LONGEST_S else self.timeout
        parts = (self.backoff, self.longest, self.jitter, timeout)
        backoff, longest, jitter, limit = (round(1e6 * part) for part in parts)
        return self.attempts, backoff, longest, jitter, limit


def _check_number(name: str, value: object, least: float, most: float, hint: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number{hint}, not {value!r}")
    if not least <= float(value) <= most:  # NaN is neither
        raise ValueError(f"{name} must be from {least:g} to {most:g}{hint}, got {value!r}")


def check_retry_policy(value: object) -> RetryPolicy:
    """Return the policy that a user passed; None stands for the default one.

    Raises:
        TypeError: if it is none.
    """
    if value is None:
        return RetryPolicy()
    if not isinstance(value, RetryPolicy):
        raise TypeError(f"retry_policy must be a userfault.RetryPolicy, not {value!r}")
    return value
