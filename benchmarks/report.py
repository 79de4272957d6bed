"""Rows and ratios as a table for people, JSON for programs, and a plot."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from measurements import Check, Row

_HEADINGS = ("pager", "placement", "block", "order", "µs a fault: median (min-max)", "MB/s", "x C same core")
_COLOURS = {
    "C process": "#4c72b0",
    "C thread": "#8172b3",
    "userfault": "#c44e52",
    "userfault, NumPy": "#dd8452",
    "exported, C program": "#937860",
    "numpy.memmap": "#55a868",
    "bulk COPY": "#808080",
}


def table(rows: Sequence[Row], checks: Sequence[Check], machine: Mapping[str, str | int]) -> str:
    """The run as text: a line for each row, then one for each promised ratio."""
    cells = [_HEADINGS, *(_cells(row, _reference(row, rows)) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_HEADINGS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    facts = ", ".join(f"{name} {value}" for name, value in machine.items())
    return "\n".join([facts, "", *(line.rstrip() for line in lines), "", *map(_verdict, checks)])


def write(target: Path, rows: Sequence[Row], checks: Sequence[Check], machine: Mapping[str, str | int]) -> list[Path]:
    """Write the run as TARGET.json and, where matplotlib is installed, as TARGET.svg; return the files."""
    target.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "machine": dict(machine),
        "rows": [_record(row) for row in rows],
        "checks": [
            {"name": c.name, "ratio": c.ratio, "ratios": c.ratios, "bound": c.bound, "kept": c.kept} for c in checks
        ],
    }
    data = target.with_suffix(".json")
    data.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return [data, *_plot(target.with_suffix(".svg"), rows)]


def _reference(row: Row, rows: Sequence[Row]) -> Row | None:
    """The C process on the toucher's core with the same block and order."""
    wanted = ("C process", "same core", row.block, row.order)
    return next((r for r in rows if (r.pager, r.placement, r.block, r.order) == wanted), None)


def _cells(row: Row, reference: Row | None) -> tuple[str, ...]:
    micros = [value / 1000 for value in row.per_fault]
    ratio = statistics.median(row.per_fault) / statistics.median(reference.per_fault) if reference else None
    return (
        row.pager,
        f"{row.placement} [{row.notes['placement']}]" if "placement" in row.notes else row.placement,
        _block(row.block),
        row.order,
        f"{statistics.median(micros):10.2f} ({min(micros):.2f}-{max(micros):.2f})",
        f"{row.megabytes_per_s:7.0f}",
        f"{ratio:.3g}" if ratio else "",
    )


def _block(size: int) -> str:
    return f"{size >> 20} MiB" if size >> 20 else f"{size >> 10} KiB"


def _verdict(check: Check) -> str:
    sign = "<=" if check.at_most else ">="
    spread = f"({min(check.ratios):.2f}-{max(check.ratios):.2f})"
    if check.bound is None:
        return f"{check.name}: {check.ratio:.2f} {spread}"
    verdict = "kept  " if check.kept else "MISSED"
    return f"{verdict}  {check.name}: {check.ratio:.2f} {spread}, promised {sign} {check.bound}"


def _record(row: Row) -> dict[str, object]:
    return {
        "pager": row.pager,
        "placement": row.placement,
        "block": row.block,
        "order": row.order,
        "bytes": row.size,
        "nanoseconds": row.nanoseconds,
        "nanoseconds_per_fault": statistics.median(row.per_fault),
        "megabytes_per_s": row.megabytes_per_s,
        "notes": row.notes,
    }


def _plot(target: Path, rows: Sequence[Row]) -> list[Path]:
    """One panel for each block size: a point at the median, a bar from least to most, on a log scale."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullFormatter
    except ImportError:
        return []
    mpl.rcParams["svg.hashsalt"] = target.stem  # the same run gives the same file
    blocks = sorted({row.block for row in rows})
    shown = {block: [row for row in rows if row.block == block] for block in blocks}
    figure = Figure(figsize=(9, 0.6 + 0.32 * len(rows) + 0.5 * len(blocks)), layout="constrained")
    panels = figure.subplots(len(blocks), 1, squeeze=False, height_ratios=[len(shown[b]) + 1 for b in blocks])
    for panel, block in zip(panels[:, 0], blocks, strict=True):
        for place, row in enumerate(shown[block]):
            values = [value / 1000 for value in row.per_fault]
            colour = _COLOURS.get(row.pager, "black")
            panel.plot([min(values), max(values)], [place, place], color=colour, linewidth=3, alpha=0.4)
            panel.plot([statistics.median(values)], [place], "o", color=colour, markersize=5)
        panel.set_yticks(
            range(len(shown[block])),
            [f"{row.pager}, {row.placement}, {row.order}" for row in shown[block]],
            fontsize=7,
        )
        panel.set_ylim(len(shown[block]) - 0.4, -0.6)
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(axis="x", which="both", linewidth=0.3)
        panel.set_title(f"{_block(block)} blocks, µs a fault (median; bar: min to max)", fontsize=9, loc="left")
    figure.savefig(target, metadata={"Date": None})
    return [target]
