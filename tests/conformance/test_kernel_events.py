"""Every message of a userfaultfd, each from its real cause."""

from __future__ import annotations

import os
import socket
from contextlib import closing
from typing import TYPE_CHECKING

from userfault.kernel import (
    EventKind,
    FaultFlag,
    Feature,
    Fork,
    PageFault,
    RegisterMode,
    Remap,
    Remove,
    Unmap,
    Userfaultfd,
    WriteProtectMode,
    abi,
    memory,
)

if TYPE_CHECKING:
    from tests.conformance.conftest import Arena, RunChild, StartChild

MISSING, WP = RegisterMode.MISSING, RegisterMode.WP


# -- PAGEFAULT -----------------------------------------------------------------------------------------------


def test_a_read_and_a_write_of_missing_memory_differ_in_the_write_flag(arena: Arena) -> None:
    uffd, page = arena.uffd(), arena.anonymous(2)
    uffd.register(page, 2 * arena.page, MISSING)

    arena.read(page)
    (read,) = arena.events(uffd)
    arena.write(page + arena.page, b"x")
    (write,) = arena.events(uffd)

    assert read == PageFault(page, FaultFlag(0))
    assert write == PageFault(page + arena.page, FaultFlag.WRITE)
    assert isinstance(write, PageFault)
    assert (write.is_write, write.is_missing, write.is_wp, write.is_minor) == (True, True, False, False)


def test_the_exact_address_is_told_on_request(arena: Arena) -> None:
    uffd, page = arena.uffd(Feature.EXACT_ADDRESS), arena.anonymous(1)
    uffd.register(page, arena.page, MISSING)

    arena.read(page + 24, 8)
    (event,) = arena.events(uffd)

    assert event == PageFault(page + 24, FaultFlag(0))


def test_the_thread_is_named_on_request(arena: Arena) -> None:
    uffd, page = arena.uffd(Feature.THREAD_ID), arena.anonymous(1)
    uffd.register(page, arena.page, MISSING)

    touch = arena.read(page)
    (event,) = arena.events(uffd)

    assert event == PageFault(page, FaultFlag(0), touch.thread_id)


def test_the_messages_of_many_threads_come_in_one_read(arena: Arena) -> None:
    uffd, page = arena.uffd(Feature.THREAD_ID), arena.anonymous(8)
    uffd.register(page, 8 * arena.page, MISSING)
    touches = [arena.read(page + number * arena.page) for number in range(8)]
    arena.wait_until(lambda: uffd.fdinfo().pending == 8)

    events = uffd.read(64)

    assert {(event.address, event.thread_id) for event in events if isinstance(event, PageFault)} == {
        (page + number * arena.page, touch.thread_id) for number, touch in enumerate(touches)
    }
    assert (uffd.fdinfo().pending, uffd.fdinfo().total) == (0, 8)


def test_a_read_takes_no_more_messages_than_it_was_told(arena: Arena) -> None:
    uffd, page = arena.uffd(), arena.anonymous(3)
    uffd.register(page, 3 * arena.page, MISSING)
    for number in range(3):
        arena.read(page + number * arena.page)
    arena.wait_until(lambda: uffd.fdinfo().pending == 3)

    assert len(uffd.read_raw(2)) == 2 * abi.UFFD_MSG_SIZE
    assert uffd.read_raw(2)[0] == EventKind.PAGEFAULT
    assert uffd.read_raw() == b""


def test_two_threads_at_one_page_send_two_messages(arena: Arena) -> None:
    uffd, page = arena.uffd(), arena.anonymous(1)
    uffd.register(page, arena.page, MISSING)
    touches = [arena.read(page), arena.read(page)]

    assert arena.events(uffd, 2) == [PageFault(page, FaultFlag(0))] * 2
    uffd.copy(page, arena.source(4), arena.page)
    assert [touch.result() for touch in touches] == [b"\4" * 8] * 2


