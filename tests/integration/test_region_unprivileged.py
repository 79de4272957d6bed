"""Regions without privilege: they work, but for faults inside system calls; where every gate is closed, one is told.

The children run as nobody. They keep the right to read files (CAP_DAC_READ_SEARCH), so that the interpreter can be
read wherever it is; it opens no gate to userfaultfd.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SYSCTL = Path("/proc/sys/vm/unprivileged_userfaultfd")
TIMEOUT_S = 30
DROP = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
READ = ["--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"]
PRELUDE = f"""
import faulthandler, os, sys
faulthandler.dump_traceback_later({TIMEOUT_S}, exit=True)
import userfault
from userfault import FileStore, MemoryStore, Region, StoreError, UnsupportedError
from userfault.testing import PatternStore, FailingStore, SlowStore
SIZE = 500_000
STORE = PatternStore(SIZE, concurrency=0)
"""
# A seccomp filter that refuses userfaultfd(2) with EPERM, as container runtimes do.
FORBID = """
import ctypes, struct
from userfault.kernel import abi
def forbid():
    class Program(ctypes.Structure):
        _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_char_p)]
    # load the number; if it is not ours, skip one; refuse; allow
    steps = (0x20, 0, 0, 0), (0x15, 0, 1, abi.NR_userfaultfd), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)
    program = Program(len(steps), b"".join(struct.pack("=HBBI", *step) for step in steps))
    libc = ctypes.CDLL(None)
    assert not libc.prctl(38, 1, 0, 0, 0) and not libc.prctl(22, 2, ctypes.byref(program))
forbid()
"""

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="gives up rights on purpose: run the tests as root"),
    pytest.mark.skipif(not shutil.which("setpriv"), reason="needs setpriv (util-linux)"),
]
gates_closed = pytest.mark.skipif(
    not SYSCTL.exists() or SYSCTL.read_text().strip() != "0",
    reason="vm.unprivileged_userfaultfd gives everybody a privileged descriptor",
)


def run(source: str, *, prefix: tuple[str, ...] = (*DROP, *READ)) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, sys.executable, "-c", PRELUDE + source],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S + 10,
        check=False,
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONDONTWRITEBYTECODE": "1"},
    )


def succeeds(source: str) -> str:
    result = run(source)
    assert result.returncode == 0, result.stderr
    return result.stdout


@gates_closed
def test_regions_work_in_both_modes() -> None:
    succeeds("""
assert os.getuid() == 65534
import numpy as np
assert userfault.default_pager().user_mode_only
for store in (STORE, PatternStore(SIZE), MemoryStore(STORE.expected(0, SIZE))):
    for mode in "rc":
        with Region(store, mode, 4096, budget="64KiB") as region, region.memory as memory:
            assert bytes(memory) == STORE.expected(0, SIZE)
            if mode == "c":
                memory[100_000] ^= 1
            region.evict()
            assert memory[100_000] == STORE.expected(100_000, 1)[0] ^ (mode == "c")
            assert region.stats().evictions > 100
a = userfault.open_array(STORE, "c", dtype="i4")
assert (a == np.frombuffer(STORE.expected(0, SIZE), "i4")).all()
a += 1
del a
os.kill(userfault.default_pager().worker_pid, 9)
with Region(STORE) as region:
    assert region.memory[7] == STORE.expected(7, 1)[0]
""")


@gates_closed
def test_system_calls_see_efault_unless_the_range_is_there() -> None:
    succeeds("""
import errno
region = Region(STORE, "c")
memory = region.memory
r, w = os.pipe()
def fails(call):
    try:
        call()
    except OSError as error:
        assert error.errno == errno.EFAULT, error
    else:
        raise SystemExit("no error")
