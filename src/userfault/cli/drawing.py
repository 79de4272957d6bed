"""Pictures made of characters: how long faults took, and which parts of a region are in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from userfault.blocks.states import RESIDENT
from userfault.cli import figures

if TYPE_CHECKING:
    from userfault import Latency

_BAR = 40
_SHADES = "·░▒▓█"
_ASCII_SHADES = ".:+*#"
_EIGHTHS = " ▏▎▍▌▋▊▉█"
RESIDENT_BYTES = bytes(RESIDENT)


def histogram(latency: Latency, *, unicode: bool = True) -> Iterator[str]:
    """Yield the lines of a histogram, a doubling of the latency to each."""
    octaves: Counter[int] = Counter()
    for bound, faults in latency.buckets:
        octaves[_octave(bound)] += faults
    if not octaves:
        yield "no faults"
        return
    most = max(octaves.values())
    for octave in range(min(octaves), max(octaves) + 1):
        faults = octaves[octave]
        low, high = figures.duration(2.0**octave / 1e9), figures.duration(2.0 ** (octave + 1) / 1e9)
        yield f"{low:>7} to {high:<7} {faults:>7}  {bar(faults / most, unicode=unicode)}".rstrip()


def _octave(bound: int) -> int:
    """Return the power of two below a bucket's upper bound in nanoseconds."""
    return (bound - 1).bit_length() - 1


def bar(part: float, *, unicode: bool = True) -> str:
    """Return a bar as long as `part`, 0 to 1; what is not nothing is seen."""
    if not unicode:
        return "#" * (max(1, round(part * _BAR)) if part else 0)
    eighths = max(1, round(part * _BAR * 8)) if part else 0
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def residency_map(states: bytes, *, width: int = 64, height: int = 12, unicode: bool = True) -> Iterator[str]:
    """Yield the lines of a map of a region, and a last one that explains it.

    Args:
        states: A byte per block, as `Region.residency()` gives them.
        width: Characters in a line.
        height: The most lines.
        unicode: Whether shades can be shown.
    """
    shades = _SHADES if unicode else _ASCII_SHADES
    per_cell = max(1, -(-len(states) // (width * height)))
    cells = [_resident(states[at : at + per_cell]) for at in range(0, len(states), per_cell)]
    top = max(cells)
    text = "".join(shades[_shade(count, top)] for count in cells)
    for at in range(0, len(text), width):
        yield text[at : at + width]
    yield legend(shades, per_cell, top)


def _resident(states: bytes) -> int:
    return len(states) - len(states.translate(None, RESIDENT_BYTES))


def _shade(count: int, top: int) -> int:
    """Return which of five shades a cell has: the first for nothing, the others in even steps up to the fullest."""
    return -(-4 * count // top) if count else 0


def legend(shades: str, per_cell: int, top: int) -> str:
    """Explain the shades: how many blocks in memory each of them stands for."""
    ends = [top * i // 4 for i in range(5)]
    steps = [f"{shades[i]} {_span(ends[i - 1] + 1, ends[i])}" for i in range(1, 5) if ends[i] > ends[i - 1]]
    return f"each character {figures.count(per_cell, 'block')}, in memory: {'  '.join([f'{shades[0]} none', *steps])}"


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