def test_a_system_call_that_touches_the_memory_faults_too(arena: Arena) -> None:
    uffd, page = arena.uffd(user_mode_only=False), arena.anonymous(1)
    uffd.register(page, arena.page, MISSING)
    end, other = os.pipe()
    with closing(os.fdopen(end, "rb", buffering=0)) as reader, closing(os.fdopen(other, "wb")) as writer:
        writing = arena.call(os.write, writer.fileno(), memory.view(page, 4))
        arena.events(uffd)
        uffd.copy(page, arena.source(8), arena.page)

        assert writing.result() == 4
        assert reader.read(4) == b"\10" * 4


# -- FORK ----------------------------------------------------------------------------------------------------


def test_fork_hands_over_a_descriptor_for_the_childs_memory(start_child: StartChild, arena: Arena) -> None:
    # The reader must be another process: the forking thread holds its interpreter's GIL while it waits.
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = start_child(
            f"""
            uffd = Userfaultfd.open(Feature.EVENT_FORK, nonblock=True)
            page = memory.map_memory(P)
            uffd.register(page, P, RegisterMode.MISSING)
            channel = socket.socket(fileno={theirs.fileno()})
            socket.send_fds(channel, [str(page).encode()], [uffd.fd])
            pid = os.fork()
            value = memory.view(page, 1)[0]
            if not pid:
                os._exit(value)
            print(value, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            """,
            pass_fds=(theirs.fileno(),),
        )
        data, fds, _flags, _address = socket.recv_fds(ours, 32, 1)
    page, parent = int(data), arena.keep(Userfaultfd(fds[0], features=Feature.EVENT_FORK))

    (event, *others) = arena.events(parent)
    assert isinstance(event, Fork)
    of_child = arena.keep(parent.adopt(event.fd))
    fault = PageFault(page, FaultFlag(0))
    assert (others or arena.events(parent), arena.events(of_child)) == ([fault], [fault])
    assert parent.copy(page, arena.source(10), arena.page) == (arena.page, 0)
    assert of_child.copy(page, arena.source(20), arena.page) == (arena.page, 0)

    assert child.communicate(timeout=20)[0] == "10 20\n"
    assert of_child.features == Feature.EVENT_FORK
    assert os.get_inheritable(of_child.fd) is False


def test_without_the_feature_a_forked_child_reads_zeros(run_child: RunChild) -> None:
    result = run_child("""
        uffd = Userfaultfd.open()
        page = memory.map_memory(P)
        uffd.register(page, P, RegisterMode.MISSING)
        pid = os.fork()
        if not pid:
            os._exit(memory.view(page, 1)[0])
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    """)

    assert result.stdout == "0\n"


def test_with_dontfork_a_forked_child_has_no_such_memory(run_child: RunChild) -> None:
    result = run_child("""
        uffd = Userfaultfd.open()
        page = memory.map_memory(P)
        uffd.register(page, P, RegisterMode.MISSING)
        memory.advise(page, P, abi.MADV_DONTFORK)
        pid = os.fork()
        if not pid:
            faulthandler.disable()
            memory.view(page, 1)[0]
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    """)

    assert result.stdout == "-11\n"


# -- REMAP ---------------------------------------------------------------------------------------------------


def test_remap_tells_both_places_and_the_memory_stays_registered(arena: Arena) -> None:
    uffd, page = arena.uffd(Feature.EVENT_REMAP), arena.anonymous(2)
    uffd.register(page, 2 * arena.page, MISSING)
    arena.forget(page)
    # A place to move to, so that it does move.
    target = memory.map_memory(2 * arena.page)
    length = 2 * arena.page

    moving = arena.call(memory.remap, page, length, length, flags=abi.MREMAP_MAYMOVE | abi.MREMAP_FIXED, to=target)
    (event,) = arena.events(uffd)

    assert event == Remap(page, target, length)
    assert moving.result() == target
    arena.adopt(target, length)
    touch = arena.read(target)
    arena.events(uffd)
    uffd.copy(target, arena.source(2), arena.page)
    assert touch.result() == b"\2" * 8


def test_without_the_feature_moved_memory_is_registered_no_more(arena: Arena) -> None:
    uffd, page = arena.uffd(), arena.anonymous(1)
    uffd.register(page, arena.page, MISSING)
    arena.forget(page)
    target = memory.map_memory(arena.page)

    memory.remap(page, arena.page, arena.page, flags=abi.MREMAP_MAYMOVE | abi.MREMAP_FIXED, to=target)
    arena.adopt(target, arena.page)

    assert arena.read(target).result() == bytes(8)


