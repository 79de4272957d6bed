"""Files larger than memory: `userfault.open_array` against `numpy.memmap`, both in a memory cgroup of the same limit.

Five workloads, each one NumPy function that takes either array:

- scan: everything is summed up, 1 MiB at a time;
- uniform, zipf: single items, each in a page chosen uniformly, or by Zipf's law (0.99 over the 4 KiB pages of the file,
  the hot ones scattered by a permutation);
- change: items in pages chosen uniformly are read, changed and written, and flushed to the disk;
- sort: ``examples/external_sort.py``: sorted runs, then a merge, into new files, flushed to the disk.

Each run is a process of its own in a cgroup of its own, which holds all that belongs to it: application, supervisor and
worker of the pager, the region's memory, page cache. Our budget is what the limit leaves (the output says how much that
is). Files are *cold*, taken out of the page cache before each run, or *hot*: all in the page cache, read there by this
process, outside of the limited cgroup, so that a memmap of it costs the limited cgroup nothing but page tables.
What is compared runs in turn: ours, memmap, ours, memmap.

    python benchmarks/out_of_core.py [--limit 128MiB] [--json FILE] [--plot FILE.svg] [--brief]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

import out_of_core_files as files
import out_of_core_report as report
import out_of_core_workloads as workloads
from memory_cgroup import limited
from out_of_core_child import Job, Measured
from out_of_core_report import Row
from userfault.blocks.geometry import parse_size

KIB, MIB = 1 << 10, 1 << 20
CACHES = ("cold", "hot")
VARIANTS = {
    "ours, 64 KiB": (64 * KIB, ""),
    "ours, 1 MiB": (1024 * KIB, ""),
    "memmap": (0, ""),
    "ours, 4 KiB": (4 * KIB, ""),
    "memmap, MADV_RANDOM": (0, "random"),
}
SCATTERED = ("ours, 64 KiB", "memmap", "ours, 4 KiB", "memmap, MADV_RANDOM")
WORKLOADS = {
    "scan": ("ours, 64 KiB", "ours, 1 MiB", "memmap"),
    "uniform": SCATTERED,
    "zipf": SCATTERED,
    "change": SCATTERED,
    "sort": ("ours, 64 KiB", "memmap"),
}
_HERE = Path(__file__).resolve().parent
_TIMEOUT_S = 900
_PROBE, _PROBE_READS = "uniform probe", 1024
_LEAST_BUDGET = 2 * MIB


@dataclass(frozen=True)
class Plan:
    """What the command line asks for."""

    limit: int
    overcommits: tuple[float, ...]
    repetitions: int
    reads: int
    workloads: tuple[str, ...]
    caches: tuple[str, ...]
    budget_at_most: int

    def size(self, overcommit: float) -> int:
        """Bytes of the file, whole MiB."""
        return int(self.limit * overcommit) // MIB * MIB

    @property
    def run(self) -> int:
        """Bytes that a sort has in ordinary memory."""
        return self.limit // 8


@dataclass
class Bench:
    """One file, and everything that is measured on it."""

    plan: Plan
    overcommit: float
    folder: Path
    processes: dict[int, int] = field(default_factory=dict)
    """What application and pager need beside the region, by block size, measured."""

    def __post_init__(self) -> None:
        """Make the file, and find out what the processes need."""
        self.path = self.folder / "data"
        files.make(self.path, self.plan.size(self.overcommit))
        self.scratch = self.folder / "scratch"
        self.scratch.mkdir()
        self._is_hot = False
        for block_size in sorted({block for block, _ in VARIANTS.values() if block}):
            files.cool(self.path)
            self.processes[block_size] = 0
            job = replace(self._job(_PROBE, block_size, ""), budget=self.plan.limit // 4)
            measured = self._child(job)
            self.processes[block_size] = measured.anonymous + measured.kernel

    def rows(self) -> Iterator[Row]:
        """Measure; yield the rows of one workload and one state of the page cache together."""
        for cache in self.plan.caches:
            for workload in self.plan.workloads:
                rows = [Row(workload, self.overcommit, cache, name) for name in WORKLOADS[workload]]
                print(f"{workload}, {cache}, x {self.overcommit:g}:", file=sys.stderr, flush=True)
                for _ in range(self.plan.repetitions):
                    for row in rows:
                        self._measure(row)
                compare(rows)
                yield from rows

    def budget(self, workload: str, block_size: int) -> int:
        """What the limit leaves: without processes, an eighth for page cache, and what the sort needs beside it.

        That is its ordinary memory, and once more an eighth: page cache that is being written cannot be given back.
        """
        spare = self.plan.limit // 8
        own = self.plan.run + spare if workload == "sort" else 0
        left = self.plan.limit - self.processes[block_size] - own - spare
        return min(max(left, _LEAST_BUDGET), self.plan.budget_at_most)

    def terms(self) -> str:
        """What the budgets are, and why, in words."""
        parts = [
            f"{block // KIB} KiB blocks: {self.budget('scan', block) / MIB:.0f} MiB, since application and pager take "
            f"{self.processes[block] / MIB:.0f}, and {self.plan.limit / 8 / MIB:.0f} are left for page cache"
            for block in sorted(self.processes)
        ]
        return "; ".join(parts) + f"; a sort has {self.budget('sort', 64 * KIB) / MIB:.0f} for two arrays"

    def _measure(self, row: Row) -> None:
        """Run it once, having seen to the page cache; sum up what it has left on the disk, and undo it."""
        self._prepare(row.cache)
        try:
            measured = self._child(self._job(row.workload, *VARIANTS[row.variant]))
        except RuntimeError as error:
            row.failures.append(str(error))
            return
        if row.workload == "change":
            measured.checksum = files.checksum(self.path)
            self._undo()
        elif row.workload == "sort":
            measured.checksum = files.checksum_in_order(self.scratch / "sorted")
        row.runs.append(measured)
        print(f"  {row.variant}: {measured.seconds:.2f} s", file=sys.stderr, flush=True)

    def _prepare(self, cache: str) -> None:
        """Cold or hot; what is hot already, and was read by this process, is left so."""
        if cache == "cold":
            files.cool(self.path)
        elif not self._is_hot or not files.is_hot(self.path):
            files.warm(self.path)
        self._is_hot = cache == "hot"
        for path in self.scratch.iterdir():
            path.unlink()

    def _undo(self) -> None:
        """Change the same items back."""
        array = np.memmap(self.path, np.uint64, mode="r+")
        workloads.change(array, np.load(self._order("change")))
        array.flush()

    def _order(self, workload: str) -> str:
        """The file with the items that a workload goes through, the same for all; empty for none."""
        if workload in ("scan", "sort"):
            return ""
        path = self.folder / f"{workload}.npy"
        if not path.exists():
            count = {_PROBE: _PROBE_READS, "change": self.plan.reads // 2}.get(workload, self.plan.reads)
            np.save(path, files.order(workload, self.path.stat().st_size, count))
        return str(path)

    def _job(self, workload: str, block_size: int, advice: str) -> Job:
        return Job(
            workload=workload,
            path=str(self.path),
            folder=str(self.scratch),
            order=self._order(workload),
            cgroup="",
            block_size=block_size,
            advice=advice,
            budget=self.budget(workload, block_size) if block_size else 0,
            run=self.plan.run,
        )

    def _child(self, job: Job) -> Measured:
        """Run a job in a cgroup of its own.

        Raises:
            RuntimeError: it ended otherwise than well; or no cgroup can be made.
        """
        with limited(self.plan.limit) as cgroup:
            asked = json.dumps(asdict(replace(job, cgroup=str(cgroup.folder))))
            command = cgroup.command([sys.executable, str(_HERE / "out_of_core_child.py"), asked])
            result = subprocess.run(
                command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, env=_environment()
            )
            peak, kills = cgroup.peak(), cgroup.kills()
        if result.returncode:
            last = (result.stderr.strip().splitlines() or [""])[-1]
            raise RuntimeError(f"status {result.returncode}, {kills} ended for want of memory: {last}")
        return replace(Measured(**json.loads(result.stdout)), peak=peak, kills=kills)


def _environment() -> dict[str, str]:
    """The sort is an example, and imported from there."""
    paths = [str(_HERE.parent / "examples"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def compare(rows: list[Row]) -> None:
    """See that every run has seen the same bytes.

    Raises:
        RuntimeError: one has not.
    """
    found = {measured.checksum: row for row in rows for measured in row.runs}
    if len(found) > 1:
        said = "; ".join(f"{row.variant}: {value:#x}" for value, row in found.items())
        raise RuntimeError(f"{rows[0].workload}, {rows[0].cache}: checksums differ: {said}")


def describe(plan: Plan, folder: Path) -> dict[str, str]:
    """What was measured where."""
    with limited(plan.limit) as cgroup:
        version = cgroup.version
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return {
        "machine": f"Linux {platform.release()}, Python {platform.python_version()}, NumPy {np.__version__}",
        "placement": f"CPUs {sorted(os.sched_getaffinity(0))} for everybody, nobody pinned; load before {load}",
        "limit": f"{plan.limit // MIB} MiB for all of a run together, by a memory cgroup of version {version}, no swap",
        "page cache": "cold: none of the file is in it (mincore); hot: all of it, read by the parent of the runs, "
        "outside of the limited cgroup and charged there",
        "read-ahead": f"{files.read_ahead(folder)} KiB (of the device; a memmap fault reads as much around it)",
        "random": f"{plan.reads} items read, {plan.reads // 2} changed; zipf: {files.ZIPF} over pages of {files.PAGE} "
        "bytes, scattered over the file",
    }


def measure(plan: Plan, parent: Path, facts: dict[str, str], rows: list[Row]) -> None:
    """Measure everything, one file after another; what has been found is in `facts` and `rows` at any time."""
    facts |= describe(plan, parent)
    for overcommit in plan.overcommits:
        with tempfile.TemporaryDirectory(dir=parent, prefix="out-of-core-") as folder:
            bench = Bench(plan, overcommit, Path(folder))
            facts[f"budget at x {overcommit:g}"] = bench.terms()
            for found in bench.rows():
                rows.append(found)  # noqa: PERF402  # one by one: there may be an interrupt


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Files larger than memory: userfault against numpy.memmap.")
    parser.add_argument("--limit", type=parse_size, default=128 * MIB, help="memory of each run (default: 128MiB)")
    parser.add_argument("--overcommit", type=float, nargs="+", default=[2, 4, 10], help="file size / limit")
    parser.add_argument("--repetitions", type=int, default=3, help="how often each row is measured (default: 3)")
    parser.add_argument(
        "--reads", type=int, help="items in random order (default: half as many as the limit has pages)"
    )
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=[*WORKLOADS])
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=[*CACHES])
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--plot", type=Path, help="file for a plot, SVG")
    parser.add_argument("--brief", action="store_true", help="small files, once: does it run at all?")
    parser.add_argument("--folder", type=Path, help="where the files are made, on a disk (default: the usual place)")
    return parser.parse_args(arguments)


def plan_of(options: argparse.Namespace) -> Plan:
    """What to measure. Brief: a file that is smaller than the limit, but larger than our budget."""
    plan = Plan(
        limit=options.limit,
        overcommits=tuple(options.overcommit),
        repetitions=options.repetitions,
        reads=options.reads or options.limit // files.PAGE // 2,
        workloads=tuple(options.workloads),
        caches=tuple(options.caches),
        budget_at_most=options.limit,
    )
    if not options.brief:
        return plan
    return replace(plan, overcommits=(0.125,), repetitions=1, reads=1024, budget_at_most=_LEAST_BUDGET)


def _stop(number: int, _: object) -> None:
    """Once: whoever is impatient, or is heard twice (timeout(1)), must not interrupt the cleaning up."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; return the exit status."""
    options = parse(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):  # also in the background of a shell, which has SIGINT ignored
        signal.signal(number, _stop)
    facts: dict[str, str] = {}
    rows: list[Row] = []
    status = 0
    try:
        measure(plan_of(options), options.folder or Path(tempfile.gettempdir()), facts, rows)
    except (RuntimeError, OSError) as error:
        print(f"out_of_core: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt as stopped:  # cgroups and files are gone; what was found by now took a while
        status = 128 + int(stopped.args[0])
    if rows:
        print(report.table(rows, facts))
        if options.json:
            report.write(options.json, rows, facts)
        if options.plot:
            report.plot(options.plot, rows)
    return status or int(any(row.failures for row in rows))


if __name__ == "__main__":
    sys.exit(main())
