"""Scenes of the protocol of 2014: a pager in a thread of the process, and one in another program."""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import signal
import struct
from typing import TYPE_CHECKING

from tests.crash.injection.trial import OWN, PATIENCE_S, Background, mark, own
from tests.crash.programs.common import PAGE

import userfault
from userfault import madvise, userfaultfd
from userfault.kernel import memfd, memory
from userfault.kernel.userfaultfd import Userfaultfd
from userfault.protocol import MADV_NOUSERFAULT, MADV_USERFAULT, UFFD_CLOEXEC, UFFD_NONBLOCK
from userfault.protocol.reservation import Reservation
from userfault.testing import poke, touch

if TYPE_CHECKING:
    from tests.crash.injection.trial import Trial

VERSION = (0xAA).to_bytes(8, "little")
PAGES = 8


def page(number: int) -> bytes:
    return bytes([number + 1]) * PAGE


def protocol(trial: Trial) -> None:
    """Be the pager, in a thread of this process."""
    with own():
        area = mmap.mmap(-1, PAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = memory.address_of(area)
    descriptor = trial.insist("userfaultfd", lambda: userfaultfd(UFFD_CLOEXEC | UFFD_NONBLOCK))
    if descriptor is None:
        return
    if _set_up(trial, descriptor, area):
        for number in range(3):
            _serve(trial, descriptor, address, number)
        with trial.step("unregister"):
            descriptor.unregister((address + 4 * PAGE, PAGE))
        with trial.step("register anew"):
            descriptor.register((address + 4 * PAGE, PAGE))
        with trial.step("fdinfo"):
            descriptor.fdinfo()
    trial.do("close", descriptor.close)
    trial.do("unmark", lambda: madvise(area, MADV_NOUSERFAULT))
    with trial.step("read"):
        trial.check("placed", area[: 3 * PAGE], b"".join(map(page, range(3))))
    with own():
        trial.do("unmap", area.close)


def _set_up(trial: Trial, descriptor: userfault.UserfaultFD, area: mmap.mmap) -> bool:
    return (
        trial.do("mark", lambda: madvise(area, MADV_USERFAULT))
        and trial.do("register", lambda: descriptor.register(area))
        and trial.insist("handshake", descriptor.handshake) is True
    )


def _serve(trial: Trial, descriptor: userfault.UserfaultFD, address: int, number: int) -> None:
    toucher = Background(lambda: touch(address + number * PAGE, PAGE))
    words = trial.insist("read", lambda: _next(descriptor))
    trial.check("fault", words or b"", struct.pack("=Q", address + number * PAGE))
    if number % 2:
        source = trial.insist("map", lambda: memory.map_memory(PAGE))
        if source is not None:
            poke(source, page(number))
            trial.do("remap", lambda: userfault.remap_anon_pages(address + number * PAGE, source, PAGE))
            trial.do("unmap", lambda: memory.unmap(source, PAGE))
    else:
        trial.do("place", lambda: descriptor.place(address + number * PAGE, page(number)))
    start = address + number * PAGE
    trial.do("write", lambda: descriptor.write(struct.pack("=QQ", start, start + PAGE)))
    toucher.join()
    trial.check("touched", toucher.result, page(number))


def _next(descriptor: userfault.UserfaultFD) -> bytes:
    while True:
        descriptor.wait(PATIENCE_S, select.POLLIN)
        with contextlib.suppress(BlockingIOError):
            return descriptor.read()


def reserve(trial: Trial) -> None:
    """Give out pieces of a reservation."""
    with trial.step("reserve"), Reservation(1 << 30) as reservation:
        pieces = [trial.insist("piece", lambda: reservation.piece(PAGE)) for _ in range(3)]
        with trial.step("place"), Userfaultfd.open() as uffd:
            trial.expect("open", not uffd.closed)
        for piece in pieces:
            if piece is not None:
                trial.do("close piece", piece.close)


def export(trial: Trial) -> None:
    """Have another program be the pager."""
    fd = trial.insist("memfd", lambda: memfd.create("victim", PAGES * PAGE))
    if fd is None:
        return
    with own():
        area = mmap.mmap(fd, PAGES * PAGE)
    descriptor = trial.insist("userfaultfd", lambda: userfaultfd(UFFD_CLOEXEC))
    if descriptor is not None:
        trial.do("mark", lambda: madvise(area, MADV_USERFAULT))
        trial.do("register", lambda: descriptor.register(area))
        exported = trial.insist("export", lambda: descriptor.export(fd))
        if exported is not None:
            _have_served(trial, exported, fd, area)
        trial.do("close", descriptor.close)
        trial.do("unmark", lambda: madvise(area, MADV_NOUSERFAULT))
    with own():
        trial.do("unmap", area.close)
        os.close(fd)


def _have_served(trial: Trial, exported: userfault.Exported, fd: int, area: mmap.mmap) -> None:
    for life in range(2):
        if pid := trial.fork(lambda child: program(child, exported.fileno(), exported.memory_fd, exported.address)):
            for number in range(4):
                trial.check("page", area[number * PAGE : (number + 1) * PAGE], page(number))
            trial.do("drop", lambda: memfd.punch_hole(fd, 0, PAGES * PAGE))
            if life:
                trial.do("close the exported", exported.close)
            else:
                with own():
                    os.kill(pid, signal.SIGUSR1)
            trial.join(pid)
            if not life:
                trial.do("renew", exported.renew)
    trial.do("close the exported", exported.close)


def program(child: Trial, fd: int, memory_fd: int, address: int) -> None:
    """Be a pager that knows nothing but read and write. SIGUSR1 ends it."""
    mark(OWN)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # a handler of Python's would miss one that comes just before a read
    os.write(fd, VERSION)
    child.check("the version", os.read(fd, 8), VERSION)
    while words := os.read(fd, 8):
        start = struct.unpack("=Q", words)[0] & -PAGE
        os.pwrite(memory_fd, page((start - address) // PAGE), start - address)
        os.write(fd, struct.pack("=QQ", start, start + PAGE))
