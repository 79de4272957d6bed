"""The retry policy: what it accepts, what reaches the ledger, and what the worker makes of it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from userfault import RetryPolicy, StoreError
from userfault.blocks import ledger as book
from userfault.pager.retries import Retries
from userfault.retry import check_retry_policy

WORDS = 512


def _worker_side(policy: RetryPolicy) -> Retries:
    words = memoryview(bytearray(8 * WORDS)).cast("Q")
    for index, value in enumerate(policy.numbers(), book.W_ATTEMPTS):
        words[index] = value
    return Retries(words)


def test_numbers_of_numpy_are_numbers() -> None:
    policy = RetryPolicy(attempts=np.int64(2), backoff=np.float32(0.5), longest=np.int32(3))  # type: ignore[arg-type]  # as users pass them

    assert policy.numbers()[:3] == (2, 500_000, 3_000_000)
    assert _worker_side(policy).attempts == 2


@pytest.mark.parametrize(
    ("wrong", "kind", "text"),
    [
        ({"attempts": 0}, ValueError, "attempts must be at least 1, the first one; got 0"),
        ({"attempts": 2.0}, TypeError, "attempts must be an integer, not 2.0"),
        ({"attempts": True}, TypeError, "attempts must be an integer, not True"),
        ({"backoff": -1}, ValueError, "backoff must be from 0 to 1e+09, got -1"),
        ({"backoff": "1s"}, TypeError, "backoff must be a number, not '1s'"),
        ({"longest": math.nan}, ValueError, "longest must be from 0 to 1e+09, got nan"),
        ({"jitter": 1.5}, ValueError, "jitter must be from 0 to 1, got 1.5"),
        ({"timeout": 0}, ValueError, "timeout must be from 0.001 to inf (None: for ever), got 0"),
    ],
)
def test_wrong_numbers_are_named(wrong: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught:
        RetryPolicy(**wrong)
    assert str(caught.value) == text


def test_anything_but_a_policy_is_refused() -> None:
    with pytest.raises(TypeError, match=r"retry_policy must be a userfault\.RetryPolicy, not 3"):
        check_retry_policy(3)
    assert check_retry_policy(None) == RetryPolicy()


@given(
    attempts=st.integers(1, 1000),
    backoff=st.integers(0, 10**12).map(lambda n: n / 1e6),
    longest=st.integers(0, 10**12).map(lambda n: n / 1e6),
    jitter=st.integers(0, 10**6).map(lambda n: n / 1e6),
    failed=st.integers(1, 2000),
)
def test_a_pause_is_what_the_policy_says(
    attempts: int, backoff: float, longest: float, jitter: float, failed: int
) -> None:
    worker = _worker_side(RetryPolicy(attempts, backoff, longest, jitter))
    full = min(longest, backoff * 2.0 ** min(failed - 1, 64))
    assert full * (1 - jitter) - 1e-3 * (1 + full) <= worker.pause(failed) <= full + 1e-5 * (1 + full)
    assert worker.allow(failed, StoreError("x")) == (failed < attempts)
    assert not worker.allow(failed, StoreError("x", permanent=True))


@pytest.mark.parametrize(
    ("timeout", "nanoseconds"), [(None, 0), (math.inf, 0), (0.001, 1_000_000), (60.0, 60_000_000_000)]
)
def test_a_timeout_of_none_is_no_timeout(timeout: float | None, nanoseconds: int) -> None:
    assert _worker_side(RetryPolicy(timeout=timeout)).timeout_ns == nanoseconds
