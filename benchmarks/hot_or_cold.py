"""How to tell whether a block of a file can be copied without waiting; decides design/hot-or-cold.md.

Sections:

    check     what one answer costs on a hot file, by block size, order, folio size
    install   the same with the work it is for: the check, and the COPY that puts the block into a region
    cold      answers about a cold file, how long they take, and what they make the kernel read
    flight    whether a block that is said to be hot is still being read, and how long a copy then waits
    rights    what a user who may only read the file is told
    pressure  how long a hot page stays hot in a small cgroup (needs root)

    python benchmarks/hot_or_cold.py [--quick] [--cpu N] [--folder DIR] [section ...]

Candidates are interleaved, in fresh order for every repetition; figures are medians and, in brackets, the
least and the greatest. DIR must be on a file system with a disk behind it.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from cached_file import KIB, MIB, PAGE, Subject, cool, make_file, offsets_of, warm
from userfault.errors import Error
from userfault.kernel import memfd, memory
from userfault.kernel.abi import MADV_DONTNEED, CopyMode, RegisterMode
from userfault.kernel.userfaultfd import Userfaultfd
from userfault.stores.page_cache import cached

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

BLOCKS = (4 * KIB, 64 * KIB, 2 * MIB)


@dataclass
class Settings:
    """What the command line says, and what follows from it."""

    size: int
    repetitions: int
    blocks_each: int
    samples: int
    seconds: float
    path: str


# -- measuring -----------------------------------------------------------------------------------------------


def spread(values: list[float], unit: float = 1.0) -> str:
    """Return median (least-greatest) in a unit."""
    return f"{statistics.median(values) / unit:.2f} ({min(values) / unit:.2f}-{max(values) / unit:.2f})"


def rounds(
    candidates: Mapping[str, Callable[[int, int], object]],
    offsets: Callable[[], list[int]],
    length: int,
    repetitions: int,
    before: Callable[[str], None] = lambda _: None,
) -> dict[str, list[float]]:
    """Return nanoseconds for each call, one figure for each repetition."""
    result: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repetitions):
        for name in random.sample(list(candidates), len(candidates)):
            before(name)
            blocks, call = offsets(), candidates[name]
            start = time.perf_counter_ns()
            for offset in blocks:
                call(offset, length)
            result[name].append((time.perf_counter_ns() - start) / len(blocks))
    return result


def kinds(subject: Subject, settings: Settings) -> Iterator[tuple[str, str, int]]:
    """Yield folio size, order and block size of each table row, with the file made so."""
    for folios in ("large", "small"):
        warm(subject, small=folios == "small")
        for length in BLOCKS:
            for order in ("sequential", "random"):
                yield folios, order, length
        still = cached(subject.fd, 0, settings.size)
        print(f"    (after these rows the file was {'still wholly' if still else 'no longer wholly'} cached)")


def check(subject: Subject, settings: Settings) -> None:
    """Print what one answer costs on a hot file."""
    candidates = {
        name: getattr(subject, name) for name in ("nothing", "mincore", "cachestat", "probe", "nowait", "locate")
    }

    def before(name: str) -> None:
        if name == "mincore":  # as it is for a block whose fault is the first to touch it
            memory.advise(subject.base, subject.size, MADV_DONTNEED)

    print("\ncheck: microseconds for one answer, the call included")
    for folios, order, length in kinds(subject, settings):
        found = rounds(
            candidates,
            partial(offsets_of, subject, length, settings.blocks_each, order),
            length,
            settings.repetitions,
            before,
        )
        cells = "  ".join(f"{name} {spread(values, 1e3)}" for name, values in found.items())
        print(f"  {length // KIB:5} KiB {order:10} {folios} folios: {cells}")


# -- install -------------------------------------------------------------------------------------------------


class Destination:
    """A registered piece of memory to copy into, as a region has it."""

    def __init__(self, size: int) -> None:
        self.size, self.fd = size, memfd.create("hot-or-cold", size)
        self.address = memory.map_memory(size, fd=self.fd)
        self.uffd = Userfaultfd.open()
        self.uffd.register(self.address, size, RegisterMode.MISSING)

    def copy(self, offset: int, source: int, length: int) -> None:
        """Install a block."""
        self.uffd.copy(self.address + offset, source, length, CopyMode.DONTWAKE)

    def empty(self) -> None:
        """Take every page out again."""
        memfd.punch_hole(self.fd, 0, self.size)

    def close(self) -> None:
        """Unmap and close."""
        self.uffd.close()
        memory.unmap(self.address, self.size)
        os.close(self.fd)


def install(subject: Subject, settings: Settings) -> None:
    """Print what check and COPY together cost on a hot file."""
    destination, staging = Destination(subject.size), memory.address_of(subject.staging)

    def unchecked(offset: int, length: int) -> None:
        destination.copy(offset, subject.base + offset, length)

    def staged(offset: int, length: int) -> None:
        if subject.nowait(offset, length):
            destination.copy(offset, staging, length)

    def asked(offset: int, length: int) -> None:
        if subject.cachestat(offset, length):
            destination.copy(offset, subject.base + offset, length)

    def stored(offset: int, length: int) -> None:
        address = subject.store.locate(offset, length)
        if address:
            destination.copy(offset, address, length)
        elif subject.store.read_now(offset, subject.staging[:length]):
            destination.copy(offset, staging, length)

    def before(name: str) -> None:
        destination.empty()
        memory.advise(subject.base, subject.size, MADV_DONTNEED)  # nobody's mapping has a head start
        if name == "FileStore":
            subject.store.close()

    candidates = {"no check": unchecked, "nowait+staging": staged, "cachestat": asked, "FileStore": stored}
    print("\ninstall: check and UFFDIO_COPY of a block, microseconds; x: times 'no check'")
    for folios, order, length in kinds(subject, settings):
        found = rounds(
            candidates,
            partial(offsets_of, subject, length, settings.blocks_each, order),
            length,
            settings.repetitions,
            before,
        )
        floor = statistics.median(found["no check"])
        cells = "  ".join(
            f"{name} {spread(values, 1e3)} x{statistics.median(values) / floor:.2f}" for name, values in found.items()
        )
        print(f"  {length // KIB:5} KiB {order:10} {folios} folios: {cells}")
    destination.close()


# -- cold files ----------------------------------------------------------------------------------------------


def cold(subject: Subject, settings: Settings) -> None:
    """Print what candidates answer on a cold file, and what that does."""
    print("\ncold: microseconds for an answer: median, 99th percentile, most; pages that the kernel then read")
    for length in BLOCKS:
        for name in ("mincore", "cachestat", "probe", "nowait", "store_now", "pread"):
            cool(subject)
            answers, took = [], []
            for offset in offsets_of(subject, length, settings.samples, "random"):
                start = time.perf_counter_ns()
                answers.append(getattr(subject, name)(offset, length))
                took.append((time.perf_counter_ns() - start) / 1e3)
            took.sort()
            time.sleep(0.05)  # for reads that it began
            pages = sum(bool(cached(subject.fd, offset, PAGE)) for offset in range(0, subject.size, PAGE))
            figures = f"{statistics.median(took):8.1f} {took[int(len(took) * 0.99)]:9.1f} {took[-1]:9.1f}"
            print(
                f"  {length // KIB:5} KiB {name:10} hot {sum(answers):3} of {len(answers)}:  {figures}   {pages} pages"
            )


def flight(subject: Subject, settings: Settings) -> None:
    """Print what is said while the kernel reads ahead: ask about a block, then copy it."""
    print("\nflight: going through a cold file by 64 KiB: blocks said to be hot; those a copy had to wait for")
    offsets = range(0, min(subject.size, 64 * MIB), 64 * KIB)
    warm(subject, small=False)
    usual = statistics.median(copy_time(subject, offset) for offset in offsets)
    for name in ("mincore", "cachestat", "probe", "nowait", "store_now"):
        said, waits = 0, []
        for _ in range(settings.repetitions):
            cool(subject)
            for offset in offsets:
                if getattr(subject, name)(offset, 64 * KIB):
                    said += 1
                    took = copy_time(subject, offset)
                    if took > 3 * usual:
                        waits.append(took - usual)
                else:
                    subject.pread(offset, 64 * KIB)
        most = f"median {statistics.median(waits):.0f}, most {max(waits):.0f} us" if waits else "none"
        print(f"  {name:10} hot {said:5}, waited for {len(waits):5}: {most}   (a copy takes {usual:.0f} us)")


def copy_time(subject: Subject, offset: int) -> float:
    """Return the microseconds that reading one block takes."""
    start = time.perf_counter_ns()
    subject.pread(offset, 64 * KIB)
    return (time.perf_counter_ns() - start) / 1e3


# -- rights and pressure -------------------------------------------------------------------------------------


def rights(subject: Subject, settings: Settings) -> None:
    """Print what a user who may only read is told about a cold file."""
    print("\nrights: asked about a cold file by a user who neither owns it nor may write to it")
    if os.geteuid():
        print("  (needs root, to become somebody else)")
        return
    cool(subject)
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        other = Subject(settings.path, settings.size)
        answer = cached(other.fd, 0, 2 * MIB)
        print(f"  mincore: {'hot' if other.mincore(0, 2 * MIB) else 'cold'}")
        print(f"  cachestat: {'refused' if answer is None else 'hot' if answer else 'cold'}")
        print(f"  nowait: {'hot' if other.nowait(0, 2 * MIB) else 'cold'}")
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(pid, 0)


def make_cgroup(limit: int) -> str:
    """Make a memory cgroup with a limit, and return its folder; empty if that cannot be had."""
    for parent, name in (
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
        ("/sys/fs/cgroup", "memory.max"),
    ):
        folder = f"{parent}/hot-or-cold-{os.getpid()}"
        try:
            os.mkdir(folder)
            with open(f"{folder}/{name}", "w") as file:
                file.write(str(limit))
            return folder
        except OSError:
            if os.path.isdir(folder):
                os.rmdir(folder)
    return ""


def stream(path: str, seconds: float) -> None:
    """Read a file again and again."""
    fd, end, offset = os.open(path, os.O_RDONLY), time.monotonic() + seconds, 0
    while time.monotonic() < end:
        offset = offset + MIB if os.pread(fd, MIB, offset) else 0
    os._exit(0)


def pressure(subject: Subject, settings: Settings) -> None:
    """Print how much of what was hot stays so while a neighbour streams a file through a full cgroup."""
    print("\npressure: 16 MiB read (once; twice) in a cgroup of 64 MiB through which a neighbour streams a file")
    folder = make_cgroup(64 * MIB)
    if not folder:
        print("  (needs root and a memory cgroup)")
        return
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        with open(f"{folder}/cgroup.procs", "w") as file:
            file.write(str(os.getpid()))
        other = settings.path + ".stream"
        make_file(other, 4 * settings.size)
        neighbour = os.fork()
        if not neighbour:
            stream(other, settings.seconds)
        survive(subject, neighbour)
        os.unlink(other)
        os._exit(0)
    os.waitpid(pid, 0)
    os.rmdir(folder)


def survive(subject: Subject, neighbour: int) -> None:
    """Look at what stays for as long as the neighbour runs."""
    ages = (1, 5, 10, 50, 250)
    left: dict[tuple[int, int], list[float]] = {(times, age): [] for times in (1, 2) for age in ages}
    while os.waitpid(neighbour, os.WNOHANG) == (0, 0):
        for times in (1, 2):
            cool(subject)
            for _ in range(times):
                for offset in range(0, 16 * MIB, MIB):
                    subject.pread(offset, MIB)
            start = time.monotonic()
            blocks = [o for o in range(0, 16 * MIB, 64 * KIB) if cached(subject.fd, o, 64 * KIB)]
            for age in ages:
                while time.monotonic() - start < age / 1e3:
                    pass
                still = sum(bool(cached(subject.fd, o, 64 * KIB)) for o in blocks)
                left[times, age].append(100 * still / max(len(blocks), 1))
    for times in (1, 2):
        row = "  ".join(f"{age} ms {spread(left[times, age])} %" for age in ages)
        print(f"  read {'once ' if times == 1 else 'twice'}: still there after {row}")
    sys.stdout.flush()


# -- the program ---------------------------------------------------------------------------------------------

SECTIONS = {function.__name__: function for function in (check, install, cold, flight, rights, pressure)}


def main() -> int:
    """Run the sections that were asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="a few seconds: to see that it runs")
    parser.add_argument("--cpu", type=int, default=-1, help="the CPU to stay on; default: the last one")
    parser.add_argument("--folder", default=None, help="where to make the files")
    parser.add_argument("sections", nargs="*", choices=[[], *SECTIONS], help="default: all")
    options = parser.parse_args()
    cpu = options.cpu if options.cpu >= 0 else max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpu})
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        os.chmod(folder, 0o755)
        path = f"{folder}/data"
        quick: bool = options.quick
        settings = Settings(*((16 * MIB, 2, 128, 20, 1.0) if quick else (256 * MIB, 7, 32768, 300, 15.0)), path=path)
        make_file(path, settings.size)
        os.chmod(path, 0o644)
        subject = Subject(path, settings.size)
        print(
            f"Linux {os.uname().release}, Python {sys.version.split()[0]}, {settings.size // MIB} MiB file; "
            f"placement: one thread, pinned to CPU {cpu} of {os.cpu_count()}; load {os.getloadavg()[0]:.1f}"
        )
        try:
            for name in options.sections or SECTIONS:
                SECTIONS[name](subject, settings)
                sys.stdout.flush()
        except Error as error:
            print(f"cannot measure: {error}", file=sys.stderr)
            return 1
        finally:
            subject.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