fails(lambda: os.write(w, memory[:1000]))
region.ensure(0, 1000)
assert os.write(w, memory[:1000]) == 1000
assert os.read(r, 1000) == STORE.expected(0, 1000)
os.write(w, b"hello")
fails(lambda: os.readv(r, [memory[2000:2005]]))  # present, and write-protected
region.ensure(2000, 5, write=True)
assert os.readv(r, [memory[2000:2005]]) == 5
assert memory[1999:2006] == STORE.expected(1999, 1) + b"hello" + STORE.expected(2005, 1)
with region.pinned(300_000, 4000, write=True) as view:
    os.write(w, b"pinned")
    region.evict()
    assert os.readv(r, [view[:6]]) == 6
    assert view[:6] == b"pinned"
    view.release()
memory.release()
region.close()
""")


@gates_closed
def test_a_failing_store_is_an_exception_there_too() -> None:
    succeeds("""
with Region(FailingStore(SIZE, fail_offsets=[5])) as region:
    try:
        region.ensure()
        raise SystemExit("no error")
    except StoreError as error:
        assert "on fire" in str(error)
    assert region.memory[200_000] == STORE.expected(200_000, 1)[0]
""")


@gates_closed
def test_rights_that_are_given_up_later(tmp_path: Path) -> None:
    """A daemon that opens its regions as root and goes on as nobody keeps them, system calls and all."""
    result = run(
        """
region = Region(STORE)
region.memory[0]
os.setgroups([]); os.setgid(65534); os.setuid(65534)
r, w = os.pipe()
assert os.write(w, region.memory[100_000:101_000]) == 1000
assert os.read(r, 1000) == STORE.expected(100_000, 1000)
os.kill(region.pager.worker_pid, 0) if False else None
assert region.memory[300_000] == STORE.expected(300_000, 1)[0]
other = Region(STORE, "c")
assert other.memory[300_000] == STORE.expected(300_000, 1)[0]
other.close()
assert region.stats().faults >= 3
region.close()
userfault.default_pager().close()
""",
        prefix=(),
    )
    assert result.returncode == 0, result.stderr


def test_a_seccomp_filter_is_passed_by_the_device() -> None:
    if not os.path.exists("/dev/userfaultfd"):
        pytest.skip("no /dev/userfaultfd")
    result = run(FORBID + "with Region(STORE) as r: assert r.memory[5] == STORE.expected(5, 1)[0]", prefix=())
    assert result.returncode == 0, result.stderr


def test_where_every_gate_is_closed_one_is_told_which_and_nothing_is_left() -> None:
    result = run(
        FORBID
        + """
import gc
from userfault.testing import no_leaks
userfault.stores, userfault.kernel.process
for _ in range(2):
    with no_leaks() if _ else open(os.devnull):
        for opening in (userfault.Pager, userfault.default_pager, lambda: Region(STORE)):
            try:
                opening()
            except UnsupportedError as error:
                text = str(error)
            else:
                raise SystemExit("no error")
            gc.collect()
print(text)
"""
    )
    assert result.returncode == 0, result.stderr
    assert "seccomp" in result.stdout
    assert "/dev/userfaultfd" in result.stdout
    assert f"is not available on Linux {os.uname().release}" in result.stdout


@pytest.mark.parametrize("limit", [3, 6, 8, 10, 12, 16])
def test_too_few_descriptors_are_an_error_that_leaves_nothing(limit: int) -> None:
    result = run(
        f"""
import mmap, resource, select, socket, threading
import userfault.kernel.gates, userfault.pager.client, userfault.region
kept = sorted(os.listdir("/proc/self/fd"))
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, hard))
try:
    with Region(STORE) as region:
        assert region.memory[5] == STORE.expected(5, 1)[0]
    print("it works")
    region.pager.close()
except (OSError, userfault.Error) as error:
    print(type(error).__name__, error)
    if "region" not in globals() and (pager := userfault.pager.client._default):
        pager.close()
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
assert sorted(os.listdir("/proc/self/fd")) == kept
""",
        prefix=(),
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "it works\n" or "Too many open files" in result.stdout, result.stdout
