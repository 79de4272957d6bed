"""Numbers as people read them, and sizes as people write them."""

from __future__ import annotations

import argparse

from userfault.blocks.geometry import parse_size

_UNITS = ("", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def size(number: int) -> str:
    """Return bytes in the largest unit that leaves at least one: `"2.0 GiB"`."""
    if number < 1024:
        return count(number, "byte")
    power = min((number.bit_length() - 1) // 10, len(_UNITS) - 1)
    value = number / 1024**power
    digits = 0 if value >= 100 or value == int(value) else 1
    return f"{value:.{digits}f} {_UNITS[power]}"


def duration(seconds: float) -> str:
    """Return a time with two or three digits: `"1.3 s"`, `"54 ms"`, `"8.2 µs"`."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        value = seconds * factor
        if value >= 1:
            return f"{value:.{0 if value >= 10 else 1}f} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def count(number: int, noun: str = "") -> str:
    """Return a number with its digits in threes, and a noun in its plural unless there is one: `"1,000 rows"`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}" if noun else f"{number:,}"


def share(part: int, whole: int) -> str:
    """Return a percentage that is 0 or 100 only if it is just that."""
    if not part or part == whole:
        return "100 %" if part else "0 %"
    return f"{min(max(100 * part / whole, 0.1), 99.9):.1f} %"


def size_argument(text: str) -> int:
    """Parse a size on the command line: bytes, or text such as `2GiB`."""
    try:
        return parse_size(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write bytes, or 64KiB, 2GiB") from None
