"""Exported descriptors: how one is made, what is refused, and what its owner can do afterwards."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import resource
import select
from typing import TYPE_CHECKING

import pytest
from tests.conformance.exported_tools import make_ground, make_scene, shared_mapping  # noqa: F401
from tests.conformance.protocol_tools import page_of, sigbus, there

import userfault
from userfault import madvise, userfaultfd
from userfault.errors import Error, KernelError, PagerLostError
from userfault.kernel import abi, memory
from userfault.kernel.memory import PAGE_SIZE
from userfault.pager.client import Pager
from userfault.protocol import MADV_NOUSERFAULT, MADV_USERFAULT, UFFD_CLOEXEC, UFFD_NONBLOCK, State
from userfault.testing import run_child

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conformance.exported_tools import Ground, Scene

    from userfault.exported import Exported, UserfaultFD


@contextlib.contextmanager
def refused(number: int, *words: str) -> Iterator[None]:
    """What is done within raises a KernelError that says this."""
    with pytest.raises(KernelError) as caught:
        yield
    assert caught.value.errno == number, caught.value
    assert all(word in str(caught.value) for word in words), caught.value


def assert_unchanged(scene: Scene, descriptor: UserfaultFD, address: int) -> None:
    """A descriptor that was not exported is what it was before: here it is the pager itself."""
    if descriptor.state is not State.RUNNING:
        assert descriptor.handshake()
    touch = scene.stage.start_read(address)
    scene.stage.answer(descriptor, scene.stage.fault(descriptor), 5)
    assert touch.result() == there(5)
    assert scene.pager.regions == 0


# -- what is refused --------------------------------------------------------------------------------------------------


def test_anonymous_memory_cannot_be_exported(scene: Scene) -> None:
    address = scene.stage.anonymous(2)
    descriptor = scene.registered(address, 2)
    with refused(errno.EINVAL, "shared mapping of a memory file"):
        descriptor.export(pager=scene.pager)
    assert_unchanged(scene, descriptor, address)


def test_shared_anonymous_memory_cannot_be_exported_without_its_descriptor(scene: Scene) -> None:
    """It is a file, but nobody has a descriptor of it; with the right to look into map_files it works all the same."""
    with mmap.mmap(-1, 2 * PAGE_SIZE) as shared:
        address = memory.address_of(shared)
        descriptor = scene.registered(address, 2)
        try:
            served = scene.served(descriptor.export(pager=scene.pager))
        except KernelError as error:
            assert error.errno == errno.EINVAL  # noqa: PT017  # either is right, by privilege
        else:
            served.program.handshake()
            (touch,) = served.touch(1)
            served.program.answer(served.program.fault(), 4)
            assert touch.result() == there(4)
        descriptor.close()
        madvise((address, 2 * PAGE_SIZE), MADV_NOUSERFAULT)


def test_a_private_mapping_of_a_memory_file_cannot_be_exported(scene: Scene) -> None:
    """Marking it is refused already; where that is possible, exporting it is."""
    address = scene.mapped(scene.file(2), 2, flags=memory.MAP_PRIVATE)
    descriptor = userfaultfd(UFFD_NONBLOCK | UFFD_CLOEXEC)
    scene.stage.keep(descriptor)
    with refused(errno.EINVAL):
        madvise((address, 2 * PAGE_SIZE), MADV_USERFAULT)
        descriptor.register((address, 2 * PAGE_SIZE))
        descriptor.export(pager=scene.pager)


@pytest.mark.parametrize("count", [0, 2, 3])
def test_just_one_range_can_be_exported(scene: Scene, count: int) -> None:
    address = scene.mapped(scene.file(8), 8)
    descriptor = userfaultfd(UFFD_NONBLOCK | UFFD_CLOEXEC)
    scene.stage.keep(descriptor)
    for number in range(count):
        madvise((address + 2 * number * PAGE_SIZE, PAGE_SIZE), MADV_USERFAULT)
        descriptor.register((address + 2 * number * PAGE_SIZE, PAGE_SIZE))
    with refused(errno.EINVAL, f"{count} separate ranges"):
        descriptor.export(pager=scene.pager)
    if count:
        assert_unchanged(scene, descriptor, address)


def test_two_mappings_side_by_side_cannot_be_exported(scene: Scene) -> None:
    """As addresses they are one range, but not in one file, or not in this order."""
    address = scene.mapped(scene.file(4), 4)
    flags = memory.MAP_SHARED | abi.MAP_FIXED
    memory.map_memory(2 * PAGE_SIZE, fd=scene.file(2), address=address + 2 * PAGE_SIZE, flags=flags)
    descriptor = scene.registered(address, 4)
    with refused(errno.EINVAL, "one shared mapping"):
        descriptor.export(pager=scene.pager)
    assert_unchanged(scene, descriptor, address)


def test_unmarked_memory_cannot_be_exported(scene: Scene) -> None:
    address = scene.mapped(scene.file(2), 2)
    descriptor = userfaultfd(UFFD_NONBLOCK | UFFD_CLOEXEC)
    scene.stage.keep(descriptor)
    descriptor.register((address, 2 * PAGE_SIZE))
    with refused(errno.EINVAL, "is not marked", "MADV_USERFAULT"):
        descriptor.export(pager=scene.pager)
    madvise((address, PAGE_SIZE), MADV_USERFAULT)
    with refused(errno.EINVAL, "is not marked"):
        descriptor.export(pager=scene.pager)

    madvise((address, 2 * PAGE_SIZE), MADV_USERFAULT)
    assert_unchanged(scene, descriptor, address)
    assert scene.served(descriptor.export(pager=scene.pager)).exported.size == 2 * PAGE_SIZE


def test_a_closed_one_cannot_be_exported(scene: Scene) -> None:
    descriptor = scene.registered(scene.mapped(scene.file(2), 2), 2)
    descriptor.close()
    with refused(errno.EBADF):
        descriptor.export(pager=scene.pager)


def test_none_can_be_exported_twice(scene: Scene) -> None:
    served = scene.running(2)
    descriptor = served.exported._owner
    for _ in range(2):
        with refused(errno.EBUSY, "was exported"):
            descriptor.export(pager=scene.pager)
    (touch,) = served.touch(0)
    served.program.answer(served.program.fault(), 1)
    assert touch.result() == there(1)
    assert scene.pager.regions == 1


def test_nor_by_two_threads_at_once(scene: Scene) -> None:
    """One gets it, the others are told, and nothing is left of theirs in the pager."""
    for _ in range(20):
        descriptor = scene.registered(scene.mapped(scene.file(2), 2), 2, UFFD_CLOEXEC)

        found: list[Exported] = []

        def export(descriptor: UserfaultFD = descriptor, found: list[Exported] = found) -> int:
            try:
                found.append(descriptor.export(pager=scene.pager))
            except KernelError as error:
                return error.errno or -1
            return 0

        threads = [scene.stage.call(export) for _ in range(4)]
        assert sorted(thread.result() for thread in threads) == [0, errno.EBUSY, errno.EBUSY, errno.EBUSY]
        served = scene.served(found.pop())
        served.program.handshake()
        (touch,) = served.touch(1)
        served.program.answer(served.program.fault(), 3)
        assert touch.result() == there(3)
        assert scene.pager.regions == 1
        served.exported.close()


USES: dict[str, Callable[[UserfaultFD], object]] = {
    "read": lambda descriptor: descriptor.read(),
    "write": lambda descriptor: descriptor.write(bytes(8)),
    "poll": lambda descriptor: descriptor.poll(),
    "wait": lambda descriptor: descriptor.wait(0),
    "handshake": lambda descriptor: descriptor.handshake(),
    "place": lambda descriptor: descriptor.place(descriptor.ranges[0][0], page_of(1)),
    "register": lambda descriptor: descriptor.register(descriptor.ranges[0]),
    "unregister": lambda descriptor: descriptor.unregister(descriptor.ranges[0]),
    "fileno": lambda descriptor: descriptor.fileno(),
    "export": lambda descriptor: descriptor.export(),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_its_owner_has_given_it_away(scene: Scene, use: Callable[[UserfaultFD], object]) -> None:
    descriptor = scene.fresh().exported._owner
    with refused(errno.EBUSY, "it was exported"):
        use(descriptor)
    assert descriptor.fdinfo().startswith("pending:\t0\ntotal:\t0\n")


def test_who_waited_at_the_descriptor_is_told(scene: Scene) -> None:
    descriptor = scene.registered(scene.mapped(scene.file(2), 2), 2)
    assert descriptor.handshake()
    waiting = scene.stage.call(descriptor.wait)
    scene.served(descriptor.export(pager=scene.pager))
    with refused(errno.EBUSY, "it was exported"):
        waiting.result()


# -- the memory's descriptor ------------------------------------------------------------------------------------------


def test_the_memory_s_descriptor_may_be_named(scene: Scene) -> None:
    fd = scene.file(2)
    descriptor = scene.registered(scene.mapped(fd, 2), 2)
    served = scene.served(descriptor.export(fd, pager=scene.pager))
    assert served.exported.memory_fd != fd, "it is opened anew"
    assert os.fstat(served.exported.memory_fd) == os.fstat(fd)


def test_another_file_is_refused(scene: Scene) -> None:
    address = scene.mapped(scene.file(2), 2)
    descriptor = scene.registered(address, 2)
    reader, writer = os.pipe()
    other = scene.file(2)
    for wrong in (other, reader, writer, 987654, -1):
        with refused(errno.EINVAL, f"descriptor {wrong} is not the file"):
            descriptor.export(wrong, pager=scene.pager)
    os.close(reader)
    os.close(writer)
    assert_unchanged(scene, descriptor, address)


def test_a_descriptor_that_was_opened_for_reading_will_do(scene: Scene) -> None:
    fd = scene.file(2)
    descriptor = scene.registered(scene.mapped(fd, 2), 2)
    reading = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    served = scene.served(descriptor.export(reading, pager=scene.pager))
    os.close(reading)
    served.program.handshake()
    (touch,) = served.touch(1)
    served.program.answer(served.program.fault(), 4)
    assert touch.result() == there(4)


# -- descriptors that run out -----------------------------------------------------------------------------------------


def test_no_descriptors_left_here(scene: Scene) -> None:
    """Whichever of the few that it takes is the one too many: a clean error, and nothing is changed."""
    address = scene.mapped(scene.file(2), 2)
    descriptor = scene.registered(address, 2)
    held = len(os.listdir("/proc/self/fd")) - 1
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    exported = None
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (held + 16, before[1]))
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        for spare in range(10):
            if spare:
                os.close(taken.pop())
            try:
                exported = descriptor.export(pager=scene.pager)
            except KernelError as error:
                assert error.errno == errno.EMFILE  # noqa: PT017  # until there are enough
                assert len(os.listdir("/proc/self/fd")) - 1 == held + len(taken) if spare else True
                assert scene.pager.regions == 0
            else:
                break
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert exported is not None
    assert spare > 2
    served = scene.served(exported)
    served.program.handshake()
    (touch,) = served.touch(1)
    served.program.answer(served.program.fault(), 4)
    assert touch.result() == there(4)


def exhaust_the_pager(limit: int) -> tuple[int, int, bool]:
    """Export until the pager, whose limit cannot be raised, has no descriptors left; close one, and export again."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    pager = Pager()
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    mappings, descriptors, exports, errors = [], [], [], []
    try:
        for _ in range(limit):
            mapping = shared_mapping(1)
            madvise(mapping, MADV_USERFAULT)
            descriptor = userfaultfd(UFFD_NONBLOCK | UFFD_CLOEXEC)
            descriptor.register(mapping)
            mappings.append(mapping)
            descriptors.append(descriptor)
            exports.append(descriptor.export(pager=pager))
    except KernelError as error:
        errors.append(error.errno or -1)
    worker = pager.worker_pid
    exports.pop().close()
    exports.append(descriptors[-1].export(pager=pager))
    for exported in exports:
        os.write(exported.fileno(), (0xAA).to_bytes(8, "little"))
        assert os.read(exported.fileno(), 8)[0] == 0xAA
        exported.close()
    alive = pager.worker_pid == worker
    descriptors[-1].close()
    pager.close()
    for mapping in mappings:
        madvise(mapping, MADV_NOUSERFAULT)
        mapping.close()
    return len(exports), errors[0], alive


