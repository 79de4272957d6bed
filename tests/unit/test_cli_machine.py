"""What the doctor makes of a machine: each finding from the capabilities, and the limits."""

from __future__ import annotations

import resource
from dataclasses import replace
from errno import EACCES, EPERM
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from userfault.cli import limits as limits_module
from userfault.cli.limits import limits
from userfault.cli.machine import needed, offered, python, ways_in
from userfault.kernel import abi
from userfault.kernel.abi import Feature, Ioctl
from userfault.kernel.capabilities import Capabilities
from userfault.kernel.gates import Gate
from userfault.pager.link import FEATURES

if TYPE_CHECKING:
    from userfault.cli.screen import Finding

_EVERYTHING = Capabilities(
    kernel="6.8.0",
    page_size=4096,
    features=Feature(sum(Feature)),
    api_ioctls=Ioctl(0),
    anonymous_ioctls=Ioctl(0),
    memfd_ioctls=Ioctl(0),
    syscall=Gate(ok=True),
    device=Gate(ok=True),
    privileged=True,
    user_mode_only=True,
    event_fork=True,
    memfd=True,
    memfd_hugetlb=True,
    huge_pages_free=0,
    process_madvise=True,
    pagemap_scan=True,
)
_BY_PRIVILEGE = Gate(ok=False, errno=EPERM, gate="privilege", remedy="Run as root.")
_BY_MODE = Gate(ok=False, errno=EACCES, gate="file mode", remedy="Give permission.")
_BY_SECCOMP = Gate(ok=False, errno=EPERM, gate="seccomp", remedy="Let the profile pass it.")
_USER_MODE = replace(_EVERYTHING, syscall=_BY_PRIVILEGE, device=_BY_MODE, privileged=False, event_fork=False)
_CLOSED = replace(_USER_MODE, syscall=_BY_SECCOMP, user_mode_only=False, features=Feature(0))


def _by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def _statuses(capabilities: Capabilities) -> list[str]:
    return [finding.status for finding in ways_in(capabilities)]


def test_with_privilege_nothing_is_limited() -> None:
    assert _statuses(_EVERYTHING) == ["ok", "ok", "ok", "note"]


def test_one_open_way_is_enough() -> None:
    by_device = replace(_EVERYTHING, syscall=_BY_SECCOMP, user_mode_only=False)

    assert _statuses(by_device) == ["note", "ok", "ok", "note"]


def test_without_privilege_system_calls_are_limited_and_each_gate_has_its_remedy() -> None:
    found = _by_name(list(ways_in(_USER_MODE)))

    assert [finding.status for finding in found.values()] == ["limited", "limited", "limited", "ok"]
    assert found["system call"].remedy == "Run as root."
    assert found["/dev/userfaultfd"].remedy == "Give permission."
    assert "EFAULT" in found["privileged"].meaning


def test_closed_gates_are_missing() -> None:
    found = _by_name(list(ways_in(_CLOSED)))

    assert {finding.status for finding in found.values()} == {"missing"}
    assert found["system call"].found == "EPERM, refused by seccomp"


def test_every_feature_is_explained_once() -> None:
    names = [finding.name for finding in (*needed(_EVERYTHING), *offered(_EVERYTHING))]

    assert set(Feature.__members__) <= set(names)
    assert len(names) == len(set(names))


def test_a_feature_that_regions_need_is_missing_and_names_the_kernel() -> None:
    old = replace(_EVERYTHING, features=_EVERYTHING.features & ~Feature.POISON)

    found = _by_name(list(needed(old)))

    assert (found["POISON"].status, found["THREAD_ID"].status) == ("missing", "ok")
    assert "6.6" in found["POISON"].remedy


def test_a_feature_that_regions_do_without_is_only_noted() -> None:
    old = replace(_EVERYTHING, features=Feature(FEATURES), pagemap_scan=False)

    assert {finding.status for finding in needed(old)} == {"ok"}
    assert _by_name(list(offered(old)))["MOVE"].status == "note"
    assert "6.7" in _by_name(list(offered(old)))["PAGEMAP_SCAN"].remedy


def test_fork_events_are_for_some_only() -> None:
    assert _by_name(list(offered(_USER_MODE)))["EVENT_FORK"].found == "not for this process"


def test_without_a_userfaultfd_features_are_unknown() -> None:
    assert {finding.found for finding in needed(_CLOSED) if finding.name != "memfd"} == {"unknown"}


def test_features_of_a_newer_kernel_are_shown() -> None:
    newer = replace(_EVERYTHING, features=Feature(sum(Feature) | 1 << 40))

    assert _by_name(list(offered(newer)))["newer features"].found == hex(1 << 40)


def test_packages_that_are_not_installed_have_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("userfault.cli.machine.find_spec", lambda _: None)

    found = _by_name(list(python()))

    assert (found["numpy"].status, found["rich"].status) == ("limited", "note")
    assert found["rich"].remedy == "pip install 'userfault[cli]'"


def test_limits_of_this_machine_have_values() -> None:
    found = _by_name(list(limits()))

    assert found["vm.max_map_count"].value == int(Path("/proc/sys/vm/max_map_count").read_text())
    assert found["RLIMIT_NOFILE"].value == dict(
        zip(("soft", "hard"), resource.getrlimit(resource.RLIMIT_NOFILE), strict=True)
    )
    assert {finding.status for finding in found.values()} <= {"ok", "limited", "note"}


def _with_limit(monkeypatch: pytest.MonkeyPatch, values: tuple[int, int]) -> dict[str, Finding]:
    monkeypatch.setattr(resource, "getrlimit", lambda _: values)
    return _by_name(list(limits()))


def test_few_descriptors_and_a_bounded_address_space_are_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _with_limit(monkeypatch, (32, 32))

    assert found["RLIMIT_NOFILE"].status == "limited"
    assert found["address space"].remedy == "ulimit -v unlimited"


def test_unlimited_descriptors_are_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _with_limit(monkeypatch, (1024, resource.RLIM_INFINITY))

    assert (found["RLIMIT_NOFILE"].status, found["RLIMIT_NOFILE"].found) == ("ok", "1024, at most unlimited")


@pytest.mark.parametrize(
    ("path", "text", "name", "status"),
    [
        ("/proc/sys/vm/overcommit_memory", "2", "vm.overcommit_memory", "limited"),
        ("/proc/sys/vm/overcommit_memory", "1", "vm.overcommit_memory", "ok"),
        ("/proc/sys/vm/max_map_count", "", "vm.max_map_count", "note"),
    ],
)
def test_what_the_kernel_says_decides(
    monkeypatch: pytest.MonkeyPatch, path: str, text: str, name: str, status: str
) -> None:
    monkeypatch.setattr(limits_module, "_read", lambda asked: text if asked == path else "")

    assert _by_name(list(limits()))[name].status == status


def test_little_memory_is_a_limit_and_the_cgroup_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("userfault.kernel.process.memory_available", lambda: 100 << 20)
    monkeypatch.setattr("userfault.kernel.process.cgroup_headroom", lambda: 100 << 20)

    found = _by_name(list(limits()))

    assert (found["memory"].status, found["cgroup"].found) == ("limited", "100 MiB left")


def test_constants_of_the_doctor_are_those_of_the_kernel() -> None:
    assert Feature(FEATURES) == Feature(
        abi.UFFD_FEATURE_THREAD_ID
        | abi.UFFD_FEATURE_MISSING_SHMEM
        | abi.UFFD_FEATURE_PAGEFAULT_FLAG_WP
        | abi.UFFD_FEATURE_WP_HUGETLBFS_SHMEM
        | abi.UFFD_FEATURE_POISON
    )
