"""The pictures that the demo draws."""

from __future__ import annotations

from userfault import BlockState, Latency
from userfault.cli import drawing


def test_histogram_joins_the_buckets_of_an_octave() -> None:
    latency = Latency(((256, 1), (304, 10), (512, 10), (1024, 5)))

    lines = list(drawing.histogram(latency, unicode=False))

    assert [line.split()[:6] for line in lines] == [
        ["128", "ns", "to", "256", "ns", "1"],
        ["256", "ns", "to", "512", "ns", "20"],
        ["512", "ns", "to", "1.0", "µs", "5"],
    ]
    assert [line.count("#") for line in lines] == [2, 40, 10]


def test_histogram_shows_empty_octaves_between_full_ones() -> None:
    lines = list(drawing.histogram(Latency(((256, 1), (2048, 1)))))

    assert len(lines) == 4
    assert lines[1].endswith(" 0")


def test_histogram_of_no_faults() -> None:
    assert list(drawing.histogram(Latency(()))) == ["no faults"]


def test_bar_shows_a_trace_of_what_is_little() -> None:
    assert (drawing.bar(0.0), drawing.bar(0.00001), drawing.bar(1.0)) == ("", "▏", "█" * 40)
    assert (drawing.bar(0.0, unicode=False), drawing.bar(0.00001, unicode=False)) == ("", "#")


def test_map_has_a_character_for_each_block_while_there_is_room() -> None:
    states = bytes([BlockState.ABSENT, BlockState.CLEAN, BlockState.PRIVATE, BlockState.FAILED, BlockState.FILLING])

    *picture, legend = drawing.residency_map(states, width=3)

    assert picture == ["·██", "··"]
    assert legend == "each character 1 block, in memory: · none  █ 1"


def test_map_stays_within_its_width_and_height() -> None:
    *picture, _ = drawing.residency_map(bytes(1_000_003), width=64, height=12)

    assert len(picture) <= 12
    assert max(map(len, picture)) == 64


def test_map_shades_by_the_fullest_part() -> None:
    states = bytes([0] * 4 + [2, 0, 0, 0] + [2, 2, 0, 0] + [2, 2, 2, 2])

    *picture, legend = drawing.residency_map(states, width=4, height=1)

    assert picture == ["·░▒█"]
    assert legend.endswith("· none  ░ 1  ▒ 2  ▓ 3  █ 4")


def test_legend_gives_ranges() -> None:
    assert (
        drawing.legend("·░▒▓█", 43, 14) == "each character 43 blocks, in memory: · none  ░ 1-3  ▒ 4-7  ▓ 8-10  █ 11-14"
    )


def test_map_needs_no_unicode() -> None:
    text = "".join(drawing.residency_map(bytes([2, 0]), unicode=False))

    assert text.isascii()
