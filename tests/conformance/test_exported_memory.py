"""Exported descriptors: what the application sees of the memory file, and when."""

from __future__ import annotations

import os
import struct
from errno import ENOENT
from typing import TYPE_CHECKING

import pytest
from tests.conformance.exported_tools import IN, Program, make_ground, make_scene  # noqa: F401
from tests.conformance.protocol_tools import page_of, there

from userfault import madvise
from userfault.kernel import memory
from userfault.kernel.memory import PAGE_SIZE
from userfault.protocol import MADV_USERFAULT
from userfault.protocol.marks import MARKS
from userfault.testing import touch as touch_bytes

if TYPE_CHECKING:
    from tests.conformance.exported_tools import Ground, Scene, Served


def announced(served: Served, page: int, count: int = 1) -> None:
    """Announce pages that nobody waits for, and wait until that is done."""
    served.refused(ENOENT, struct.pack("=QQ", served.at(page), served.at(page + count)))


def test_a_page_that_was_written_and_not_announced_is_not_visible(scene: Scene) -> None:
    served = scene.running()
    served.program.put(1, 7)

    (touch,) = served.touch(1)

    served.prove()
    assert touch.waiting
    assert served.program.fault() == served.at(1)
    served.program.announce(1)
    assert touch.result() == there(7)


def test_a_page_that_was_written_during_the_wait_is_not_visible(scene: Scene) -> None:
    served = scene.running()
    (touch,) = served.touch(1)
    address = served.program.fault()
    served.program.put(1, 7)
    late = served.touch_at(served.at(1, 100))

    served.prove()
    assert touch.waiting
    assert late.waiting
    served.program.fault()
    served.program.announce(1)
    assert (touch.result(), late.result()) == (there(7), there(7))
    assert address == served.at(1)


