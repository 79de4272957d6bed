"""Thousands of faults through an exported descriptor, answered by examples/c_pager.c: none lost, every byte right.

Also when the worker behind the descriptor is killed in the middle, or the C program.
"""

from __future__ import annotations

import functools
import mmap
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import userfault
from userfault.kernel import PAGE_SIZE, memfd
from userfault.protocol import MADV_NOUSERFAULT, MADV_USERFAULT, UFFD_CLOEXEC
from userfault.testing import poke, run_child, touch

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler: c_pager.c cannot be compiled")

_SOURCE = Path(__file__).parents[2] / "examples" / "c_pager.c"
_SHORT = 100
"""So many bytes of the last page are behind the end of the file: zeros."""
_SHARES = (0.2, 0.5, 0.8)
"""When something is killed: when the fastest thread has done so much."""
_THREADS, _MARK = 4, b"\xa5"
_QUIET_S = 10.0
_LIMIT_S = 0.006
"""For each page, on a busy machine."""


class Made(NamedTuple):
    """The program and the file whose bytes the memory has."""

    program: Path
    file: Path
    pages: int


class Outcome(NamedTuple):
    """What the touching threads found, and what was counted when all was quiet."""

    wrong: list[int]
    done: list[int]
    fdinfo: dict[str, str]
    said: str
    status: int


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Made]:
    pages = 100_000 if request.config.getoption("--soak") else 10_000
    folder = tmp_path_factory.mktemp("exported")
    made = Made(folder / "c_pager", folder / "bytes.bin", pages)
    subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-Werror", str(_SOURCE), "-o", str(made.program)], check=True)
    made.file.write_bytes(np.random.default_rng(5).bytes(pages * PAGE_SIZE - _SHORT))
    yield made
    shutil.rmtree(folder)  # hundreds of megabytes in a soak run