# -- REMOVE, UNMAP -------------------------------------------------------------------------------------------


def test_dropping_memory_is_told_before_it_happens(arena: Arena) -> None:
    uffd, page = arena.uffd(Feature.EVENT_REMOVE), arena.anonymous(3)
    uffd.register(page, 3 * arena.page, MISSING)
    uffd.copy(page, arena.source(1, 2, 3), 3 * arena.page)

    dropping = arena.call(memory.advise, page + arena.page, arena.page, abi.MADV_DONTNEED)
    arena.wait_pending(uffd)
    before = arena.peek(page + arena.page)
    events = uffd.read()
    dropping.result()

    assert before == b"\2"
    assert events == [Remove(page + arena.page, page + 2 * arena.page)]
    touch = arena.read(page + arena.page)
    assert arena.events(uffd) == [PageFault(page + arena.page, FaultFlag(0))]
    assert touch.waiting


def test_dropping_memory_of_a_file_is_told_too(arena: Arena) -> None:
    uffd, fd = arena.uffd(Feature.EVENT_REMOVE | Feature.MISSING_SHMEM), arena.memfd(1)
    page = arena.shared(fd, 1)
    uffd.register(page, arena.page, MISSING)
    uffd.copy(page, arena.source(1), arena.page)

    dropping = arena.call(memory.advise, page, arena.page, abi.MADV_REMOVE)

    assert arena.events(uffd) == [Remove(page, page + arena.page)]
    dropping.result()
    assert os.pread(fd, 1, 0) == b"\0"


def test_unmapping_is_told_and_returns_when_it_has_been_read(arena: Arena) -> None:
    uffd, page = arena.uffd(Feature.EVENT_UNMAP), arena.anonymous(2)
    uffd.register(page, 2 * arena.page, MISSING)
    arena.forget(page)

    unmapping = arena.call(memory.unmap, page, 2 * arena.page)

    assert arena.events(uffd) == [Unmap(page, page + 2 * arena.page)]
    unmapping.result()


def test_events_queue_in_the_order_of_their_causes(arena: Arena) -> None:
    uffd, page = arena.uffd(Feature.EVENT_REMOVE | Feature.EVENT_UNMAP), arena.anonymous(4)
    uffd.register(page, 4 * arena.page, MISSING)
    removing = arena.call(memory.advise, page, arena.page, abi.MADV_DONTNEED)
    arena.wait_pending(uffd)
    first = uffd.read(1)
    removing.result()
    arena.forget(page)
    unmapping = arena.call(memory.unmap, page, 4 * arena.page)
    second = arena.events(uffd)
    unmapping.result()

    assert [*first, *second] == [Remove(page, page + arena.page), Unmap(page, page + 4 * arena.page)]


def test_faults_are_handed_out_before_older_events(arena: Arena) -> None:
    uffd, page = arena.uffd(Feature.EVENT_REMOVE), arena.anonymous(2)
    uffd.register(page, 2 * arena.page, MISSING)
    uffd.copy(page, arena.source(1), arena.page)
    removing = arena.call(memory.advise, page, arena.page, abi.MADV_DONTNEED)
    arena.wait_pending(uffd)
    arena.read(page + arena.page)
    arena.wait_until(lambda: uffd.fdinfo().pending == 1)

    assert uffd.read() == [PageFault(page + arena.page, FaultFlag(0)), Remove(page, page + arena.page)]
    removing.result()


def test_a_wait_for_an_event_ends_when_the_descriptor_is_closed(arena: Arena) -> None:
    uffd, page = arena.uffd(Feature.EVENT_REMOVE), arena.anonymous(1)
    uffd.register(page, arena.page, MISSING)
    dropping = arena.call(memory.advise, page, arena.page, abi.MADV_DONTNEED)
    arena.wait_pending(uffd)

    uffd.close()

    dropping.result()


# -- what happens to waiting threads -------------------------------------------------------------------------


