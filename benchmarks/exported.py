"""What a fault costs through an exported descriptor, with a C program as the pager that knows read, write and poll.

One run measures, in turn and several times over so that a slow minute of the machine is shared by all, at 4 KiB:

- the exported descriptor: ``examples/c_pager.c`` answers, and between it and the memory stands the pager's worker;
- our own pager, ``userfault.Region`` over a ``FileStore``: no program beside the worker;
- the reference pager in C (``reference/pager.c``), a process on a userfaultfd: no worker beside the program.

So a fault goes through three processes in the first case, and through two in the others. All are touched by the same
C loop, read the same file, which is in the page cache, and each page is touched once. Where nothing is said the toucher
is not pinned, our worker follows it, and the program is where the scheduler puts it. Compare ratios, not microseconds.

    python benchmarks/exported.py --output results [--quick]
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

import fault_latency
import report
import userfault
from fault_latency import FREE, ORDERS, PAGE, Bench, Scale, pinned
from measurements import Check, Row
from programs import compile_program
from userfault.kernel import memfd
from userfault.protocol import MADV_NOUSERFAULT, MADV_USERFAULT, UFFD_CLOEXEC

_PROGRAM = Path(__file__).parents[1] / "examples" / "c_pager.c"
_EXPORTED, _OURS, _REFERENCE = "exported, C program", "userfault", "C process"
_DEFAULT, _ALL_HERE = "default", "all on one core"


class ExportedBench(Bench):
    """The rows of one run over one file."""

    def __init__(self, scale: Scale, folder: Path) -> None:
        super().__init__(scale, folder)
        self.program = compile_program(folder / "c_pager", str(_PROGRAM))

    def rows(self, *, required_only: bool) -> list[Row]:
        """Every row in measuring order: what is compared stands close together."""
        return [row for order in ORDERS[: 1 if required_only else None] for row in self._order_rows(order)]

    def _order_rows(self, order: str) -> Iterator[Row]:
        yield self._reference("process", PAGE, order, self.here)
        yield self._exported(order, _DEFAULT, FREE, FREE)
        yield self._ours(PAGE, order, FREE)
        yield self._exported(order, _ALL_HERE, self.here, self.here)
        if self.there != FREE:
            yield self._exported(order, "program on the other core", self.here, self.there)
            yield self._reference("process", PAGE, order, self.there)
        yield self._reference("process", PAGE, order, FREE)

    def _exported(self, order: str, placement: str, toucher_cpu: int, program_cpu: int) -> Row:
        row = Row(_EXPORTED, placement, PAGE, order, self.scale.size(PAGE), lambda: (0, 0))
        row.measure = partial(self._through_program, row, toucher_cpu, program_cpu)
        return row

    def _through_program(self, row: Row, toucher_cpu: int, program_cpu: int) -> tuple[int, int]:
        """Export memory, touch its last page untimed (all sides then run), and the rest by the clock."""
        pages = self.programs.order(row.size, PAGE, shuffled=row.order == "shuffled")
        with pinned(toucher_cpu), exported_memory(row.size + PAGE) as exported, self._started(exported, program_cpu):
            self.programs.touch(exported.address, np.array([row.size], np.uint64))
            measured = self.programs.touch(exported.address, pages)
            exported.close()  # the program finds the end, and ends
        return measured

    @contextmanager
    def _started(self, exported: userfault.Exported, cpu: int) -> Iterator[None]:
        """Run the program on one CPU; `FREE`: on any."""
        fds = (exported.fileno(), exported.memory_fd)
        command = [str(self.program), *map(str, (*fds, exported.address, exported.size)), str(self.source)]
        with subprocess.Popen(command, pass_fds=fds, stdout=subprocess.DEVNULL) as program:
            os.sched_setaffinity(program.pid, self.cpus if cpu == FREE else {cpu})  # it inherits the toucher's
            try:
                yield
            finally:
                if program.poll() is None and not exported.closed:
                    program.kill()
        if program.returncode:
            raise RuntimeError(f"c_pager ended with status {program.returncode}")


@contextmanager
def exported_memory(size: int) -> Iterator[userfault.Exported]:
    """Make memory of so many bytes, and export it."""
    fd = memfd.create("benchmark", size)
    memory = mmap.mmap(fd, size)
    os.close(fd)
    descriptor = userfault.userfaultfd(UFFD_CLOEXEC)
    userfault.madvise(memory, MADV_USERFAULT)
    descriptor.register(memory)
    with descriptor.export() as exported:
        yield exported
    userfault.madvise(memory, MADV_NOUSERFAULT)
    memory.close()


def ratios(rows: list[Row]) -> list[Check]:
    """The exported descriptor against the two others; nothing is promised."""
    by_key = {(row.pager, row.placement, row.order): row.nanoseconds for row in rows}
    found = []
    for order in ORDERS:
        for placement, other in (
            (_DEFAULT, (_OURS, _DEFAULT)),
            (_DEFAULT, (_REFERENCE, "same core")),
            (_ALL_HERE, (_REFERENCE, "same core")),
            ("program on the other core", (_REFERENCE, "other core")),
        ):
            mine, theirs = by_key.get((_EXPORTED, placement, order)), by_key.get((*other, order))
            if mine and theirs:
                name = f"4 KiB {order}: exported [{placement}] / {other[0]} [{other[1]}]"
                found.append(Check(name, [a / b for a, b in zip(mine, theirs, strict=True)]))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; return the exit status."""
    options = fault_latency.parse(arguments, "What a fault costs through an exported descriptor, against other pagers.")
    scale = fault_latency.QUICK if options.quick else fault_latency.FULL
    try:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            bench = ExportedBench(scale, Path(folder))
            rows = bench.rows(required_only=options.required)
            fault_latency.run(bench, rows, options.repetitions or scale.repetitions)
    except (RuntimeError, userfault.errors.Error) as error:
        print(f"exported: {error}", file=sys.stderr)
        return 2
    found, machine = ratios(rows), fault_latency.describe_machine(bench)
    print(report.table(rows, found, machine))
    if options.output:
        report.write(options.output / "exported", rows, found, machine)
    return 0


if __name__ == "__main__":
    sys.exit(main())
