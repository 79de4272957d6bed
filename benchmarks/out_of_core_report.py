"""What out_of_core found: a table for people, JSON for programs, a plot."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from out_of_core_child import Measured

_MIB = 1 << 20
_MEMMAP, _ADVISED = "memmap", "memmap, MADV_RANDOM"
_HEADINGS = (
    "workload",
    "file/limit",
    "page cache",
    "array",
    "s: median (min-max)",
    "x memmap",
    "x MADV_RANDOM",
    "faults",
    "MiB read",
    "MiB written",
    "CPU s: app",
    "pager",
    "MiB: peak",
    "anon+kernel",
    "region",
    "cache",
    "worker",
)
_COLOURS = {
    "ours, 64 KiB": "#c44e52",
    "ours, 4 KiB": "#dd8452",
    "ours, 1 MiB": "#8172b3",
    _MEMMAP: "#55a868",
    _ADVISED: "#4c72b0",
}


@dataclass
class Row:
    """One line of the table, and what each repetition measured."""

    workload: str
    overcommit: float
    cache: str
    variant: str
    runs: list[Measured] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        """By repetition."""
        return [run.seconds for run in self.runs]

    def ratios(self, others: Sequence[Row], variant: str) -> list[float]:
        """Seconds divided by those of another variant, measured in the same repetition."""
        same = (self.workload, self.overcommit, self.cache, variant)
        other = next((row for row in others if (row.workload, row.overcommit, row.cache, row.variant) == same), None)
        if other is None or other is self:
            return []
        return [mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=False)]


def table(rows: Sequence[Row], facts: Mapping[str, str]) -> str:
    """The run as text."""
    cells = [_HEADINGS, *(_cells(row, rows) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_HEADINGS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    told = [f"{name}: {value}" for name, value in facts.items()]
    failed = [f"FAILED  {row.workload}, {row.cache}, {row.variant}: {text}" for row in rows for text in row.failures]
    note = (
        "faults: answered by the pager; for a memmap all of the process's, major + minor. MiB read, written: by the "
        "pager from and to the file. region, cache, anon+kernel: counted in the cgroup when the work on an array was "
        "done. The checksums of all rows of a workload are equal."
    )
    return "\n".join([*told, "", *lines, "", note, *failed])


def _cells(row: Row, rows: Sequence[Row]) -> tuple[str, ...]:
    if not row.runs:
        return (row.workload, f"{row.overcommit:g}", row.cache, row.variant, "failed", *[""] * (len(_HEADINGS) - 5))
    ours = row.variant.startswith("ours")
    first = row.runs[0]
    return (
        row.workload,
        f"{row.overcommit:g}",
        row.cache,
        row.variant,
        _spread(row.seconds),
        _spread(row.ratios(rows, _MEMMAP)),
        _spread(row.ratios(rows, _ADVISED)),
        _middle(row, lambda run: run.faults) if ours else f"{first.major_faults} + {first.minor_faults}",
        _middle(row, lambda run: run.bytes_read / _MIB) if ours else "",
        _middle(row, lambda run: run.bytes_written / _MIB) if ours else "",
        f"{statistics.median(run.application_cpu_s for run in row.runs):.2f}",
        f"{statistics.median(run.pager_cpu_s for run in row.runs):.2f}" if ours else "",
        _middle(row, lambda run: run.peak / _MIB),
        _middle(row, lambda run: (run.anonymous + run.kernel) / _MIB),
        _middle(row, lambda run: run.region / _MIB),
        _middle(row, lambda run: run.page_cache / _MIB),
        "/".join(sorted({run.placement for run in row.runs})),
    )


def _middle(row: Row, what: Callable[[Measured], float]) -> str:
    return f"{statistics.median(map(what, row.runs)):.0f}"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    digits = 2 if max(values) >= 1 else 4
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def write(target: Path, rows: Sequence[Row], facts: Mapping[str, str]) -> None:
    """Write every figure as JSON."""
    records = [asdict(row) | {"seconds": row.seconds, "times_memmap": row.ratios(rows, _MEMMAP)} for row in rows]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"facts": dict(facts), "rows": records}, indent=1) + "\n", encoding="utf-8")


def plot(target: Path, rows: Sequence[Row]) -> None:
    """Draw a panel for each workload: a point at the median, a bar from least to most, on a log scale."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = target.stem  # the same run gives the same file
    names = list(dict.fromkeys(row.workload for row in rows))
    shown = {name: [row for row in rows if row.workload == name and row.runs] for name in names}
    figure = Figure(figsize=(9, 0.6 + 0.22 * len(rows) + 0.5 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), 1, squeeze=False, height_ratios=[len(shown[name]) + 1 for name in names])
    for panel, name in zip(panels[:, 0], names, strict=True):
        for place, row in enumerate(shown[name]):
            colour = _COLOURS[row.variant]
            panel.plot([min(row.seconds), max(row.seconds)], [place, place], color=colour, linewidth=3, alpha=0.4)
            panel.plot([statistics.median(row.seconds)], [place], "o", color=colour, markersize=5)
        labels = [f"x {row.overcommit:g}, {row.cache}, {row.variant}" for row in shown[name]]
        panel.set_yticks(range(len(labels)), labels, fontsize=7)
        panel.set_ylim(len(labels) - 0.4, -0.6)
        panel.set_xscale("log")
        panel.grid(axis="x", which="both", linewidth=0.3)
        panel.set_title(f"{name}: seconds (median; bar: min to max)", fontsize=9, loc="left")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, format="svg", metadata={"Date": None})
