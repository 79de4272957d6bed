"""Exported descriptors: the worker, the supervisor, the program or the application is killed, at any moment.

The program never notices the first two, the application none of the first three, and nothing is left after the last.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import time
from errno import ENOENT
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.conformance.exported_tools import IN, OUT, REFUSAL, VERSION, Scene
from tests.conformance.protocol_tools import Toucher, there, wait_until
from tests.crash.test_kills import Killer, percentiles
from tests.crash.test_lifeline import assert_aborted, kill_both, stop

import userfault
from userfault.errors import PagerLostError
from userfault.kernel.memory import PAGE_SIZE
from userfault.pager import record
from userfault.pager.client import Pager
from userfault.pager.supervisor import MAX_STRIKES
from userfault.protocol import State

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

    from tests.conformance.exported_tools import Served
    from tests.crash.conftest import Start, Victim

KILLS = {"worker": 25, "supervisor": 6, "in turn": 8}
SOAK = 20
STYLES = ("blocks", "polls", "edges")
LINES_STEP, SOAK_STEP = 40, 1
QUICK_S = 1.0


# -- an application and its program, in processes of their own --------------------------------------------------------


class ExportKiller(Killer):
    """Kills a worker while it answers faults of an exported descriptor."""

    def _works(self, pid: int) -> bool:
        """Whether a worker has taken everything over, and has answered."""
        if self.victim.threads(pid) == 1:
            return False
        before, deadline = answered(pid), time.monotonic() + 0.02
        while answered(pid) == before and time.monotonic() < deadline:
            time.sleep(0.001)
        return answered(pid) != before or not self.victim.threads(pid)


def answered(pid: int) -> int:
    """Return how many faults were answered, as the record says that a worker holds; -1 if it holds none."""
    with contextlib.suppress(OSError):  # it is gone, or just begins
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            if "userfault-export" in os.readlink(entry):
                words = memoryview(entry.read_bytes()).cast("Q")
                return int(words[record.W_ANSWERED])
    return -1


def kill_again_and_again(start: Start, rng: random.Random, who: str, kills: int, style: str, region: bool) -> None:
    roles = ("worker", "supervisor") if who == "in turn" else (who,)
    with start("exported.scan", style, region, rng.randrange(1 << 32), limit=60 + kills / 2) as victim:
        victim.expect("ready")
        killer = ExportKiller(victim, rng)
        for number in range(kills):
            killer.kill(roles[number % len(roles)])
        victim.say("stop")
        assert victim.expect("wrong") == [0]
        (faults,) = victim.expect("faults")
        (restarts,) = victim.expect("restarts")
        assert victim.expect("program") == ["eof"]
        victim.expect("over")
        victim.end().check()
    print(f"{kills} kills, {restarts} restarts of the worker, {faults} faults")
    print(f"successor after (ms): {percentiles([round(1000 * s) for s in killer.successions])}")


@pytest.mark.parametrize(("who", "style", "region"), [*zip(KILLS, STYLES, (True, False, True), strict=True)])
def test_one_is_killed_while_a_program_serves(
    start: Start, rng: random.Random, who: str, style: str, region: bool
) -> None:
    """Every byte is right, no thread is stuck, and the program notices nothing; beside a region, and alone."""
    kill_again_and_again(start, rng, who, KILLS[who], style, region)


@pytest.mark.soak
@pytest.mark.parametrize("region", [False, True], ids=["", "beside a region"])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("who", KILLS)
def test_one_is_killed_for_long(start: Start, rng: random.Random, who: str, style: str, region: bool) -> None:
    kill_again_and_again(start, rng, who, SOAK * KILLS[who], style, region)


def test_a_worker_dies_at_any_line(start: Start, rng: random.Random, soak: bool) -> None:
    """At each line of its code in turn; in an ordinary run at some of them. The successor finishes the conversation."""
    step = SOAK_STEP if soak else LINES_STEP
    with start("exported.die_at_lines", rng.randrange(1, step + 1), step, limit=120) as victim:
        (lines,) = victim.expect("lines")
        victim.end().check()
    assert lines > 500
    print(f"{lines // step} deaths")


def test_the_program_is_killed_and_another_takes_over(start: Start, rng: random.Random, soak: bool) -> None:
    """Again and again, at any moment, while three threads fault; also the worker, now and then."""
    times = 300 if soak else 12
    with start("exported.swap_programs", times, rng.randrange(1 << 32), limit=60 + times) as victim:
        victim.expect("ready")
        killer = ExportKiller(victim, rng)
        kills = 0
        while not victim.has_spoken():
            time.sleep(rng.uniform(0.05, 0.15))
            if kills < times // 4:
                killer.kill("worker")
                kills += 1
        victim.expect("done")
        victim.say("stop")
        assert victim.expect("wrong") == [0]
        (faults,) = victim.expect("faults")
        assert victim.expect("program") == ["eof"]
        victim.expect("over")
        victim.end().check()
    print(f"{times} programs and {kills} workers killed, {faults} faults")


@pytest.mark.parametrize("where", ["memory", "write"])
def test_both_killed_in_a_fault(start: Start, where: str) -> None:
    """The application ends by SIGABRT within a second; its program reads the end, one way or another."""
    with start("exported.touch_later", where) as victim:
        supervisor, worker, uffd = victim.expect("ready")
        stop(supervisor, worker)
        victim.say()
        victim.await_fault(uffd)
        result = assert_aborted(victim, kill_both(supervisor, worker))
        wait_for_program(victim, result.stdout, ("eof", "ECONNRESET", "EPIPE"))


@pytest.mark.parametrize("with_program", [False, True], ids=["", "with a program"])
def test_both_killed_while_nobody_waits(start: Start, with_program: bool) -> None:
    with start("exported.rest", with_program) as victim:
        supervisor, worker, _ = victim.expect("ready")
        stop(supervisor, worker)
        victim.say()
        assert_aborted(victim, kill_both(supervisor, worker))


def test_exported_item_29_l_sigkill_of_an_application_that_waits(start: Start) -> None:
    """Its only thread sleeps in a fault that nobody will answer, with the GIL in hand."""
    with start("exported.rest", False) as victim:
        _, _, uffd = victim.expect("ready")
        victim.say()
        victim.say()
        victim.await_fault(uffd)
        victim.process.kill()
        assert victim.end(within=10).signal == signal.SIGKILL
        victim.assert_no_pager()


ENDS = {"exit": 0, "exception": 1, "exec": 0, "SIGKILL": -signal.SIGKILL, "SIGSEGV": -signal.SIGSEGV}


@pytest.mark.parametrize(("how", "status"), ENDS.items(), ids=ENDS)
def test_nothing_is_left_after_the_application(start: Start, how: str, status: int) -> None:
    """The program, which outlives it, reads the end of the file."""
    with start("exported.leave", how) as victim:
        victim.expect("ready")
        victim.say()
        if how == "exec":
            wait_for_program(victim, "", ("eof",))
        result = victim.end(within=20)
        assert result.status == status
        wait_for_program(victim, result.stdout, ("eof",))
        victim.assert_no_pager()
        victim.wait_until(lambda: not victim.alive(), "something is left", QUICK_S)


def wait_for_program(victim: Victim, stdout: str, ends: tuple[str, ...]) -> None:
    """Wait until the program has said its end; it may have done so before the application's."""
    line = next((line.split() for line in stdout.splitlines() if line.startswith("program")), None) or victim.line()
    assert line[0] == "program"
    assert line[1] in ends


