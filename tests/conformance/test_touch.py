"""The tool that touches memory for the tests of the 2014 protocol."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from tests.conformance.protocol_tools import SEGV_ACCERR, Touched, sigbus, sigsegv, there, wait_until

from userfault.kernel import memory, process

if TYPE_CHECKING:
    from tests.conformance.conftest import RunChild
    from tests.conformance.protocol_tools import Stage, Toucher


def handled() -> set[int]:
    """Return the signals for which this process has a handler, Python's or another."""
    mask = int(process.status()["SigCgt"], 16)
    return {number for number in (signal.SIGBUS, signal.SIGSEGV) if mask >> number - 1 & 1}


def test_memory_that_is_there_is_read_and_written(stage: Stage) -> None:
    page = stage.filled(5)

    assert stage.read(page) == there(5) == Touched(byte=5)
    assert stage.write(page, 6) == there(0)
    assert stage.bytes_at(page, 2) == b"\6\5"


def test_a_signal_is_told_with_its_code_and_address(stage: Stage) -> None:
    missing, forbidden, readonly = stage.marked(1), stage.anonymous(1, prot=memory.PROT_NONE), stage.filled(1)
    memory.protect(readonly, stage.page, memory.PROT_READ)

    assert stage.read(missing + 7) == sigbus(missing + 7)
    assert stage.read(forbidden + 7) == sigsegv(forbidden + 7, SEGV_ACCERR)
    assert stage.write(readonly + 7) == sigsegv(readonly + 7, SEGV_ACCERR)
    assert stage.read(readonly + 7) == there(1)
    assert stage.read(0) == sigsegv(0)


def test_the_handlers_are_there_only_while_somebody_touches(stage: Stage) -> None:
    before = handled()
    descriptor = stage.descriptor()
    page = stage.marked(1, descriptor)

    (touch,) = stage.start_reads(descriptor, [page])
    assert handled() == {signal.SIGBUS, signal.SIGSEGV}
    stage.answer(descriptor, stage.fault(descriptor), 7)

    assert touch.result() == there(7)
    assert handled() == before


def test_many_threads_catch_their_own_signals(stage: Stage) -> None:
    pages = [stage.marked(1) for _ in range(8)]

    def work(page: int) -> set[Touched]:
        return {stage.read(page + byte % 8) for byte in range(800)}

    workers = [stage.call(work, page) for page in pages]

    assert [worker.result() for worker in workers] == [{sigbus(page + byte) for byte in range(8)} for page in pages]


def test_touching_often_counts_what_was_found(stage: Stage) -> None:
    page = stage.filled(7, 0, 8, 7)
    stage.mark(page + 3 * stage.page)
    memory.advise(page + 3 * stage.page, stage.page, 4)  # MADV_DONTNEED

    often = stage.background(stage.toucher.start_often(page, 4, 7))
    wait_until(lambda: often.touches >= 400)
    often.stop()
    tally = often.result()

    quarter = tally.touches // 4
    for count in (tally.right, tally.zeros, tally.others, tally.sigbus):
        assert quarter <= count <= quarter + 1
    assert tally.sigsegv == 0
    assert tally.latest in {page + stage.page, page + 2 * stage.page}


CHILD = """
    import ctypes
    import userfault
    from userfault.protocol import *
    library = ctypes.CDLL({library!r})
    descriptor, page, found = userfault.userfaultfd(), memory.map_memory(P), (ctypes.c_int32 * 16)()
    descriptor.register((page, P))
    userfault.madvise((page, P), MADV_USERFAULT)
    descriptor.handshake()
    thread = threading.Thread(target=library.try_read, args=(ctypes.c_uint64(page), found), daemon=True)
    thread.start()
    descriptor.wait(None, 1)  # from now on the handler is that of the library
"""


def test_a_crash_elsewhere_meanwhile_is_reported_as_ever(run_child: RunChild, toucher: Toucher) -> None:
    crash = CHILD.format(library=toucher.library)

    reported = run_child(crash + "    ctypes.string_at(8)")
    silent = run_child("    faulthandler.disable()" + crash + "    ctypes.string_at(8)")

    assert reported.returncode == silent.returncode == -signal.SIGSEGV
    assert reported.stderr.splitlines()[0] == "Fatal Python error: Segmentation fault"
    assert silent.stderr == ""


def test_a_handler_of_python_meanwhile_is_called_as_ever(run_child: RunChild, toucher: Toucher) -> None:
    result = run_child(
        """
    faulthandler.disable()
    signal.signal(signal.SIGBUS, lambda number, _: print(number == signal.SIGBUS))
        """
        + CHILD.format(library=toucher.library)
        + """
    signal.raise_signal(signal.SIGBUS)
    print(library.try_read(ctypes.c_uint64(8), found) == signal.SIGSEGV, thread.is_alive())
    sys.stdout.flush()
    os._exit(0)
        """
    )

    assert (result.stdout, result.stderr) == ("True\nTrue True\n", "")
