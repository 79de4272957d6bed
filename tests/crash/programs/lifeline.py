"""Victims of the death of the whole pager."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import select
import signal
import socket
import struct
import sys
import threading
import time

from tests.crash.programs.common import BLOCK, PAGE, begin, introduce, listen, ones, say

import userfault
from userfault.kernel import Userfaultfd
from userfault.testing import PatternStore

SIZE = 16 * BLOCK


def set_up(sigabrt: str) -> None:
    """Prepare for SIGABRT in one of the ways an application may."""
    if sigabrt == "handled":
        signal.signal(signal.SIGABRT, lambda *_: say("handled"))
    elif sigabrt == "ignored":
        signal.signal(signal.SIGABRT, signal.SIG_IGN)
    elif sigabrt == "blocked before":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGABRT})
    elif sigabrt == "all blocked before":
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())


def set_up_late(sigabrt: str) -> None:
    """Do what an application may do when its regions are open already."""
    if sigabrt == "blocked after":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGABRT})
    elif sigabrt == "all blocked after":
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())


def touch_in_user_code(memory: memoryview) -> int:
    return int(memory[BLOCK])  # touched here


def touch_in_write(memory: memoryview) -> int:
    reader, writer = os.pipe()
    os.write(writer, memory[BLOCK : BLOCK + PAGE])  # touched here
    return os.read(reader, PAGE)[0]


def touch_in_preadv(memory: memoryview) -> int:
    os.preadv(ones(PAGE), [memory[BLOCK : BLOCK + PAGE]], 0)  # touched here
    return int(memory[BLOCK])


TOUCHES = {"user": touch_in_user_code, "write": touch_in_write, "preadv": touch_in_preadv}


def touch_unprivileged(sigabrt: str) -> None:
    """Do the same with the userfaultfd that an unprivileged user gets."""
    whole = Userfaultfd.open
    setattr(Userfaultfd, "open", lambda features: whole(features, user_mode_only=True))  # noqa: B010  # for mypy
    touch("user", sigabrt, "main", with_faulthandler=True)


def touch(fault: str, sigabrt: str, where: str, with_faulthandler: bool) -> None:
    """Wait for the word, then touch what is not there."""
    faulthandler.disable()  # in development mode it is enabled from the start
    set_up(sigabrt)
    if with_faulthandler:
        faulthandler.enable()  # last, or the program's own handler would be in its place
    region = userfault.Region(PatternStore(SIZE), "c" if fault == "preadv" else "r", BLOCK)
    memory = region.memory
    assert memory[0] == PatternStore(SIZE).expected(0, 1)[0]
    set_up_late(sigabrt)

    def run() -> None:
        say("VALUE", TOUCHES[fault](memory))

    introduce(region)
    listen()
    if where == "main":
        run()
    else:
        thread = threading.Thread(target=run, name="toucher")
        thread.start()
        thread.join()


def rest(how: str) -> None:
    """Have a region open and do something else."""
    region = userfault.Region(PatternStore(SIZE), "r", BLOCK)
    assert region.memory[0]
    introduce(region)
    if how == "sleeping":
        time.sleep(30)
    elif how == "computing":
        while True:
            hash("x" * 1000)
    elif how == "deaf":  # the requests' socket ends before the lifeline does, as it may in any death
        region.pager.link._control.shutdown(socket.SHUT_RDWR)
        time.sleep(30)
    else:
        listen()
        listen()
    say("VALUE", region.memory[BLOCK])


def scan() -> None:
    """Fault without end, and check each byte."""
    store = PatternStore(SIZE)
    region = userfault.Region(store, "r", BLOCK)
    expected, memory = store.expected(0, SIZE), region.memory
    introduce(region)
    while True:
        for start in range(0, SIZE, BLOCK):
            got = bytes(memory[start : start + BLOCK])
            if got != expected[start : start + BLOCK]:
                say("WRONG", start, got.count(0))
                return
        try:
            region.evict()
        except userfault.PagerLostError:  # it is known a moment before the end comes
            time.sleep(30)


def go_on(how: str) -> None:
    """End the regions in good order; the pager may die then, and this process must not."""
    region = userfault.Region(PatternStore(SIZE), "c", BLOCK)
    pager = region.pager
    assert region.memory[0]
    introduce(region)
    if how == "region closed":
        region.close()
    elif how == "pager closed":
        region.close()
        pager.close()
    elif how == "memory collected":
        region.owned_by_views()
        del region
        while pager.regions:
            time.sleep(0.001)
    say("ended")
    listen()
    again = userfault.Region(PatternStore(SIZE), "r", BLOCK)
    say("works", again.memory[BLOCK] == PatternStore(SIZE).expected(BLOCK, 1)[0])


def open_on_a_dead_pager() -> None:
    """Open a region on a pager that dies in that moment, after it was looked at."""
    region = userfault.Region(PatternStore(SIZE), "r", BLOCK)
    pager = region.pager
    region.close()
    next_id = pager.link.calls.next_id
    pids = [pager.pid, pager.worker_pid]
    watched = [struct.pack("=ihh", os.pidfd_open(pid), select.POLLIN, 0) for pid in pids]
    poll = ctypes.PyDLL(None).poll  # waiting in any other way would let go of the GIL

    def die_first() -> int:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for one in watched:
            poll(ctypes.c_char_p(one), 1, 20_000)
        return next_id()

    sys.setswitchinterval(20)  # the thread that would notice does not run before we wait for something
    setattr(pager.link.calls, "next_id", die_first)  # noqa: B010  # mypy knows it as a method
    try:
        region = userfault.Region(PatternStore(SIZE), "r", BLOCK, budget=BLOCK, pager=pager)
    except userfault.PagerLostError as error:
        say("refused", type(error).__name__)
    again = userfault.Region(PatternStore(SIZE), "r", BLOCK)
    say("works", again.memory[BLOCK] == PatternStore(SIZE).expected(BLOCK, 1)[0])


def leave(how: str) -> None:
    """End with a region open, in one of the ways that are no crash."""
    region = userfault.Region(PatternStore(SIZE), "r", BLOCK)
    assert region.memory[0]
    introduce(region)
    listen()
    if how == "exit":
        sys.exit(3)
    elif how == "_exit":
        os._exit(3)
    elif how == "exception":
        raise ArithmeticError("on purpose")
    elif how == "exec":
        os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(0.5); raise SystemExit(3)"])


def fork() -> None:
    """Fork; the pager's death is the parent's, not the child's."""
    region = userfault.Region(PatternStore(SIZE), "r", BLOCK)
    assert region.memory[0]
    child = os.fork()
    if not child:
        say("child", os.getpid())
        time.sleep(1.0)  # the parent is dead by now
        say("survived")
        os._exit(0)
    introduce(region)
    listen()
    say("VALUE", region.memory[BLOCK])


if __name__ == "__main__":
    begin(globals())