class Scene:
    """Memory that is exported, its pager in C, and threads that touch all of it. Lives in a child process."""

    def __init__(self, made: Made) -> None:
        self.made = made
        size = made.pages * PAGE_SIZE
        fd = memfd.create("exported", size)
        self.memory = mmap.mmap(fd, size)
        os.close(fd)
        self.file = os.open(made.file, os.O_RDONLY | os.O_CLOEXEC)
        descriptor = userfault.userfaultfd(UFFD_CLOEXEC)
        userfault.madvise(self.memory, MADV_USERFAULT)
        descriptor.register(self.memory)
        self.exported = descriptor.export()
        self.program = self.start_program()
        self.wrong: list[int] = []
        self.done = [0] * _THREADS
        """How many pages each thread has read."""

    def start_program(self) -> subprocess.Popen[str]:
        exported = self.exported
        fds = (exported.fileno(), exported.memory_fd)
        words = [self.made.program, *fds, exported.address, exported.size, self.made.file]
        return subprocess.Popen([*map(str, words)], pass_fds=fds, stdout=subprocess.PIPE, text=True)

    def touch_all(self, place: int, seed: int, read: Callable[[int], bytes]) -> None:
        """Read every page once, in the order of a seed, and compare."""
        for number in random.Random(seed).sample(range(self.made.pages), self.made.pages):
            if read(number * PAGE_SIZE) != self.expected(number):
                self.wrong.append(number)
            self.done[place] += 1

    def expected(self, number: int) -> bytes:
        return os.pread(self.file, PAGE_SIZE, number * PAGE_SIZE).ljust(PAGE_SIZE, b"\0")

    def write_all(self, place: int) -> None:
        """Read every page, and write one byte of one's own into it; the others do so at the same time."""
        for number in random.Random(place // 2).sample(range(self.made.pages), self.made.pages):
            address = self.exported.address + number * PAGE_SIZE
            if touch(address, PAGE_SIZE)[_THREADS:] != self.expected(number)[_THREADS:]:
                self.wrong.append(number)
            poke(address + place, _MARK)
            self.done[place] += 1

    def check_writes(self) -> None:
        """Whatever was written is there: no page was filled a second time."""
        for number in range(self.made.pages):
            if self.memory[number * PAGE_SIZE : number * PAGE_SIZE + _THREADS] != _THREADS * _MARK:
                self.wrong.append(number)

    def touch_in_threads(self, seeds: tuple[int, ...]) -> list[threading.Thread]:
        """Begin to touch everything in several threads, with the GIL released; those of one seed in the same order."""
        read = functools.partial(_touch, self.exported.address)
        return [_start(self.touch_all, place, seed, read) for place, seed in enumerate(seeds)]

    def kill_in_the_middle(self, victims: tuple[str, ...]) -> None:
        """Kill the program, the worker or both, one after the other while the threads are at work."""
        for victim, share in zip(victims, _SHARES, strict=True):
            while max(self.done) < share * self.made.pages:
                time.sleep(0.001)
            if "program" in victim:
                self.program.kill()
                self.program.communicate()
            if "worker" in victim:
                os.kill(userfault.default_pager().worker_pid, signal.SIGKILL)
            if "program" in victim:
                self.exported.renew()
                self.program = self.start_program()

    def end(self) -> Outcome:
        """Wait until nothing is left to answer, then close everything."""
        deadline = time.monotonic() + _QUIET_S
        while "total:\t0\n" not in self.exported.fdinfo() and time.monotonic() < deadline:
            time.sleep(0.001)
        lines = (line.partition(":") for line in self.exported.fdinfo().splitlines())
        fdinfo = {name: value.strip() for name, _, value in lines}
        self.exported.close()
        said, _ = self.program.communicate()
        userfault.madvise(self.memory, MADV_NOUSERFAULT)
        self.memory.close()
        os.close(self.file)
        return Outcome(self.wrong, self.done, fdinfo, said.strip(), self.program.returncode)


# -- scenarios, each in a process of its own ----------------------------------------------------------------------


def touch_holding_the_gil(made: Made) -> Outcome:
    scene = Scene(made)
    scene.touch_all(0, 1, lambda offset: scene.memory[offset : offset + PAGE_SIZE])
    return scene.end()


def touch_from_threads(made: Made, seeds: tuple[int, ...], victims: tuple[str, ...] = ()) -> Outcome:
    scene = Scene(made)
    threads = scene.touch_in_threads(seeds)
    if victims:
        scene.kill_in_the_middle(victims)
    for thread in threads:
        thread.join()
    return scene.end()


def write_from_threads(made: Made) -> Outcome:
    scene = Scene(made)
    threads = [_start(scene.write_all, place) for place in range(_THREADS)]
    scene.kill_in_the_middle(("program", "worker", "program and worker"))
    for thread in threads:
        thread.join()
    scene.check_writes()
    return scene.end()


def _touch(start: int, offset: int) -> bytes:
    return touch(start + offset, PAGE_SIZE)


def _start(target: Callable[..., None], *args: object) -> threading.Thread:
    thread = threading.Thread(target=target, args=args)
    thread.start()
    return thread


# -- what they promise --------------------------------------------------------------------------------------------


def _check(outcome: Outcome, made: Made, threads: int) -> None:
    """Every thread has read every page, rightly; nobody waits; the last program has ended in peace."""
    assert outcome.wrong == []
    assert outcome.done[:threads] == [made.pages] * threads
    assert (outcome.fdinfo["pending"], outcome.fdinfo["total"]) == ("0", "0")
    assert outcome.status == 0
    assert outcome.said.endswith("faults answered")


def test_each_page_is_one_fault_and_one_answer(made: Made) -> None:
    outcome = _run(touch_holding_the_gil, made)

    _check(outcome, made, 1)
    assert outcome.said == f"{made.pages} faults answered"
    assert (outcome.fdinfo["answered"], outcome.fdinfo["refused"]) == (str(made.pages), "0")


@pytest.mark.parametrize("seeds", [(1, 1, 1, 1), (1, 2, 3, 4)], ids=["together", "each in its own order"])
def test_four_threads_on_the_same_pages_all_read_every_byte(made: Made, seeds: tuple[int, ...]) -> None:
    outcome = _run(touch_from_threads, made, seeds)

    _check(outcome, made, 4)
    # A fault is one thread: each page has at least one, and at most one for each thread.
    assert made.pages <= int(outcome.fdinfo["answered"]) <= 4 * made.pages


@pytest.mark.parametrize("victim", ["worker", "program", "program and worker"])
def test_no_fault_is_lost_when_one_is_killed_in_the_middle(made: Made, victim: str) -> None:
    outcome = _run(touch_from_threads, made, (1, 2), 3 * (victim,))

    _check(outcome, made, 2)


def test_what_the_threads_write_is_never_filled_over(made: Made) -> None:
    outcome = _run(write_from_threads, made)

    _check(outcome, made, _THREADS)


def _run(scenario: Callable[..., Outcome], made: Made, *args: object) -> Outcome:
    outcome = run_child(scenario, made, *args, timeout=made.pages * _LIMIT_S).check().value
    assert isinstance(outcome, Outcome)
    return outcome
