"""Who refuses a userfaultfd: each gate closed in earnest, in a child."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from userfault.errors import UnsupportedError
from userfault.kernel import Capabilities, Feature, Gate, Ioctl, capabilities, gates, memory, probe

if TYPE_CHECKING:
    from tests.conformance.conftest import RunChild

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives up rights on purpose: run the tests as root")

# What a child does before it gives up its rights: import everything, while it may read the files.
_DROP = """
import ctypes, json
probe(); Userfaultfd.open().fdinfo()
libc = ctypes.CDLL(None)
def drop():
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
    assert not libc.prctl(4, 1)  # PR_SET_DUMPABLE: /proc/self stays ours
def forbid(number):  # a seccomp filter that answers userfaultfd(2) with this errno
    class Program(ctypes.Structure):
        _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_char_p)]
    from struct import pack
    steps = [
        (0x20, 0, 0, 0),                     # load the number of the system call
        (0x15, 0, 1, abi.NR_userfaultfd),    # unless it is this one, skip one
        (0x06, 0, 0, 0x00050000 | number),   # SECCOMP_RET_ERRNO
        (0x06, 0, 0, 0x7FFF0000),            # SECCOMP_RET_ALLOW
    ]
    program = Program(len(steps), b"".join(pack("=HBBI", *step) for step in steps))
    assert not libc.prctl(38, 1, 0, 0, 0) and not libc.prctl(22, 2, ctypes.byref(program))
def attempt(**named):
    try:
        with Userfaultfd.open(**named) as uffd:
            print(uffd.via, uffd.user_mode_only)
    except UnsupportedError as error:
        print(error)
"""


def _gates(output: str) -> tuple[dict[str, object], dict[str, object]]:
    facts = json.loads(output.splitlines()[-1])
    return facts["syscall"], facts["device"]


@needs_root
def test_an_unprivileged_user_is_served_user_mode_only(run_child: RunChild) -> None:
    result = run_child(
        _DROP
        + """
drop()
attempt()
uffd = Userfaultfd.open(Feature.MOVE | Feature.WP_ASYNC | Feature.THREAD_ID, nonblock=True)
page = memory.map_memory(P)
uffd.register(page, P, RegisterMode.MISSING)
buffer = bytearray(4)
thread = threading.Thread(target=memory.memmove, args=(memory.address_of(buffer), page, 4))
thread.start()
import select; poll = select.poll(); poll.register(uffd, 1); poll.poll()
(event,) = uffd.read()
assert event.thread_id == thread.native_id
source = b"ok! " * P
uffd.copy(page, memory.address_of(source), P)
thread.join()
print(bytes(buffer))
print(json.dumps(probe().as_dict()))
"""
    )

    assert result.stdout.splitlines()[:2] == ["syscall True", "b'ok! '"], result.stderr
    facts = json.loads(result.stdout.splitlines()[-1])
    assert (facts["privileged"], facts["user_mode_only"], facts["event_fork"]) == (False, True, False)
    assert facts["pagemap_scan"] is True


@needs_root
def test_privilege_is_named_when_a_privileged_descriptor_is_demanded(run_child: RunChild) -> None:
    result = run_child(
        _DROP
        + """
drop()
attempt(user_mode_only=False)
attempt(via="device")
attempt(features=Feature.EVENT_FORK)
print(json.dumps(probe().as_dict()))
"""
    )

    full, device, fork = result.stdout.splitlines()[:3]
    assert "userfaultfd for faults inside system calls is not available on Linux" in full
    assert "the system call: EPERM, refused by privilege; /dev/userfaultfd: EACCES, refused by file mode" in full
    assert "CAP_SYS_PTRACE" in full
    assert "vm.unprivileged_userfaultfd" in full
    assert "/dev/userfaultfd: EACCES, refused by file mode" in device
    assert "chmod" in device
    assert fork.startswith("userfaultfd feature EVENT_FORK")
    assert "CAP_SYS_PTRACE" in fork
    by_syscall, by_device = _gates(result.stdout)
    assert (by_syscall["ok"], by_syscall["gate"]) == (False, "privilege")
    assert (by_device["ok"], by_device["gate"]) == (False, "file mode")


@needs_root
@pytest.mark.parametrize("errno", ["EPERM", "ENOSYS"])
def test_a_seccomp_filter_is_told_from_privilege_and_the_device_passes_it(run_child: RunChild, errno: str) -> None:
    result = run_child(
        _DROP
        + f"""
