"""The limits of this machine and this process that regions may meet, and what each means for them."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator

from userfault.cli import figures
from userfault.cli.screen import Finding
from userfault.kernel import process
from userfault.kernel.procfs import read_text

_MAPPINGS_PER_REGION = 3  # the memory, its ledger, and what parts them; counted in /proc/self/maps
_DESCRIPTORS_OF_PAGER = 32  # what each of the pager's processes holds besides one descriptor for a region
_FEW_DESCRIPTORS = 64
_LITTLE_MEMORY = 256 << 20
_STRICT = 2  # vm.overcommit_memory


def limits() -> Iterator[Finding]:
    """Yield what was found about each limit."""
    yield _address_space()
    yield _mappings()
    yield _descriptors()
    yield from _memory()
    yield _overcommit()
    yield _shmem_huge_pages()


def _read(path: str) -> str:
    try:
        return read_text(path).strip()
    except OSError:
        return ""


def _address_space() -> Finding:
    name, most = "address space", resource.getrlimit(resource.RLIMIT_AS)[0]
    if sys.maxsize < 1 << 32:
        return Finding("missing", name, "32 bits", "has no room for regions", "Use a 64-bit Python.", 32)
    if most != resource.RLIM_INFINITY:
        meaning = "regions count in full against it, however little of them is in memory"
        return Finding("limited", name, figures.size(most), meaning, "ulimit -v unlimited", most)
    return Finding("ok", name, "not limited", "a region may be far larger than memory")


def _mappings() -> Finding:
    name, text = "vm.max_map_count", _read("/proc/sys/vm/max_map_count")
    if not text.isdigit():
        return Finding("note", name, "unknown", "how many regions can be open at once is not known")
    regions = int(text) // _MAPPINGS_PER_REGION
    return Finding(
        "ok",
        name,
        text,
        f"{regions} regions at once: each takes about {_MAPPINGS_PER_REGION} mappings",
        value=int(text),
    )


def _descriptors() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    name, found = "RLIMIT_NOFILE", f"{_number(soft)}, at most {_number(hard)}"
    value = {"soft": soft, "hard": hard}
    if 0 <= soft < _FEW_DESCRIPTORS:
        return Finding(
            "limited", name, found, "hardly enough to start a pager", f"ulimit -n {_FEW_DESCRIPTORS} or more", value
        )
    if hard == resource.RLIM_INFINITY:
        return Finding("ok", name, found, "regions hold no descriptor here", value=value)
    meaning = f"{hard - _DESCRIPTORS_OF_PAGER} regions at once: the pager raises its own limit and holds one for each"
    return Finding("ok", name, found, meaning, value=value)


def _number(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)


def _memory() -> Iterator[Finding]:
    available, room = process.memory_available(), process.cgroup_headroom()
    meaning = f"the automatic budget of a region opened now is half of it: {figures.size(available // 2)}"
    little = available < _LITTLE_MEMORY
    remedy = "Free some, or give regions a small budget=." if little else ""
    found = f"{figures.size(available)} available"
    yield Finding("limited" if little else "ok", "memory", found, meaning, remedy, available)
    if room is None:
        yield Finding("ok", "cgroup", "no limit", "only the machine's memory counts")
    else:
        yield Finding(
            "ok",
            "cgroup",
            f"{figures.size(room)} left",
            "counted in the line above; what regions hold is charged to it",
            value=room,
        )


def _overcommit() -> Finding:
    name, text = "vm.overcommit_memory", _read("/proc/sys/vm/overcommit_memory")
    if text == str(_STRICT):
        meaning = (
            "every byte of a region of mode 'c' is accounted when it opens, so a large one may be refused (ENOMEM)"
        )
        return Finding(
            "limited", name, text, meaning, "sysctl vm.overcommit_memory=0, or open such regions with mode='r'", 2
        )
    return Finding(
        "ok", name, text or "unknown", "regions are accounted as their blocks come in", value=int(text or -1)
    )


def _shmem_huge_pages() -> Finding:
    text = _read("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    chosen = text[text.find("[") + 1 : text.find("]")] if "[" in text else "unknown"
    return Finding(
        "note", "huge pages (shmem)", chosen, "does not matter: UFFDIO_COPY installs small pages", value=chosen
    )