# -- this process is the application, and the program -----------------------------------------------------------------


class Mortal:
    """A pager whose processes are killed, and exports on it."""

    def __init__(self, toucher: Toucher, pager: Pager) -> None:
        self.pager = pager
        self.scene = Scene(toucher, pager)
        self._stopped: list[int] = []

    def kill_worker(self) -> None:
        """Kill it, and wait until there is another that listens."""
        with self.worker_dies():
            pass

    @contextlib.contextmanager
    def worker_dies(self) -> Iterator[None]:
        """Stop the worker, so that it does not see what is done within; then kill it."""
        worker = self.pager.worker_pid
        self.stop_worker()
        yield
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: self.pager.worker_pid != worker)

    def stop_worker(self) -> None:
        """Stop it."""
        stop(self.pager.worker_pid)

    def continue_worker(self) -> None:
        os.kill(self.pager.worker_pid, signal.SIGCONT)

    def kill_supervisor(self) -> None:
        """Kill it, and wait until there is another."""
        supervisor = self.pager.pid
        os.kill(supervisor, signal.SIGKILL)
        wait_until(lambda: self.pager.pid != supervisor)


@pytest.fixture(scope="module")
def toucher(tmp_path_factory: pytest.TempPathFactory) -> Toucher:
    return Toucher.compiled(tmp_path_factory.mktemp("touch"))


