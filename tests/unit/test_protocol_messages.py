"""What goes over the descriptor: words in native order, and the order in which a range is checked."""

from __future__ import annotations

import dataclasses
import sys
from errno import EINVAL, ERANGE

import pytest

from userfault.errors import LocalProtocolError
from userfault.kernel.memory import PAGE_SIZE
from userfault.protocol.messages import (
    RANGE,
    WORD,
    Acknowledgement,
    Command,
    Fault,
    Range,
    Refusal,
    Register,
    Unregister,
    Version,
    Wake,
    parse_range,
)

TOP = (1 << 64) - 1
LAST = TOP & -PAGE_SIZE  # the last page's address: also the highest end of a range that a word can hold
RANGES: list[type[Range]] = [Wake, Register, Unregister]
BITS: dict[type[Range], int] = {Wake: 0, Register: 1, Unregister: 2}
MESSAGES: list[Command | Acknowledgement | Refusal | Fault] = [
    Version(0xAA),
    Wake(0x1000, 0x3000),
    Register(0x1000, 0x3000),
    Unregister(0x1000, 0x3000),
    Acknowledgement(0xAA),
    Refusal(),
    Fault(0x1234, 7),
]


def words(*numbers: int) -> bytes:
    """64-bit words as the machine keeps them, made without the module under test."""
    return b"".join(number.to_bytes(8, sys.byteorder) for number in numbers)


def refusal(data: bytes, page_size: int = PAGE_SIZE) -> LocalProtocolError:
    with pytest.raises(LocalProtocolError) as caught:
        parse_range(data, page_size)
    assert caught.value.syscall == "write(userfaultfd)"
    return caught.value


# -- bytes


def test_words_are_64_bits_in_native_order_everywhere() -> None:
    assert (WORD.size, RANGE.size) == (8, 16)
    assert WORD.pack(0x0102030405060708) == words(0x0102030405060708)
    assert RANGE.pack(1, TOP) == words(1, TOP)


@pytest.mark.parametrize("number", [0, 1, 0xAA, 1 << 63, TOP])
def test_single_words_carry_any_number(number: int) -> None:
    assert Version(number).encode() == words(number)
    assert Acknowledgement(number).encode() == words(number)
    assert Fault(number).encode() == words(number)


def test_a_refusal_is_eight_bytes_of_ones() -> None:
    assert Refusal().encode() == b"\xff" * 8


def test_an_acknowledgement_says_the_same_as_the_version() -> None:
    assert Acknowledgement(0xAA).encode() == Version(0xAA).encode()


def test_a_faults_thread_does_not_travel() -> None:
    assert Fault(0x1234, 7).encode() == Fault(0x1234).encode() == words(0x1234)


@pytest.mark.parametrize("offset", [0, 1, PAGE_SIZE - 1])
def test_a_faults_page_is_the_one_it_lies_in(offset: int) -> None:
    assert Fault(5 * PAGE_SIZE + offset).page == 5 * PAGE_SIZE
    assert Fault(LAST + offset).page == LAST


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_messages_are_frozen_and_slotted(message: Command | Acknowledgement | Refusal | Fault) -> None:
    fields = [field.name for field in dataclasses.fields(message)]
    for name in fields:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(message, name, 0)
    with pytest.raises(AttributeError):
        object.__setattr__(message, "another", 0)
    assert not hasattr(message, "__dict__")
    assert message == dataclasses.replace(message)
    assert hash(message) == hash(dataclasses.replace(message))


# -- ranges


@pytest.mark.parametrize("kind", RANGES)
@pytest.mark.parametrize(
    ("start", "end"),
    [(0, PAGE_SIZE), (0, LAST), (7 * PAGE_SIZE, 8 * PAGE_SIZE), (LAST - PAGE_SIZE, LAST)],
)
def test_a_range_comes_out_as_it_went_in(kind: type[Range], start: int, end: int) -> None:
    data = kind(start, end).encode()

    assert data == words(start | BITS[kind], end)
    assert parse_range(data) == kind(start, end)


@pytest.mark.parametrize("extra", [b"\0", b"x" * 16, words(3, 3), bytes(4096)])
def test_bytes_beyond_the_range_are_ignored(extra: bytes) -> None:
    assert parse_range(Register(0x10000, 0x20000).encode() + extra) == Register(0x10000, 0x20000)


