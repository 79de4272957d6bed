"""What a signal handler, a finalizer, a fork or a full table of descriptors does in the middle of a call."""

from __future__ import annotations

import contextlib
import errno
import gc
import mmap
import os
import random
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest
from tests.conformance.protocol_tools import TIMEOUT_S, number, page_of, sigbus, there, wait_until, waiters

from userfault import Reservation, madvise, userfaultfd
from userfault.errors import LocalProtocolError
from userfault.kernel import memfd, memory
from userfault.protocol import MADV_NOUSERFAULT, MADV_USERFAULT, UFFD_CLOEXEC, Descriptor, marks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from tests.conformance.conftest import RunChild
    from tests.conformance.protocol_tools import Stage

ROUNDS = 150
# A handler that raises inside of the library's open() leaves its file to the garbage collector, which says so.
interrupted = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")


class InterruptionError(Exception):
    """What the signal handler raises."""


class Alarm:
    """Raises somewhere in the middle of a call."""

    def __init__(self) -> None:
        self.armed = False
        self.raised = 0
        self._random = random.Random(2014)

    def handle(self, *_: object) -> None:
        if self.armed:
            self.armed = False
            raise InterruptionError

    def during(self, call: Callable[[], Any], most_s: float) -> bool:
        """Call, and return whether it was interrupted."""
        try:
            self.armed = True
            signal.setitimer(signal.ITIMER_REAL, self._random.uniform(1e-6, most_s))
            call()
        except InterruptionError:
            self.raised += 1
            return True
        finally:
            self.armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
        return False


@pytest.fixture
def alarm() -> Iterator[Alarm]:
    alarm = Alarm()
    before = signal.signal(signal.SIGALRM, alarm.handle)
    yield alarm
    signal.signal(signal.SIGALRM, before)


@interrupted
def test_a_close_that_a_signal_handler_ends_shows_no_zero(stage: Stage, alarm: Alarm) -> None:
    for _ in range(ROUNDS):
        descriptor = stage.descriptor()
        page = stage.marked(8, descriptor)
        while alarm.during(descriptor.close, 900e-6):
            pass
        assert stage.read(page) == sigbus(page)
    assert alarm.raised > 0


@interrupted
def test_registrations_that_a_signal_handler_ends_can_be_repeated(stage: Stage, alarm: Alarm) -> None:
    descriptor, page = stage.descriptor(), stage.marked(8)
    span = (page, 8 * stage.page)
    for _ in range(ROUNDS):
        while alarm.during(lambda: descriptor.register(span), 300e-6):
            pass
        while alarm.during(lambda: descriptor.unregister(span), 300e-6):
            pass
        assert stage.read(page) == sigbus(page)
    assert alarm.raised > 0


@interrupted
def test_a_read_that_a_signal_handler_ends_loses_no_fault(stage: Stage, alarm: Alarm) -> None:
    descriptor = stage.descriptor(UFFD_CLOEXEC)
    page = stage.marked(ROUNDS, descriptor)
    for place in range(ROUNDS):
        address = page + place * stage.page
        touch = stage.start_read(address)
        wait_until(lambda: waiters(descriptor)[1] == 1)
        if alarm.during(descriptor.read, 80e-6) and waiters(descriptor)[0]:
            assert descriptor.poll() & 1
            assert number(descriptor.read()) == address
        stage.answer(descriptor, address, 3)
        assert touch.result() == there(3)


@interrupted
def test_a_range_write_that_a_signal_handler_ends_can_be_repeated(stage: Stage, alarm: Alarm) -> None:
    descriptor = stage.descriptor()
    page = stage.marked(ROUNDS, descriptor)
    for place in range(ROUNDS):
        address = page + place * stage.page
        touch = stage.start_read(address)
        stage.fault(descriptor)
        descriptor.place(address, page_of(4))
        if alarm.during(lambda at=address: stage.wake(descriptor, at), 60e-6):  # type: ignore[misc]
            with contextlib.suppress(FileNotFoundError, LocalProtocolError):  # ENOENT: it was done
                stage.wake(descriptor, address)
        assert touch.result() == there(4)
    assert alarm.raised > 0