@pytest.fixture
def mortal(toucher: Toucher) -> Iterator[Mortal]:
    with Pager() as pager:
        mortal = Mortal(toucher, pager)
        try:
            yield mortal
        finally:
            mortal.scene.close()


def asked(served: Served, version: bytes, state: State) -> None:
    served.program.write(version)
    wait_until(lambda: served.exported.state is state)


def one_fault(served: Served, page: int) -> None:
    """Have one fault served, to see that all is well; the worker's death then counts against nobody."""
    (touch,) = served.touch(page)
    found = served.program.fault()
    while found != served.at(page):  # told before, and again
        served.program.announce((found - served.address) // PAGE_SIZE)
        found = served.program.fault()
    served.program.answer(found, 77)
    assert touch.result() == there(77)


def test_the_worker_is_killed_before_the_handshake(mortal: Mortal) -> None:
    served = mortal.scene.fresh()
    mortal.kill_worker()
    assert served.program.poll() == OUT
    served.program.handshake()
    one_fault(served, 0)


@pytest.mark.parametrize("version", [VERSION, b"unknown."], ids=["known", "unknown"])
@pytest.mark.parametrize("moment", ["asked", "answered", "read", "read and written"])
def test_the_worker_is_killed_during_the_handshake(mortal: Mortal, version: bytes, moment: str) -> None:
    """The answer comes once, whatever the worker had heard, sent and seen."""
    served = mortal.scene.fresh()
    known = version == VERSION
    answer, state = (VERSION, State.ACK_PROTOCOL) if known else (REFUSAL, State.ACK_UNKNOWN_PROTOCOL)
    if moment != "asked":
        asked(served, version, state)
        served.program.becomes(IN)
    with mortal.worker_dies():
        if moment == "asked":
            served.program.write(version)
        if moment.startswith("read"):
            assert os.read(served.program.fd, 8) == answer
        if moment == "read and written":
            served.program.write(VERSION if not known else bytes(16))

    if moment in ("asked", "answered"):
        assert served.program.read() == answer
    if not known:
        if moment != "read and written":
            served.program.becomes(OUT)
            served.program.write(VERSION)
        assert served.program.read() == VERSION
    one_fault(served, 0)
    served.program.becomes(0)


def test_the_worker_is_killed_again_and_again_during_handshakes(mortal: Mortal, rng: random.Random, soak: bool) -> None:
    """At any moment of it: a program never reads an answer twice, nor waits for one in vain."""
    served = mortal.scene.fresh(1)
    over: list[bool] = []

    def shake_hands() -> int:
        number = 0
        while not over:
            for version, answer in ((b"unknown.", REFUSAL), (VERSION, VERSION)):
                served.program.write(version)
                assert served.program.read() == answer, number
            touch = mortal.scene.stage.start_read(served.at(0))
            while touch.waiting:
                if served.program.poll(0.001) & IN:
                    served.program.answer(served.program.fault(), 7)
            assert touch.result() == there(7)
            served.program.drop(0)
            served.exported.renew()
            number += 1
        return number

    shaking = mortal.scene.stage.call(shake_hands)
    for _ in range(200 if soak else 10):
        time.sleep(rng.uniform(0, 0.06))
        before, worker = served.info.answered, mortal.pager.worker_pid
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda worker=worker: mortal.pager.worker_pid != worker)  # type: ignore[misc]
        wait_until(lambda before=before: served.info.answered > before or not shaking.waiting)  # type: ignore[misc]
    over.append(True)
    assert shaking.result() > 0


@pytest.mark.parametrize("moment", ["unread", "read", "page written", "range written", "range written twice"])
def test_the_worker_is_killed_between_a_fault_and_its_answer(mortal: Mortal, moment: str) -> None:
    served = mortal.scene.running()
    touches = served.touch(0, 1)
    with mortal.worker_dies():
        if moment != "unread":
            assert served.program.fault() == served.at(0)
        if moment.startswith(("page", "range")):
            served.program.put(0, 7)
        if moment.startswith("range"):
            served.program.announce(0)
        if moment.endswith("twice"):
            served.program.announce(0)

    for _ in touches:
        served.program.answer(served.program.fault(), 7)
    assert [touch.result() for touch in touches] == [there(7)] * 2
    served.waiting(0, 0)
    one_fault(served, 2)


