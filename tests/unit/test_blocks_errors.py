"""The ring of a region's last errors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from userfault import StoreError
from userfault.blocks.errors import LENGTH, MAX_TEXT, SLOTS, ErrorLog
from userfault.pager import failure


def _log() -> tuple[ErrorLog, bytearray]:
    data = bytearray(LENGTH)
    return ErrorLog(memoryview(data)), data


@given(st.lists(st.tuples(st.integers(0, 1 << 60), st.binary(max_size=MAX_TEXT)), max_size=3 * SLOTS))
def test_it_keeps_the_last_ones_in_order(errors: list[tuple[int, bytes]]) -> None:
    log, data = _log()
    for block, text in errors:
        log.add(block, text)
    assert log.recent() == errors[-SLOTS:]
    assert ErrorLog(memoryview(data)).recent() == errors[-SLOTS:]
    for block, _ in errors[-SLOTS:]:
        assert log.of(block) == [text for other, text in errors if other == block][-1]


def test_a_block_of_which_nothing_is_known() -> None:
    log, _ = _log()
    assert log.of(3) is None
    assert log.recent() == []


def test_a_text_that_does_not_fit_is_refused() -> None:
    log, _ = _log()
    with pytest.raises(ValueError, match="does not fit"):
        log.add(0, bytes(MAX_TEXT + 1))
    assert log.recent() == []


def test_a_slot_that_is_being_written_is_not_read() -> None:
    log, data = _log()
    log.add(1, b"first")
    log.add(2, b"second")
    start = next(at for at in range(0, LENGTH, LENGTH // SLOTS) if b"second" in data[at : at + 64])
    data[start : start + 8] = bytes(8)  # its number is zero as long as that lasts
    assert log.recent() == [(1, b"first")]


@given(st.text(), st.text(), st.text(), st.integers(0, 1 << 62), st.integers(1, 1 << 31), st.booleans())
def test_every_error_fits_when_abridged(
    message: str, store: str, cause: str, offset: int, attempts: int, permanent: bool
) -> None:
    long = StoreError(
        message * 100, store=store * 100, offset=offset, attempts=attempts, cause=cause * 100, permanent=permanent
    )
    text = failure.abridge(failure.encode(long))
    assert len(text) <= MAX_TEXT
    there = failure.decode(text)
    assert (there.offset, there.attempts, there.permanent) == (offset, attempts, permanent)
    assert (message * 100).startswith(there.message)