@pytest.mark.parametrize("limit", [60, 61, 62, 63, 64, 65, 66])
def test_no_descriptors_left_there(limit: int) -> None:
    count, number, alive = run_child(exhaust_the_pager, limit).check().value
    assert count > 1
    assert number == errno.EMFILE
    assert alive


# -- many, and the pager ----------------------------------------------------------------------------------------------


def test_fifty_at_once(scene: Scene) -> None:
    many = [scene.running(2) for _ in range(50)]
    assert scene.pager.regions == 50
    touches = [served.touch(number % 2)[0] for number, served in enumerate(many)]
    for number, served in enumerate(many):
        assert served.program.fault() == served.at(number % 2)
    for number, served in enumerate(many):
        served.program.answer(served.at(number % 2), number + 1)
    assert [touch.result().byte for touch in touches] == list(range(1, 51))
    for served in many[::2]:
        served.exported.close()
    for served in many[1::2]:
        (touch,) = served.touch(0)
        served.program.answer(served.program.fault(), 7)
        assert touch.result() == there(7)
    assert scene.pager.regions == 25


def test_regions_and_exports_share_a_pager(scene: Scene, ground: Ground) -> None:
    store = userfault.MemoryStore(page_of(9) * 64)
    with userfault.Region(store, "c", PAGE_SIZE, pager=ground.pager) as region:
        served = scene.running(8)
        assert scene.pager.regions == 2
        for page in range(8):
            (touch,) = served.touch(page)
            assert region.memory[page * PAGE_SIZE] == 9
            served.program.answer(served.program.fault(), page + 1)
            assert touch.result() == there(page + 1)
        served.exported.close()
        assert region.memory[60 * PAGE_SIZE] == 9
    assert scene.pager.regions == 0