def test_the_answer_of_one_who_was_told_twice_is_a_refusal_that_does_no_harm(mortal: Mortal) -> None:
    served = mortal.scene.running()
    (touch,) = served.touch(0)
    first = served.program.fault()
    served.waiting(0, 1)
    mortal.kill_worker()
    served.waiting(1, 1)
    served.program.put(0, 7)
    served.refused(ENOENT, struct.pack("=QQ", first, first + PAGE_SIZE))
    assert touch.waiting
    assert served.program.fault() == first
    served.program.announce(0)
    assert touch.result() == there(7)


def test_what_was_announced_stays_visible_and_what_was_not_does_not(mortal: Mortal) -> None:
    served = mortal.scene.running()
    (touch,) = served.touch(0)
    served.program.answer(served.program.fault(), 1)
    assert touch.result() == there(1)
    served.program.put(1, 2)
    mortal.kill_worker()
    mortal.kill_supervisor()

    assert mortal.scene.stage.read(served.at(0)) == there(1)
    (touch,) = served.touch(1)
    served.program.becomes(IN)
    assert served.program.fault() == served.at(1)
    served.program.announce(1)
    assert touch.result() == there(2)
    assert served.info.answered == 2


def test_writes_that_the_dead_worker_had_not_heard_are_heard(mortal: Mortal) -> None:
    """Also those for which the buffer had no room: a program that sleeps in its write goes on."""
    served = mortal.scene.running()
    served.prove()
    writing = None
    with mortal.worker_dies():

        def write_often() -> None:
            for _ in range(300):
                served.program.announce(3)

        writing = mortal.scene.stage.call(write_often)
        time.sleep(0.05)
        assert writing.waiting
    writing.result()
    wait_until(lambda: served.info.refused == 301)
    one_fault(served, 0)
    served.program.becomes(0)


def test_a_program_that_has_shut_down_does_not_keep_a_new_worker_busy(mortal: Mortal) -> None:
    served = mortal.scene.running()
    touches = served.touch(0, 1)
    served.program.fault()
    served.waiting(1, 2)
    with socket.socket(fileno=os.dup(served.program.fd)) as end:
        end.shutdown(socket.SHUT_RDWR)
    other = mortal.scene.running()
    mortal.kill_worker()
    one_fault(other, 0)
    with open(f"/proc/{mortal.pager.worker_pid}/stat", encoding="ascii") as file:
        before = file.read().split()[13:15]
        time.sleep(0.2)
        file.seek(0)
        after = file.read().split()[13:15]
    assert sum(map(int, after)) - sum(map(int, before)) < 10
    served.exported.close()
    assert all(touch.result().signal == signal.SIGBUS for touch in touches)