def test_a_descriptor_that_is_collected_in_the_middle_of_a_change(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = stage.anonymous(2)
    cycle: list[object] = [userfaultfd(UFFD_CLOEXEC)]
    descriptor = cycle[0]
    assert isinstance(descriptor, Descriptor)
    descriptor.register((page, 2 * stage.page))
    cycle.append(cycle)
    del descriptor
    tell = marks.Marks._tell

    def collect(self: marks.Marks, *arguments: Any) -> None:
        tell(self, *arguments)
        cycle.clear()
        gc.collect()

    monkeypatch.setattr(marks.Marks, "_tell", collect)
    with pytest.warns(ResourceWarning):
        madvise((page, 2 * stage.page), MADV_USERFAULT)
    monkeypatch.undo()

    assert stage.read(page) == sigbus(page)
    other = stage.descriptor()
    other.register((page, 2 * stage.page))


def test_a_bell_is_never_rung_at_somebody_elses_file(stage: Stage, tmp_path: object) -> None:
    descriptor = stage.descriptor()
    page = stage.marked(1, descriptor)
    stop, wrong = threading.Event(), []

    def wait() -> None:
        while not stop.is_set():
            descriptor.wait(0.0002, 1)

    def ring() -> None:
        while not stop.is_set():
            descriptor.register((page, stage.page))

    def make_files() -> None:
        while not stop.is_set():
            fd = os.open(f"{tmp_path}/{threading.get_native_id()}", os.O_CREAT | os.O_RDWR | os.O_TRUNC)
            wrong.extend([1] * bool(os.fstat(fd).st_size))
            os.close(fd)

    calls = [stage.call(call) for call in (wait, wait, wait, wait, ring, make_files, make_files)]
    stop.wait(1.0)
    stop.set()
    assert [call.result() for call in calls] == [None] * 7
    assert wrong == []


def test_a_forked_pager_that_places_while_the_parent_closes_loses_nothing(stage: Stage) -> None:
    pages = 256
    for _ in range(6):
        descriptor = stage.descriptor()
        page = stage.marked(pages, descriptor)
        placed = mmap.mmap(-1, pages)
        child = os.fork()
        if not child:
            try:
                for place in range(pages):
                    descriptor.place(page + place * stage.page, page_of(5))
                    placed[place] = 1
            finally:
                os._exit(0)  # the parent has closed: ENOENT, or the last page
        wait_until(lambda placed=placed: any(placed[:]))  # type: ignore[misc]
        descriptor.close()
        os.waitpid(child, 0)
        there_now = stage.there(page, pages)
        assert [place for place in range(pages) if placed[place] and not there_now[place]] == []
        placed.close()


def test_close_lets_go_of_what_is_left_of_a_range(stage: Stage) -> None:
    descriptor = stage.descriptor()
    page = stage.marked(8, descriptor)
    fixed = memory.MAP_PRIVATE | 0x10
    fd = os.open(__file__, os.O_RDONLY)
    memory.map_memory(stage.page, fd=fd, prot=memory.PROT_READ, flags=fixed, address=page + 4 * stage.page)
    os.close(fd)
    descriptor.close()

    for place in (0, 3, 5, 7):
        assert stage.read(page + place * stage.page) == sigbus(page + place * stage.page)
    assert stage.read(page + 4 * stage.page).signal == 0


def test_close_of_a_mapping_whose_file_was_cut(stage: Stage) -> None:
    fd = os.memfd_create("cut")
    os.ftruncate(fd, 4 * stage.page)
    page = memory.map_memory(4 * stage.page, fd=fd)
    stage.adopt(page, 4)
    descriptor = stage.descriptor()
    descriptor.register((page, 4 * stage.page))
    madvise((page, 4 * stage.page), MADV_USERFAULT)
    os.ftruncate(fd, 2 * stage.page)
    os.close(fd)
    descriptor.close()

    assert stage.read(page + stage.page) == sigbus(page + stage.page)
    assert stage.read(page + 3 * stage.page).signal == signal.SIGBUS


def test_a_page_can_be_placed_from_another_page_of_the_same_descriptor(stage: Stage) -> None:
    descriptor = stage.descriptor()
    page = stage.marked(2, descriptor)
    placing = stage.call(descriptor.place, page, memory.view(page + stage.page, stage.page))

    address = stage.fault(descriptor)
    stage.answer(descriptor, address, 6)

    assert placing.result() == stage.page
    assert stage.read(page) == there(6)


def test_a_child_that_was_forked_at_any_moment_can_close_its_reservation(stage: Stage) -> None:
    reservation, stop = Reservation(1 << 24), threading.Event()

    def work() -> None:
        while not stop.is_set():
            reservation.piece(stage.page).close()

    worker = stage.call(work)
    for _ in range(20):
        child = os.fork()
        if not child:
            reservation.close()
            os._exit(0)
        end = time.monotonic() + TIMEOUT_S
        while os.waitpid(child, os.WNOHANG)[0] == 0:
            assert time.monotonic() < end, "the child hangs"
            time.sleep(0.001)
    stop.set()
    worker.result()
    reservation.close()


def test_everything_works_without_a_descriptor_to_spare(run_child: RunChild) -> None:
    result = run_child(
        """
    import resource, select
    import userfault
    from userfault.protocol import MADV_USERFAULT, Wake
    from userfault.testing import touch
    page = memory.map_memory(2 * P)
    descriptor = userfault.userfaultfd()
    descriptor.handshake()
    userfault.madvise((page, 2 * P), MADV_USERFAULT)
    descriptor.register((page, 2 * P))
    thread = threading.Thread(target=touch, args=(page,))
    thread.start()
    descriptor.read()
    descriptor.place(page, bytes(P))
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, 1))
    print(descriptor.write(Wake(page, page + P).encode()))
    thread.join()
    descriptor.close()
    print(descriptor.closed)
        """
    )

    assert (result.stdout.split(), result.stderr) == (["16", "True"], "")


def test_a_memfd_that_is_mapped_read_only_is_einval(stage: Stage) -> None:
    fd = memfd.create("read-only", stage.page)
    reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    page = memory.map_memory(stage.page, fd=reader, prot=memory.PROT_READ)
    stage.adopt(page, 1)
    try:
        with pytest.raises(OSError, match="shared mapping of a memory file") as caught:
            madvise((page, stage.page), MADV_USERFAULT)
        assert caught.value.errno == errno.EINVAL
        madvise((page, stage.page), MADV_NOUSERFAULT)
    finally:
        os.close(reader)
        os.close(fd)