def test_a_half_written_page_is_never_visible(scene: Scene, soak: bool) -> None:
    """Whole pages are read as they are being written, in pieces; what is read is whole."""
    pages = 16
    served = scene.running(pages)
    whole = bytes(range(1, 256)) * (PAGE_SIZE // 255) + b"\xff" * (PAGE_SIZE % 255)

    for _ in range(200 if soak else 10):
        reading = [scene.stage.call(touch_bytes, served.at(page), PAGE_SIZE) for page in range(pages)]
        for _ in reading:
            page = (served.program.fault() - served.address) // PAGE_SIZE
            for piece in range(0, PAGE_SIZE, PAGE_SIZE // 8):
                os.pwrite(served.program.memory_fd, whole[piece : piece + PAGE_SIZE // 8], page * PAGE_SIZE + piece)
            served.program.announce(page)
        assert all(thread.result() == whole for thread in reading)
        served.waiting(0, 0)
        served.program.drop(0, pages)


def test_pages_announced_ahead_are_found_without_a_fault(scene: Scene) -> None:
    """Nobody waits for them, and that is what `fdinfo` says; but they are there."""
    served = scene.running(8)
    for page in range(5):
        served.program.put(page, page + 1)
    announced(served, 0, 3)
    announced(served, 4)

    assert [scene.stage.read(served.at(page)).byte for page in (0, 1, 2, 4)] == [1, 2, 3, 5]
    assert served.info.waiting == (0, 0)
    (touch,) = served.touch(3)
    assert served.program.fault() == served.at(3), "it is in the file, and was not announced"
    served.program.announce(3)
    assert touch.result() == there(4)


def test_ranges_with_holes(scene: Scene) -> None:
    """What is in the file is seen, what is not stays missing, and who waits there asks again."""
    served = scene.running(32)
    filled = [page for page in range(32) if page % 3 == 0 or page in (1, 31)]
    for page in filled:
        served.program.put(page, page + 1)
    (in_a_hole,) = served.touch(2)
    served.program.fault()
    served.waiting(0, 1)

    served.program.announce(0, 32)

    served.waiting(1, 1)
    assert [scene.stage.read(served.at(page)).byte for page in filled] == [page + 1 for page in filled]
    assert in_a_hole.waiting
    (other,) = served.touch(29)
    for page in (2, 29):
        assert served.program.fault() == served.at(page)
        served.program.answer(served.at(page), 99)
    assert (in_a_hole.result(), other.result()) == (there(99), there(99))


def test_a_large_range_of_which_much_is_there_already(scene: Scene) -> None:
    served = scene.running(2048)
    for page in range(0, 2048, 2):
        served.program.put(page, 1)
    announced(served, 0, 2048)
    for page in range(1, 2048, 2):
        served.program.put(page, 2)
    announced(served, 0, 2048)
    assert touch_bytes(served.address, 2048 * PAGE_SIZE) == (page_of(1) + page_of(2)) * 1024
    assert served.info.waiting == (0, 0)


def test_the_program_may_read_what_the_application_writes(scene: Scene) -> None:
    served = scene.running()
    (touch,) = served.touch(0)
    served.program.answer(served.program.fault(), 1)
    assert touch.result() == there(1)

    assert scene.stage.write(served.at(0, 5), 77) == there(0)
    assert os.pread(served.program.memory_fd, 8, 0) == b"\1\1\1\1\1\x4d\1\1"
    os.pwrite(served.program.memory_fd, b"\x58", 6)
    assert scene.stage.read(served.at(0, 6)) == there(0x58), "once announced a page is shared"


def test_eviction_by_the_program(scene: Scene) -> None:
    """A hole in the file is a missing page again, and its next touch is told."""
    served = scene.running()
    for byte in range(1, 30):
        (touch,) = served.touch(2)
        served.program.answer(served.program.fault(), byte)
        assert touch.result() == there(byte)
        assert scene.stage.read(served.at(2)) == there(byte)
        served.program.drop(2)
    (touch,) = served.touch(2)
    assert served.program.poll() == IN
    served.program.answer(served.program.fault(), 77)
    assert touch.result() == there(77)


def test_eviction_of_a_page_that_was_not_announced(scene: Scene) -> None:
    served = scene.running()
    served.program.put(0, 1)
    (touch,) = served.touch(0)
    served.program.drop(0)
    served.program.fault()
    served.program.announce(0)
    served.waiting(1, 1)
    served.program.answer(served.program.fault(), 2)
    assert touch.result() == there(2)


def test_eviction_by_the_application_makes_a_page_unseen_and_not_lost(scene: Scene) -> None:
    """MADV_DONTNEED drops the application's view only: the page is in the file, and has to be announced again."""
    served = scene.running()
    (touch,) = served.touch(0)
    served.program.answer(served.program.fault(), 1)
    assert touch.result() == there(1)

    memory.advise(served.at(0), PAGE_SIZE, 4)  # MADV_DONTNEED
    (touch,) = served.touch(0)
    assert served.program.fault() == served.at(0)
    served.program.announce(0)
    assert touch.result() == there(1)


# -- which memory -----------------------------------------------------------------------------------------------------


def test_memory_that_begins_in_the_middle_of_the_file(scene: Scene) -> None:
    served = scene.running(4, before=3)
    assert served.exported.offset == 3 * PAGE_SIZE
    assert (served.exported.address, served.exported.size) == (served.address, 4 * PAGE_SIZE)
    touches = served.touch(0, 3)
    for byte in (1, 2):
        served.program.answer(served.program.fault(), byte)
    assert [touch.result() for touch in touches] == [there(1), there(2)]
    served.program.put(1, 5)
    served.program.put(2, 6)
    announced(served, 0, 4)
    assert [scene.stage.read(served.at(page)).byte for page in range(4)] == [1, 5, 6, 2]
    assert os.pread(served.program.memory_fd, 3 * PAGE_SIZE, 0) == bytes(3 * PAGE_SIZE)


def test_a_part_of_a_mapping(scene: Scene) -> None:
    """Registered in the middle: its offset in the file is the mapping's and where it begins in it."""
    address = scene.mapped(scene.file(8), 6, before=2)
    descriptor = scene.registered(address + PAGE_SIZE, 3)
    served = scene.served(descriptor.export(pager=scene.pager))
    assert served.exported.offset == 3 * PAGE_SIZE
    served.program.handshake()

    touches = served.touch(0, 2)
    for byte in (1, 2):
        served.program.answer(served.program.fault(), byte)
    assert [touch.result() for touch in touches] == [there(1), there(2)]
    for outside in (address, address + 4 * PAGE_SIZE):
        assert scene.stage.read(outside) == there(0), "ordinary memory"


def test_two_ranges_that_touch_are_one(scene: Scene) -> None:
    address = scene.mapped(scene.file(6), 6)
    descriptor = scene.registered(address, 2)
    for start in (4, 2):
        madvise((address + start * PAGE_SIZE, 2 * PAGE_SIZE), MADV_USERFAULT)
        descriptor.register((address + start * PAGE_SIZE, 2 * PAGE_SIZE))
    served = scene.served(descriptor.export(pager=scene.pager))
    assert served.exported.size == 6 * PAGE_SIZE
    served.program.handshake()

    touches = served.touch(1, 2, 5)
    for byte in (1, 2, 3):
        served.program.answer(served.program.fault(), byte)
    assert [touch.result() for touch in touches] == [there(1), there(2), there(3)]


def test_memory_that_is_read_only_for_the_application(scene: Scene) -> None:
    served = scene.running(2)
    memory.protect(served.address, 2 * PAGE_SIZE, memory.PROT_READ)
    (touch,) = served.touch(0)
    served.program.answer(served.program.fault(), 1)
    assert touch.result() == there(1)


def test_pages_that_are_there_when_it_is_exported_stay_visible(scene: Scene) -> None:
    """Those that the application has touched. What is in the file only has to be announced from then on."""
    fd = scene.file(64)
    os.pwrite(fd, page_of(1), 0)
    os.pwrite(fd, page_of(2), 40 * PAGE_SIZE)  # so far away that reading the first does not bring it in
    address = scene.mapped(fd, 64)
    assert scene.stage.read(address) == there(1)

    served = scene.served(scene.registered(address, 64).export(pager=scene.pager))
    served.program.handshake()

    assert scene.stage.read(address) == there(1)
    (touch,) = served.touch(40)
    assert served.program.fault() == served.at(40)
    served.program.announce(40)
    assert touch.result() == there(2)


def test_a_second_mapping_of_the_file_sees_everything(scene: Scene) -> None:
    """Only the exported mapping is guarded: the file is the program's, and whoever else looks at it sees it."""
    served = scene.running(2)
    other = scene.mapped(served.program.memory_fd, 2)
    served.program.put(1, 3)
    assert scene.stage.read(other + PAGE_SIZE) == there(3)
    assert scene.stage.read(other) == there(0), "an ordinary hole, and now a page of zeros in the file"

    (touch,) = served.touch(0)
    served.program.fault()
    served.program.announce(0)
    assert touch.result() == there(0)


def test_memory_that_is_unmapped_while_it_is_exported(scene: Scene, ground: Ground) -> None:
    served = scene.running(4)
    memory.unmap(served.at(2), 2 * PAGE_SIZE)
    served.program.put(2, 1)
    announced(served, 0, 4)
    (touch,) = served.touch(0)
    served.program.answer(served.program.fault(), 1)
    assert touch.result() == there(1)
    assert ground.rests(0.1)
    MARKS.forget(served.at(2), served.at(4))


@pytest.mark.parametrize("pages", [1, 40, 3000])
def test_one_program_reads_and_writes_nothing_but_what_it_must(scene: Scene, pages: int) -> None:
    """A scan of the memory in one thread: as many reads as pages, and as many writes."""
    served = scene.running(pages)
    scan = scene.stage.call(touch_bytes, served.address, pages * PAGE_SIZE)
    for page in range(pages):
        address = served.program.fault()
        assert address & -PAGE_SIZE == served.at(page)
        served.program.answer(address, page % 255 + 1)
    assert scan.result() == b"".join(page_of(page % 255 + 1) for page in range(pages))
    assert served.info == served.info.__class__(0, 0, "RUNNING", pages, 0, "")


def test_the_program_needs_no_more_than_four_numbers(scene: Scene) -> None:
    served = scene.fresh(2, before=1)
    exported = served.exported
    program = Program(os.dup(exported.fileno()), os.dup(exported.memory_fd), exported.address, exported.offset)
    try:
        program.handshake()
        (touch,) = served.touch(1)
        program.answer(program.fault(), 6)
        assert touch.result() == there(6)
    finally:
        os.close(program.fd)
        os.close(program.memory_fd)