def test_a_stopped_worker_is_a_pause(mortal: Mortal) -> None:
    served = mortal.scene.running()
    (touch,) = served.touch(0)
    mortal.stop_worker()
    served.program.answer(served.program.fault(), 1)
    os.set_blocking(served.program.fd, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            served.program.announce(3)
    os.set_blocking(served.program.fd, True)
    late = mortal.scene.stage.start_read(served.at(1))
    assert touch.waiting
    mortal.continue_worker()

    assert touch.result() == there(1)
    served.program.answer(served.program.fault(), 2)
    assert late.result() == there(2)
    assert mortal.pager.restarts == 0


def test_the_supervisor_is_killed(mortal: Mortal) -> None:
    served, fresh = mortal.scene.running(), mortal.scene.fresh()
    (touch,) = served.touch(0)
    mortal.kill_supervisor()
    served.program.answer(served.program.fault(), 1)
    assert touch.result() == there(1)
    fresh.program.handshake()
    mortal.kill_worker()
    one_fault(fresh, 1)
    one_fault(served, 1)
    served.exported.close()
    mortal.kill_supervisor()
    mortal.kill_worker()
    one_fault(fresh, 2)


# -- what was asked of a worker that dies -----------------------------------------------------------------------------


def test_an_export_that_the_dead_worker_had_not_heard(mortal: Mortal) -> None:
    descriptor = mortal.scene.registered(mortal.scene.mapped(mortal.scene.file(2), 2), 2)
    with mortal.worker_dies():
        found: list[Served] = []

        def export() -> None:
            found.append(mortal.scene.served(descriptor.export(pager=mortal.pager)))

        exporting = mortal.scene.stage.call(export)
        time.sleep(0.02)  # the request lies in the socket by then
        assert exporting.waiting
    exporting.result()
    served = found.pop()
    served.program.handshake()
    one_fault(served, 0)
    assert mortal.pager.regions == 1


def test_a_close_that_the_dead_worker_had_not_heard(mortal: Mortal) -> None:
    served, other = mortal.scene.running(), mortal.scene.running()
    touches = served.touch(0, 1)
    served.program.fault()
    fd = os.dup(served.program.fd)
    with mortal.worker_dies():
        closing = mortal.scene.stage.call(served.exported.close)
        time.sleep(0.02)
        assert closing.waiting
    closing.result()
    assert all(touch.result().signal == signal.SIGBUS for touch in touches)
    assert os.read(fd, 8) == b""
    os.close(fd)
    one_fault(other, 0)


@pytest.mark.parametrize("moment", list(State), ids=lambda state: state.name)
def test_a_renewal_that_the_dead_worker_had_not_heard(mortal: Mortal, moment: State) -> None:
    """It may reach the next one twice, but is done once: not in the middle of the other program's handshake."""
    served = mortal.scene.fresh(2)
    touches = served.touch(0)
    if moment is State.RUNNING:
        served.program.handshake()
        served.program.fault()
        served.waiting(0, 1)
    elif moment is not State.ASK_PROTOCOL:
        asked(served, VERSION if moment is State.ACK_PROTOCOL else b"unknown.", moment)
    for _ in range(4):
        with mortal.worker_dies():
            renewing = mortal.scene.stage.call(served.exported.renew)
            time.sleep(0.02)
            assert renewing.waiting
        renewing.result()
        for _ in range(3):
            served.program.write(b"unknown.")
            assert served.program.read() == REFUSAL
        served.program.handshake()
        assert served.program.fault() == served.at(0)
        served.waiting(0, 1)
    served.program.answer(served.at(0), 5)
    assert touches[0].result() == there(5)


def test_another_program_is_told_of_everything_also_by_another_worker(mortal: Mortal) -> None:
    served = mortal.scene.running(4)
    touches = served.touch(0, 1, 2, 3)
    read = [served.program.fault(), served.program.fault()]
    served.waiting(2, 4)
    mortal.kill_worker()
    served.exported.renew()
    mortal.kill_worker()
    served.program.handshake()
    found = [served.program.fault() for _ in touches]
    assert sorted(found) == [served.at(page) for page in range(4)]
    assert set(read) <= set(found)
    for address in found:
        served.program.answer(address, 3)
    assert [touch.result() for touch in touches] == [there(3)] * 4


# -- many, and the end ------------------------------------------------------------------------------------------------


def test_fifty_exports_and_a_region_outlive_the_worker_and_the_supervisor(mortal: Mortal) -> None:
    store = userfault.MemoryStore(b"\t" * (64 * PAGE_SIZE))
    with userfault.Region(store, "r", PAGE_SIZE, pager=mortal.pager) as region:
        many = [mortal.scene.running(2) for _ in range(50)]
        touches = [served.touch(0)[0] for served in many]
        for served in many[::2]:
            served.program.fault()
        mortal.kill_worker()
        mortal.kill_supervisor()
        mortal.kill_worker()
        assert region.memory[5 * PAGE_SIZE] == 9
        for number, served in enumerate(many):
            served.program.answer(served.program.fault(), number + 1)
        assert [touch.result().byte for touch in touches] == list(range(1, 51))
        for served in many:
            served.exported.close()
        assert region.memory[50 * PAGE_SIZE] == 9


def test_workers_that_die_in_a_row_without_an_answer_are_given_up(mortal: Mortal) -> None:
    """The memory fails loudly: SIGBUS for who waits and who comes, the end of the file for the program."""
    served, fresh = mortal.scene.running(3), mortal.scene.fresh(1)
    (touch,) = served.touch(0)
    served.program.answer(served.program.fault(), 1)
    assert touch.result() == there(1)
    touches = served.touch(1, 2) + fresh.touch(0)
    fds = [os.dup(one.program.fd) for one in (served, fresh)]
    link, killed = mortal.pager.link, 0
    while not link.lost:
        worker = mortal.pager.worker_pid
        if worker != killed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
            killed = worker
        time.sleep(0.002)

    assert f"{MAX_STRIKES} workers in a row" in link.lost
    assert all(touch.result().signal == signal.SIGBUS for touch in touches)
    assert mortal.scene.stage.read(served.at(0)) == there(1)
    for fd in fds:
        while os.read(fd, 8):  # faults that it had been told of
            pass
        os.close(fd)
    with pytest.raises(PagerLostError):
        served.exported.renew()
    served.exported.close()
    assert mortal.scene.stage.read(served.at(2)).signal == signal.SIGBUS