forbid(errno.{errno})
attempt()
attempt(via="syscall")
print(json.dumps(probe().as_dict()))
"""
    )

    default, syscall = result.stdout.splitlines()[:2]
    assert default == "device False", result.stderr
    assert f"the system call: {errno}, refused by seccomp" in syscall
    assert "--device /dev/userfaultfd" in syscall
    by_syscall, by_device = _gates(result.stdout)
    assert (by_syscall["gate"], by_device["ok"]) == ("seccomp", True)


@needs_root
@pytest.mark.parametrize("errno", ["EPERM", "ENOSYS"])
def test_a_seccomp_filter_and_the_file_mode_together_close_every_way(run_child: RunChild, errno: str) -> None:
    result = run_child(
        _DROP
        + f"""
drop()
forbid(errno.{errno})
attempt()
print(json.dumps(probe().as_dict()))
"""
    )

    refusal = result.stdout.splitlines()[0]
    assert refusal.startswith("userfaultfd is not available on Linux"), result.stderr
    assert f"the system call: {errno}, refused by seccomp; /dev/userfaultfd: EACCES" in refusal
    facts = json.loads(result.stdout.splitlines()[-1])
    assert (facts["privileged"], facts["user_mode_only"], facts["features"]) == (False, False, [])
    assert facts["anonymous_ioctls"] == facts["memfd_ioctls"] == []


@needs_root
def test_a_user_with_permission_on_the_device_is_served_fully(run_child: RunChild) -> None:
    # A second node for the same device stands in for an administrator's chmod.
    result = run_child(
        _DROP
        + """
node = f"/tmp/userfaultfd-{os.getpid()}"
os.mknod(node, 0o020600, os.stat(abi.USERFAULTFD_DEVICE).st_rdev)
try:
    os.chmod(node, 0o666)
    pid = os.fork()
    if not pid:
        abi.USERFAULTFD_DEVICE = node
        drop()
        attempt()
        attempt(via="device", user_mode_only=False)
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(pid, 0)
finally:
    os.unlink(node)
"""
    )

    assert result.stdout.splitlines() == ["device False", "device False"], result.stderr


@needs_root
def test_a_device_that_is_not_there_is_absent(run_child: RunChild) -> None:
    result = run_child(
        """
abi.USERFAULTFD_DEVICE = "/dev/userfaultfd-that-is-not-there"
print(gates.device_gate())
"""
    )

    assert result.stdout == "ENOENT: it is absent\n"


# -- capabilities --------------------------------------------------------------------------------------------


def test_probing_leaves_nothing_behind() -> None:
    probe()
    before = os.listdir("/proc/self/fd"), _mappings()

    probe()

    assert before == (os.listdir("/proc/self/fd"), _mappings())


def _mappings() -> int:
    with open("/proc/self/maps", encoding="ascii") as maps:
        return len(maps.readlines())


@needs_root
def test_everything_is_offered_to_root_on_a_recent_kernel() -> None:
    found = probe()

    assert found.kernel == os.uname().release
    assert found.page_size == memory.PAGE_SIZE
    assert found.syscall == found.device == Gate(ok=True)
    assert str(found.syscall) == "open"
    assert found.missing_faults
    assert found.usable
    assert Ioctl.COPY in found.anonymous_ioctls & found.memfd_ioctls
    assert found.event_fork == found.has(Feature.EVENT_FORK)
    assert found.minor_faults == found.has(Feature.MINOR_SHMEM)
    assert found.write_protect == found.has(Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM)
    assert found.dirty_tracking == (found.has(Feature.WP_ASYNC) and found.pagemap_scan)
    assert (found.poison, found.move) == (found.has(Feature.POISON), found.has(Feature.MOVE))


def test_missing_features_are_named_and_unknown_ones_kept() -> None:
    found = probe()

    assert found.missing(found.features) == 0
    assert found.missing(found.features | 1 << 50) == 1 << 50
    with pytest.raises(UnsupportedError, match="0x4000000000000"):
        found.require(1 << 50)
    found.require(found.features)


def test_the_cached_answer_is_the_same_object() -> None:
    assert capabilities.capabilities() is capabilities.capabilities()
    assert isinstance(capabilities.capabilities(), Capabilities)


def test_facts_can_be_written_as_json() -> None:
    plain = json.loads(json.dumps(probe().as_dict()))

    assert plain["page_size"] == memory.PAGE_SIZE
    assert set(plain["features"]) >= {str(feature.name) for feature in probe().features}


def test_an_open_gate_explains_nothing() -> None:
    assert gates.syscall_gate(user_mode_only=True).remedy == ""