def test_a_pager_with_an_export_is_not_closed(scene: Scene) -> None:
    with Pager() as pager:
        address = scene.mapped(scene.file(1), 1)
        exported = scene.registered(address, 1).export(pager=pager)
        assert exported.pager is pager
        with pytest.raises(Error, match="1 regions are open"):
            pager.close()
        served = scene.served(exported)
        served.program.handshake()
        (touch,) = served.touch(0)
        served.program.answer(served.program.fault(), 2)
        assert touch.result() == there(2)
        exported.close()


def test_a_closed_pager_takes_none(scene: Scene) -> None:
    address = scene.mapped(scene.file(1), 1)
    descriptor = scene.registered(address, 1)
    with Pager() as pager:
        pass
    with pytest.raises(PagerLostError):
        descriptor.export(pager=pager)
    assert_unchanged(scene, descriptor, address)


def test_the_default_pager_is_used_and_kept_by_it() -> None:
    with shared_mapping(1) as shared, userfaultfd(UFFD_CLOEXEC) as descriptor:
        madvise(shared, MADV_USERFAULT)
        descriptor.register(shared)
        with descriptor.export() as exported:
            assert exported.pager is userfault.default_pager()
        madvise(shared, MADV_NOUSERFAULT)


# -- one that is forgotten --------------------------------------------------------------------------------------------


def test_a_forgotten_one_is_a_warning_and_is_closed(scene: Scene) -> None:
    address = scene.mapped(scene.file(2), 2)
    exported = scene.registered(address, 2).export(pager=scene.pager)
    copy = os.dup(exported.fileno())
    touch = scene.stage.start_read(address)
    forgotten = [exported]
    del exported
    with pytest.warns(ResourceWarning, match="ASK_PROTOCOL .* was never closed"):
        forgotten.clear()
    assert touch.result().signal == sigbus(0).signal
    assert select.select([copy], [], [], 20)[0]
    assert os.read(copy, 8) == b""
    os.close(copy)
    assert scene.pager.regions == 0
    assert scene.stage.read(address + PAGE_SIZE) == sigbus(address + PAGE_SIZE)


def test_what_it_says_of_itself(scene: Scene) -> None:
    served = scene.fresh(2)
    where = f"[{served.address:#x}, {served.address + 2 * PAGE_SIZE:#x})"
    assert repr(served.exported) == f"<userfault.Exported fd={served.exported.fileno()} ASK_PROTOCOL {where}>"
    served.exported.close()
    assert repr(served.exported) == f"<userfault.Exported closed {where}>"
