"""Scenes of the kernel package, which programs with pagers of their own use by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.crash.programs.common import PAGE

from userfault.kernel import abi, maps, memory, process
from userfault.kernel import capabilities as offers
from userfault.kernel.pagemap import Pagemap
from userfault.kernel.userfaultfd import Userfaultfd
from userfault.testing import poke

if TYPE_CHECKING:
    from tests.crash.injection.trial import Trial


def probe(trial: Trial) -> None:
    """Look at the machine, and at this process."""
    with trial.step("probe"):
        offers.probe()
    with trial.step("processes"):
        process.memory_available()
        process.pss()
        process.userfaultfds()
        process.has_capability(process.CAP_SYS_PTRACE)
        process.huge_pages_free()
    with trial.step("maps"):
        maps.read_maps()
        maps.read_smaps()


def kernel(trial: Trial) -> None:
    """Use the kernel's operations one by one."""
    with trial.step("memory"):
        _use_memory(trial)
    with trial.step("a userfaultfd"):
        _use_userfaultfd(trial)
    with trial.step("pagemap"), Pagemap() as pagemap:
        area = memory.map_memory(PAGE)
        try:
            poke(area, b"x")
            pagemap.words(area, PAGE)
            pagemap.scan(area, PAGE, category_mask=abi.PAGE_IS_PRESENT)
        finally:
            memory.unmap(area, PAGE)


def _use_memory(trial: Trial) -> None:
    at, length = memory.map_memory(4 * PAGE), 4 * PAGE
    try:
        memory.populate(at, PAGE, write=True)
        trial.check("fetched", memory.fetch(at, 8), bytes(8))
        trial.expect("mapped", memory.is_mapped(at, PAGE))
        memory.mincore(at, 4 * PAGE)
        memory.advise(at, PAGE, abi.MADV_DONTNEED)
        at, length = memory.remap(at, 4 * PAGE, 8 * PAGE), 8 * PAGE
        memory.protect(at, PAGE, memory.PROT_READ)
    finally:
        memory.unmap(at, length)


def _use_userfaultfd(trial: Trial) -> None:
    at = memory.map_memory(8 * PAGE)
    try:
        with Userfaultfd.open(nonblock=True, via="device") as uffd:
            uffd.register(at, 4 * PAGE, abi.UFFDIO_REGISTER_MODE_MISSING)
            uffd.zeropage(at, PAGE)
            uffd.poison(at + PAGE, PAGE)
            uffd.read()
            uffd.fdinfo()
            uffd.unregister(at, 4 * PAGE)
    finally:
        memory.unmap(at, 8 * PAGE)
