"""What the kernel and Python offer on this machine, as findings: the gates, each feature, each package."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

from userfault.cli.screen import Finding
from userfault.kernel.abi import FEATURE_SINCE, Feature
from userfault.kernel.opening import describe_features
from userfault.pager.link import FEATURES
from userfault.stores.page_cache import cached

if TYPE_CHECKING:
    from userfault.cli.screen import Status
    from userfault.kernel.capabilities import Capabilities
    from userfault.kernel.gates import Gate

_MEANINGS = {
    Feature.PAGEFAULT_FLAG_WP: "the first write to a page is seen: mode 'c'",
    Feature.EVENT_FORK: "a forked child's faults can be followed",
    Feature.EVENT_REMAP: "mremap(2) of a registered range is reported",
    Feature.EVENT_REMOVE: "MADV_DONTNEED and MADV_REMOVE are reported",
    Feature.MISSING_HUGETLBFS: "missing pages of hugetlb memory are reported",
    Feature.MISSING_SHMEM: "missing pages of a memfd are reported: what regions are made of",
    Feature.EVENT_UNMAP: "munmap(2) of a registered range is reported",
    Feature.SIGBUS: "a touch can be a SIGBUS in the touching thread instead of a message",
    Feature.THREAD_ID: "a message says who faults, so that the pager can follow to its core",
    Feature.MINOR_HUGETLBFS: "pages that hugetlb memory has, but no mapping of it, are reported",
    Feature.MINOR_SHMEM: "pages that a memfd has, but no mapping of it, are reported",
    Feature.EXACT_ADDRESS: "a message gives the address touched, not only its page",
    Feature.WP_HUGETLBFS_SHMEM: "write protection works on a memfd: mode 'c'",
    Feature.WP_UNPOPULATED: "pages that are not there can be write-protected",
    Feature.POISON: "a block that its store cannot give is a SIGBUS, not a wait without end",
    Feature.WP_ASYNC: "changed pages can be tracked without stopping the writer",
    Feature.MOVE: "pages can be moved instead of copied",
}


# -- ways in -----------------------------------------------------------------------------------------------------


_OPEN_ONE = "Open one of the two ways above."


def ways_in(found: Capabilities) -> Iterator[Finding]:
    """Yield what is known about each gate."""
    yield _way_in("system call", found.syscall, found.device, found)
    yield _way_in("/dev/userfaultfd", found.device, found.syscall, found)
    yield _privileged(found)
    yield _user_mode_only(found)


def _way_in(name: str, gate: Gate, other: Gate, found: Capabilities) -> Finding:
    if gate.ok:
        return Finding("ok", name, "open", "gives a descriptor that serves every fault", value=True)
    if other.ok:
        return Finding("note", name, str(gate), "not needed, since the other way is open", value=False)
    status: Status = "limited" if found.user_mode_only else "missing"
    meaning = "gives no descriptor that serves every fault"
    return Finding(status, name, str(gate), meaning, gate.remedy, value=False)


def _privileged(found: Capabilities) -> Finding:
    if found.privileged:
        meaning = "faults inside system calls are served: read(2) into a region, write(2) from it"
        return Finding("ok", "privileged", "yes", meaning, value=True)
    if found.user_mode_only:
        meaning = "read(2) into a region, write(2) from it fail with EFAULT unless ensure() or pinned() came before"
        return Finding("limited", "privileged", "no", meaning, _OPEN_ONE, value=False)
    return Finding("missing", "privileged", "no", "no fault inside a system call is served", value=False)


def _user_mode_only(found: Capabilities) -> Finding:
    yes = "yes" if found.user_mode_only else "no"
    if found.privileged:
        meaning = "not needed, since there is privilege"
        return Finding("note", "user-mode-only", yes, meaning, value=found.user_mode_only)
    if found.user_mode_only:
        return Finding("ok", "user-mode-only", yes, "faults of ordinary code are served", value=True)
    return Finding("missing", "user-mode-only", yes, "no region can be opened", _OPEN_ONE, value=False)


# -- features --------------------------------------------------------------------------------------------------------


def needed(found: Capabilities) -> Iterator[Finding]:
    """Yield what is known about each feature that a region needs."""
    for feature in Feature(FEATURES):
        yield _feature(feature, found, "missing")
    meaning = "files in memory that another process can fill and drop"
    yield _presence("memfd", found.memfd, meaning, "It needs Linux 3.17 or later, configured for it.", "missing")


def offered(found: Capabilities) -> Iterator[Finding]:
    """Yield what is known about everything that regions do without."""
    for feature in Feature:
        if not feature & FEATURES:
            yield _fork(found) if feature is Feature.EVENT_FORK else _feature(feature, found)
    unknown = int(found.features) & ~sum(Feature)
    if unknown:
        yield Finding("note", "newer features", hex(unknown), "userfault does not know their names", value=unknown)
    for name, there, since, meaning in (
        ("PAGEMAP_SCAN", found.pagemap_scan, "6.7", "changed pages are found in one call"),
        ("process_madvise", found.process_madvise, "5.10", "advice for many ranges at once"),
        ("cachestat", _cachestat(), "6.5", "a look tells whether a file is in memory"),
    ):
        yield _presence(name, there, meaning, f"It needs Linux {since} or later.")
    huge, meaning = found.huge_pages_free, "for memfd.create(hugetlb=True); regions use none"
    yield Finding("note", "huge pages (hugetlb)", f"{huge} free", meaning, value=huge)


def _feature(feature: Feature, found: Capabilities, absent: Status = "note") -> Finding:
    name, meaning = feature.name or hex(feature), _MEANINGS[feature]
    if not found.usable:
        since = f"Only a userfaultfd can tell; Linux has it since {FEATURE_SINCE[feature]}."
        return Finding("note", name, "unknown", meaning, since)
    return _presence(name, found.has(feature), meaning, describe_features(feature)[1], absent)


def _fork(found: Capabilities) -> Finding:
    finding = _feature(Feature.EVENT_FORK, found)
    if found.has(Feature.EVENT_FORK) and not found.event_fork:
        remedy = "Run with CAP_SYS_PTRACE in the initial user namespace."
        return Finding("note", finding.name, "not for this process", finding.meaning, remedy, value=False)
    return finding


def _presence(name: str, there: bool, meaning: str, remedy: str, absent: Status = "note") -> Finding:
    if there:
        return Finding("ok", name, "yes", meaning, value=True)
    return Finding(absent, name, "no", meaning, remedy, value=False)


def _cachestat() -> bool:
    fd = os.memfd_create("userfault-doctor", os.MFD_CLOEXEC)
    try:
        return cached(fd, 0, 1) is not None
    finally:
        os.close(fd)


# -- Python ----------------------------------------------------------------------------------------------------------


def python() -> Iterator[Finding]:
    """Yield what is known about Python and its packages."""
    found = f"{platform.python_implementation()} {platform.python_version()}"
    yield Finding("ok", "interpreter", found, "3.11 or later is needed", value=platform.python_version())
    yield _package("numpy", "for open_array() and the demo", "numpy", "limited")
    yield _package("rich", "for colour and tables in a terminal", "cli", "note")


def _package(name: str, meaning: str, extra: str, absent: Status) -> Finding:
    if find_spec(name) is not None:
        return Finding("ok", name, "installed", meaning, value=True)
    return Finding(absent, name, "not installed", meaning, f"pip install 'userfault[{extra}]'", value=False)