def test_closing_the_last_descriptor_lets_the_thread_read_zeros(arena: Arena) -> None:
    uffd, page = arena.uffd(), arena.anonymous(1)
    uffd.register(page, arena.page, MISSING)
    touch = arena.read(page)
    arena.events(uffd)

    uffd.close()

    assert touch.result() == bytes(8)


def test_a_kept_duplicate_keeps_the_thread_waiting_and_serves_it(arena: Arena) -> None:
    uffd, page = arena.uffd(), arena.anonymous(1)
    kept = arena.keep(Userfaultfd(os.dup(uffd.fd)))
    uffd.register(page, arena.page, MISSING)
    touch = arena.read(page)
    arena.events(uffd)

    uffd.close()
    assert (touch.waiting, kept.fdinfo().total, kept.read()) == (True, 1, [])
    kept.wake(page, arena.page)  # the message was read once: only waking has it sent again
    assert arena.events(kept) == [PageFault(page, FaultFlag(0))]
    kept.copy(page, arena.source(3), arena.page)

    assert touch.result() == b"\3" * 8


def test_a_touch_that_holds_the_gil_is_never_served_by_its_own_interpreter(run_child: RunChild) -> None:
    # The trap that makes the pager another process; its stack shows in the dump all the same.
    result = run_child(
        """
        def serve():
            for event in uffd.read():
                uffd.zeropage(event.address, P)
        uffd = Userfaultfd.open()
        page = memory.map_memory(P)
        uffd.register(page, P, RegisterMode.MISSING)
        threading.Thread(target=serve, daemon=True).start()
        memory.view(page, P)[0]
        """,
        timeout=1,
    )

    assert result.returncode == 1
    assert result.stderr.startswith("Timeout")


def test_another_process_serves_this_ones_memory_from_its_own(start_child: StartChild, arena: Arena) -> None:
    uffd, page = arena.uffd(Feature.MOVE), arena.anonymous(1)
    uffd.register(page, arena.page, MISSING)
    child = start_child(
        f"""
        uffd = Userfaultfd({uffd.fd})
        poll = __import__("select").poll()
        poll.register(uffd, 1)
        poll.poll()
        (event,) = uffd.read()
        source = memory.map_memory(P)
        memory.view(source, P)[:] = b"c" * P
        print(uffd.move(event.address, source, P), uffd.copy(event.address, source, P), flush=True)
        """,
        pass_fds=(uffd.fd,),
    )

    touch = arena.read(page)

    assert touch.result() == b"c" * 8
    assert child.communicate(timeout=20)[0] == f"(0, 22) ({arena.page}, 0)\n"  # MOVE: EINVAL


def test_memory_of_a_process_that_is_gone_says_so(start_child: StartChild, arena: Arena) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = start_child(
            f"""
            uffd = Userfaultfd.open(nonblock=True)
            page = memory.map_memory(P)
            uffd.register(page, P, RegisterMode.MISSING | RegisterMode.WP)
            socket.send_fds(socket.socket(fileno={theirs.fileno()}), [str(page).encode()], [uffd.fd])
            """,
            pass_fds=(theirs.fileno(),),
        )
        data, fds, _flags, _address = socket.recv_fds(ours, 32, 1)
    uffd, page = arena.keep(Userfaultfd(fds[0])), int(data)
    child.communicate(timeout=20)
    gone = 3  # ESRCH

    assert uffd.copy(page, arena.source(1), arena.page) == (0, gone)
    assert uffd.zeropage(page, arena.page) == (0, gone)
    assert uffd.poison(page, arena.page) == (0, gone)
    assert uffd.continue_(page, arena.page) == (0, gone)
    assert uffd.write_protect(page, arena.page, WriteProtectMode.WP) == gone
    assert uffd.read() == []


def test_write_protection_faults_name_the_thread_too(arena: Arena) -> None:
    uffd, page = arena.uffd(Feature.THREAD_ID), arena.anonymous(1)
    memory.populate(page, arena.page, write=True)
    uffd.register(page, arena.page, WP)
    uffd.write_protect(page, arena.page, WriteProtectMode.WP)

    touch = arena.write(page, b"x")

    assert arena.events(uffd) == [PageFault(page, FaultFlag.WRITE | FaultFlag.WP, touch.thread_id)]
