"""The figures that long tests report are what they say."""

from __future__ import annotations

from tests.crash.figures import in_words, of_histogram, pauses, percentiles


def test_percentiles_of_values() -> None:
    assert percentiles(range(1, 101), (50, 99, 100)) == "50 %: 51, 99 %: 100, 100 %: 100"
    assert percentiles([], (50, 100)) == "50 %: 0, 100 %: 0"


def test_percentiles_of_a_histogram() -> None:
    assert of_histogram({1: 90, 2: 9, 8: 1}, (50, 95, 99.9, 100), 0) == "50 %: 1, 95 %: 2, 99.9 %: 8, 100 %: 8"
    assert of_histogram({}) == ""


def test_a_pause_lasts_from_the_kill_to_the_end_of_what_was_under_way() -> None:
    steps = [(0.0, 1.5), (0.5, 3.0), (2.5, 2.75), (5.0, 6.0)]
    assert pauses([1.0, 2.0, 4.0], steps) == [2.0, 1.0, 0.0]


def test_counts_in_words() -> None:
    assert in_words({"few": 1, "many": 5}) == "many 5, few 1"
