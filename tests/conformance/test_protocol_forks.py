"""Forked children: marked memory is not theirs, and they may be the pager of their parent."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.conformance.conftest import RunChild


FORK = """
    import mmap, resource, warnings
    import userfault
    from userfault.protocol import *
    warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on: of a fork while there are threads
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.cancel_dump_traceback_later()  # its thread is not there in a child, which waits for it at its end
    signal.alarm(20)

    def child_of(function, *args):
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            signal.alarm(15)
            faulthandler.disable()
            function(*args)
            sys.stdout.flush()
            os._exit(0)
        return pid

    def end_of(pid):
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    descriptor = userfault.userfaultfd()
    descriptor.handshake()
    mm = mmap.mmap(-1, 4 * P, mmap.{flags})
"""
ANONYMITIES = pytest.mark.parametrize("flags", ["MAP_SHARED", "MAP_PRIVATE"])


@ANONYMITIES
def test_marked_memory_in_a_forked_child_is_sigsegv_and_never_zero(run_child: RunChild, flags: str) -> None:
    result = run_child(
        FORK.format(flags=flags)
        + """
    descriptor.register((memory.address_of(mm), 2 * P))
    userfault.madvise(mm, MADV_USERFAULT)
    descriptor.place(memory.address_of(mm), b"x" * P)
    print(mm[0], *(end_of(child_of(lambda: print(mm[place * P]))) for place in range(4)))
    print(*(end_of(child_of(mm.__setitem__, place * P, 1)) for place in range(4)))
    print(end_of(child_of(descriptor.close)))
    descriptor.close()
    print(end_of(child_of(lambda: print(mm[2 * P]))))
    userfault.madvise(mm, MADV_NOUSERFAULT)
    print(end_of(child_of(lambda: print(mm[0], mm[2 * P]))))
    mm.close()
        """
    )

    assert result.stdout.splitlines() == ["120 -11 -11 -11 -11", "-11 -11 -11 -11", "0", "-11", "120 0", "0"]
    assert result.stderr == ""


@ANONYMITIES
def test_a_forked_child_may_be_the_pager_of_its_parent(run_child: RunChild, flags: str) -> None:
    # `mm[0]` holds the GIL of this process while it waits; it is no matter to the child.
    result = run_child(
        FORK.format(flags=flags)
        + """
    descriptor.register(mm)
    userfault.madvise(mm, MADV_USERFAULT)

    def serve():
        for byte in (1, 2, 3):
            page = int.from_bytes(descriptor.read(), sys.byteorder) & -P
            assert descriptor.poll() == 4, descriptor.poll()
            assert descriptor.place(page, bytes([byte]) * P) == P
            assert descriptor.write(Wake(page, page + P).encode()) == 16

    pid = child_of(serve)
    print(mm[0], mm[P], mm[3 * P - 1], end_of(pid))
    print(descriptor.poll(), descriptor.fdinfo().split(), len(descriptor.ranges))
    descriptor.close()
    userfault.madvise(mm, MADV_NOUSERFAULT)
    print(mm[0], mm[P], mm[2 * P], mm[3 * P])
    mm.close()
        """
    )

    assert result.stdout.splitlines() == [
        "1 2 3 0",
        "0 ['pending:', '0', 'total:', '0', 'protocols:', 'aa'] 1",
        "1 2 3 0",
    ]
    assert result.stderr == ""


def test_the_end_of_a_forked_child_does_not_disturb_its_parent(run_child: RunChild) -> None:
    result = run_child(
        FORK.format(flags="MAP_PRIVATE")
        + """
    from userfault.testing import touch
    descriptor.register(mm)
    userfault.madvise(mm, MADV_USERFAULT)
    found = []
    thread = threading.Thread(target=lambda: found.append(touch(memory.address_of(mm), 1)))
    thread.start()
    descriptor.wait(None, 1)
    for ending in (sys.exit, descriptor.close, lambda: os.kill(os.getpid(), 9), lambda: os.abort()):
        print(end_of(child_of(ending)), descriptor.fdinfo().split()[:4])
    page = int.from_bytes(descriptor.read(), sys.byteorder)
    descriptor.place(page, b"x" * P)
    descriptor.write(Wake(page, page + P).encode())
    thread.join()
    print(found)
    descriptor.close()
    userfault.madvise(mm, MADV_NOUSERFAULT)
        """
    )

    waiting = "['pending:', '1', 'total:', '1']"
    assert result.stdout.splitlines() == [*(f"{end} {waiting}" for end in (0, 0, -9, -6)), "[b'x']"]
    assert result.stderr == ""


def test_a_forked_child_cannot_register_its_parents_memory(run_child: RunChild) -> None:
    result = run_child(
        FORK.format(flags="MAP_PRIVATE")
        + """
    def attempt():
        for call, args in ((descriptor.register, (mm,)), (descriptor.unregister, (mm,))):
            try:
                print(call(*args))
            except KernelError as error:
                print(errno.errorcode[error.errno])

    print(end_of(child_of(attempt)))
    print(descriptor.ranges)
    descriptor.close()
        """
    )

    assert result.stdout.splitlines() == ["EPERM", "EPERM", "0", "[]"]


def test_a_forked_child_may_use_the_protocol_for_itself(run_child: RunChild) -> None:
    result = run_child(
        FORK.format(flags="MAP_PRIVATE")
        + """
    userfault.madvise(mm, MADV_USERFAULT)

    def work():
        own, mine = userfault.userfaultfd(), mmap.mmap(-1, P)
        own.handshake()
        own.register(mine)
        userfault.madvise(mine, MADV_USERFAULT)
        own.place(memory.address_of(mine), b"y" * P)
        print(mine[:1], own.poll())
        own.close()
        userfault.madvise(mine, MADV_NOUSERFAULT)
        mine.close()
        print(len(process.userfaultfds()))  # the inherited one

    print(end_of(child_of(work)))
    descriptor.close()
    userfault.madvise(mm, MADV_NOUSERFAULT)
        """
    )

    assert result.stdout.splitlines() == ["b'y' 0", "1", "0"]
    assert result.stderr == ""


def test_a_fork_while_ranges_change_hands_gives_the_child_no_zero(run_child: RunChild) -> None:
    result = run_child(
        FORK.format(flags="MAP_PRIVATE")
        + """
    userfault.madvise(mm, MADV_USERFAULT)
    done = threading.Event()

    def change():
        while not done.is_set():
            descriptor.register((memory.address_of(mm), 4 * P))
            descriptor.unregister((memory.address_of(mm), 4 * P))

    thread = threading.Thread(target=change)
    thread.start()
    print({end_of(child_of(lambda: print(mm[place % 4 * P]))) for place in range(60)})
    done.set()
    thread.join()
    descriptor.close()
    userfault.madvise(mm, MADV_NOUSERFAULT)
        """
    )

    assert (result.stdout, result.stderr) == ("{-11}\n", "")