@pytest.mark.parametrize("page_size", [4096, 16384, 65536, 2 << 20])
@pytest.mark.parametrize("kind", RANGES)
def test_the_page_size_is_a_parameter(kind: type[Range], page_size: int) -> None:
    assert parse_range(kind(page_size, 3 * page_size).encode(), page_size) == kind(page_size, 3 * page_size)
    for start, end in [(page_size // 2, 3 * page_size), (page_size, 3 * page_size - page_size // 2)]:
        assert refusal(kind(start, end).encode(), page_size).errno == EINVAL


# Each row has the mistake of its name and every one that is looked for later: the first counts.
ORDER = [
    pytest.param(words(0x1007), EINVAL, "8 bytes", id="short"),
    pytest.param(words(PAGE_SIZE + 7, 5), EINVAL, "start", id="start"),
    pytest.param(words(PAGE_SIZE + 3, 5), EINVAL, "both register", id="both_bits"),
    pytest.param(words(PAGE_SIZE + 1, 5), EINVAL, "end", id="end"),
    pytest.param(words(PAGE_SIZE + 1, 0), ERANGE, "empty", id="empty"),
]


@pytest.mark.parametrize(("data", "errno", "mistake"), ORDER)
def test_the_checks_come_in_the_order_of_the_specification(data: bytes, errno: int, mistake: str) -> None:
    error = refusal(data)

    assert error.errno == errno
    assert mistake in error.detail


@pytest.mark.parametrize("length", range(16))
def test_less_than_two_words_is_einval_whatever_they_say(length: int) -> None:
    data = Wake(PAGE_SIZE, 2 * PAGE_SIZE).encode()[:length]

    assert refusal(data).errno == EINVAL
    assert f"{length} bytes" in refusal(data).detail


@pytest.mark.parametrize("low", [4, 8, 0x123 << 2, PAGE_SIZE - 4, PAGE_SIZE - 1])
def test_a_start_between_pages_is_einval(low: int) -> None:
    error = refusal(words(PAGE_SIZE + low, 3 * PAGE_SIZE))

    assert error.errno == EINVAL
    assert f"the start {(PAGE_SIZE + low) & -4:#x} is not a multiple of the page size {PAGE_SIZE}" in error.detail


@pytest.mark.parametrize("low", [1, 2, 3, PAGE_SIZE // 2, PAGE_SIZE - 1])
def test_an_end_between_pages_is_einval(low: int) -> None:
    """An inclusive end, as programs wrote it for the July form, too."""
    error = refusal(words(PAGE_SIZE, 2 * PAGE_SIZE + low))

    assert error.errno == EINVAL
    assert f"the end {2 * PAGE_SIZE + low:#x} is not a multiple of the page size {PAGE_SIZE}" in error.detail


@pytest.mark.parametrize("start", [0, PAGE_SIZE, LAST])
def test_both_bits_are_einval(start: int) -> None:
    error = refusal(words(start + 3, LAST))

    assert error.errno == EINVAL
    assert f"{start + 3:#x}" in error.detail
    assert "register (bit 0)" in error.detail
    assert "unregister (bit 1)" in error.detail


@pytest.mark.parametrize("bits", BITS.values())
@pytest.mark.parametrize(
    ("start", "end"),
    [(0, 0), (PAGE_SIZE, PAGE_SIZE), (PAGE_SIZE, 0), (2 * PAGE_SIZE, PAGE_SIZE), (LAST, LAST), (LAST, 0)],
)
def test_an_empty_or_backward_range_is_erange(start: int, end: int, bits: int) -> None:
    error = refusal(words(start | bits, end))

    assert error.errno == ERANGE
    assert f"[{start:#x}, {end:#x}) is empty: the end is the byte after the last" in error.detail


def test_the_highest_words_are_only_numbers() -> None:
    assert "start" in refusal(words(TOP, TOP)).detail
    assert "both" in refusal(words(LAST + 3, TOP)).detail
    assert "end" in refusal(words(LAST, TOP)).detail
    assert "end" in refusal(words(0, TOP)).detail
