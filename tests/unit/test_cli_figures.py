"""Numbers as the command line writes and reads them."""

from __future__ import annotations

import argparse

import pytest

from userfault.cli import figures


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (1023, "1,023 bytes"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (64 << 10, "64 KiB"),
        (2 << 30, "2 GiB"),
        ((2 << 30) + (300 << 20), "2.3 GiB"),
        ((500 << 20) + 12345, "500 MiB"),
        (1 << 70, "1024 EiB"),
    ],
)
def test_size(number: int, text: str) -> None:
    assert figures.size(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 ns"),
        (12e-9, "12 ns"),
        (8.24e-6, "8.2 µs"),
        (54e-6, "54 µs"),
        (0.00104, "1.0 ms"),
        (1.31, "1.3 s"),
        (75, "75 s"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert figures.duration(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(0, "0 rows"), (1, "1 row"), (1000, "1,000 rows")])
def test_count_with_a_noun(number: int, text: str) -> None:
    assert figures.count(number, "row") == text


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (0, 10, "0 %"),
        (10, 10, "100 %"),
        (0, 0, "0 %"),
        (1, 100_000, "0.1 %"),
        (99_999, 100_000, "99.9 %"),
        (1, 3, "33.3 %"),
    ],
)
def test_share_says_all_or_nothing_only_where_it_is_so(part: int, whole: int, text: str) -> None:
    assert figures.share(part, whole) == text


def test_size_argument_reads_units() -> None:
    assert figures.size_argument("2GiB") == 2 << 30


@pytest.mark.parametrize("text", ["", "many", "-1", "1 furlong"])
def test_size_argument_refuses_what_is_no_size(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a size"):
        figures.size_argument(text)
