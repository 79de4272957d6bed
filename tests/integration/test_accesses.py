"""Every way into a cold region, each in a process of its own: the right bytes, and no hang.

Nearly all of these hold the GIL while they are stopped in the fault, and some are stopped inside a system call.
Each runs over a file, whose blocks the fault loop answers itself, and over a slow store, whose reader threads do.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from userfault.testing import run_child

PRELUDE = """
import copy, ctypes, hashlib, io, os, pickle, socket, struct, sys, tempfile, threading
import numpy as np, userfault
from userfault import FileStore
from userfault.testing import SlowStore
path, = args
b = np.load(path)
raw = open(path, "rb").read()
off = len(raw) - b.nbytes

def sent(send):
    '''What another thread receives while `send` sends.'''
    left, right = socket.socketpair()
    got = bytearray()
    def receive():
        while part := right.recv(1 << 16):
            got.extend(part)
    thread = threading.Thread(target=receive)
    thread.start()
    send(left)
    left.close()
    thread.join()
    right.close()
    return bytes(got)

def write_all(sock, data):
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(sock.fileno(), view):]

def send_all(sock, data):
    view = memoryview(data).cast("B")
    while view:
        view = view[sock.send(view):]

def cold(mode="r"):
    a = userfault.open_array(make(), mode)
    assert not any(a.region.residency())
    return a

for make in (lambda: path, lambda: SlowStore(FileStore(path), 0.001)):
"""

READS: dict[str, str | list[str]] = {
    "item": "assert a[0, 0] == b[0, 0] and a[-1, -1] == b[-1, -1] and a.item(7, 7) == b[7, 7]",
    "sum": "assert a.sum() == b.sum()",
    "fancy": "i = np.random.default_rng(5).integers(0, 300, 500); assert (a[i, i[::-1]] == b[i, i[::-1]]).all()",
    "masks": [
        "m = b % 7 == 0; assert (a[m] == b[m]).all()",
        "assert (a[a > 89_000] == b[b > 89_000]).all()",
        "assert (np.where(a > 500, a, 0) == np.where(b > 500, b, 0)).all()",
        "assert (a.take([1, 5, 89_999]) == b.take([1, 5, 89_999])).all()",
    ],
    "tobytes": ["assert a.tobytes() == b.tobytes()", "assert a.tobytes('F') == b.tobytes('F')"],
    "repr": [
        "assert repr(a).split() == repr(b).replace('array', 'PagedArray').split()",
        "assert str(a) == str(b)",
        "assert a.tolist() == b.tolist()",
    ],
    "iteration": [
        "assert all((x == y).all() for x, y in zip(a, b, strict=True))",
        "assert sum(float(x) for x in a.flat) == sum(float(x) for x in b.flat)",
    ],
    "views": [
        "assert (a.T == b.T).all() and np.array_equal(np.ascontiguousarray(a.T), b.T)",
        "assert (a.view('u1') == b.view('u1')).all()",
        "assert (a.view('>f8') == b.view('>f8')).all()",
        "assert (a[::7, ::-3] == b[::7, ::-3]).all()",
        "assert (a.reshape(-1)[::-1] == b.reshape(-1)[::-1]).all()",
        "x = np.asarray(a); assert type(x) is np.ndarray and np.shares_memory(x, a) and (x == b).all()",
    ],
    "ufuncs": [
        "assert (np.sin(a) == np.sin(b)).all()",
        "assert (a + a.T == b + b.T).all() and (a @ b == b @ b).all()",
        "out = np.empty_like(b); assert np.multiply(a, 2, out=out) is out and (out == b * 2).all()",
        "assert (a.max(), a.argmin(), a.std()) == (b.max(), b.argmin(), b.std()) and (a.mean(0) == b.mean(0)).all()",
        "assert (np.sort(a, axis=None) == np.sort(b, axis=None)).all()",
        "assert np.median(a) == np.median(b)",
        "assert (np.concatenate([a, a]) == np.concatenate([b, b])).all()",
    ],
    "copies": [
        "x = copy.copy(a); assert np.array_equal(x, b) and not np.shares_memory(x, a)",
        "x = copy.deepcopy(a); assert np.array_equal(x, b) and not np.shares_memory(x, a)",
        "x = a.copy(); assert np.array_equal(x, b) and not np.shares_memory(x, a)",
        "x = np.array(a); assert np.array_equal(x, b) and not np.shares_memory(x, a)",
        "assert (a.astype('f4') == b.astype('f4')).all()",
    ],
    "np.save": "f = io.BytesIO(); np.save(f, a); assert f.getvalue() == raw",
    "np.save to a file": [
        "f = tempfile.TemporaryFile(); np.save(f, a); f.seek(0); assert f.read() == raw",
        "f = tempfile.TemporaryFile(); a.tofile(f); f.seek(0); assert f.read() == raw[off:]",
    ],
    "memoryview": "assert memoryview(a)[0, 0] == b[0, 0] and memoryview(a)[-1, -1] == b[-1, -1]",
    "bytes": [
        "assert bytes(memoryview(a)) == raw[off:]",
        "assert bytes(a) == raw[off:]",
        "assert bytearray(a.data) == raw[off:]",
        "assert memoryview(a).cast('B') == raw[off:]",
        "assert raw == a.region.memory",
        "assert b''.join([a.region.memory, b'x']) == raw + b'x'",
        "import re; assert [m.start() for m in re.finditer(rb'NUMPY', a.region.memory)] == [1]",
        "assert int.from_bytes(a.region.memory[:9000], 'little') == int.from_bytes(raw[:9000], 'little')",
    ],
    "unpack_from": "assert struct.unpack_from('3d', a, 80_000) == struct.unpack_from('3d', raw, off + 80_000)",
    "pickle 2": "x = pickle.loads(pickle.dumps(a, 2)); assert type(x) is np.ndarray and (x == b).all()",
    "pickle 5": "x = pickle.loads(pickle.dumps(a, 5)); assert type(x) is np.ndarray and (x == b).all()",
    "pickle out of band": """
    buffers = []
    data = pickle.dumps(a, 5, buffer_callback=buffers.append)
    assert len(data) < 1000 and len(buffers) == 1
    assert (pickle.loads(data, buffers=buffers) == b).all()""",
    "hashlib": [
        "assert hashlib.sha256(a).digest() == hashlib.sha256(b).digest()",
        "import zlib; assert zlib.crc32(a) == zlib.crc32(b)",
        "assert zlib.compress(a, 1) == zlib.compress(b, 1)",
    ],
    "os.write": "assert sent(lambda s: write_all(s, a)) == raw[off:]",
    "os.writev": [
        "f = tempfile.TemporaryFile(); os.writev(f.fileno(), [a, a]); f.seek(0); assert f.read() == raw[off:] * 2",
        "f = tempfile.TemporaryFile(); os.pwrite(f.fileno(), a, 5); f.seek(5); assert f.read() == raw[off:]",
        "f = tempfile.TemporaryFile(); f.write(a); f.seek(0); assert f.read() == raw[off:]",
    ],
    "socket.send": [
        "assert sent(lambda s: send_all(s, a)) == raw[off:]",
        "assert sent(lambda s: s.sendall(a)) == raw[off:]",
        "assert sent(lambda s: s.sendmsg([memoryview(a).cast('B')[:9000]])) == raw[off : off + 9000]",
    ],
    "ctypes": [
        "p = a.ctypes.data_as(ctypes.POINTER(ctypes.c_double)); assert p[500] == b.flat[500]; del p",
        "assert ctypes.string_at(a.ctypes.data, 90_000) == raw[off : off + 90_000]",
    ],
    "random threads": """
    from concurrent.futures import ThreadPoolExecutor
    def read(seed):
        random = np.random.default_rng(seed)
        for at in random.integers(0, 300, 60):
            assert a[at, -at] == b[at, -at] and (a[at] == b[at]).all()
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(read, range(16)))""",
    "with and without the GIL at once": """
    from userfault.testing import touch
    done = []
    def toucher():
        for at in range(off, len(raw) - 100, 10_007):
            done.append(touch(a.region.address + at, 100) == raw[at : at + 100])
    thread = threading.Thread(target=toucher)
    thread.start()
    assert a.sum() == b.sum()
    thread.join()
    assert all(done) and len(done) > 70""",
}
WRITES: dict[str, str | list[str]] = {
    "items": [
        "a[0, 0] = -1; b[0, 0] = -1",
        "a[0, 0] = a[0, 0] + 1; b[0, 0] += 1",
        "a[10:200, ::3] = 5; b[10:200, ::3] = 5",
        "a[a > 500] = 0; b[b > 500] = 0",
        "a.fill(3); b.fill(3)",
    ],
    "ufuncs": [
        "a += 1; b += 1",
        "assert np.sqrt(a, out=a) is a; np.sqrt(b, out=b)",
        "np.add.at(a, ([1, 1, 2], [3, 3, 4]), 1); np.add.at(b, ([1, 1, 2], [3, 3, 4]), 1)",
        "np.copyto(a, b[::-1]); b[:] = b[::-1].copy()",
    ],
    "sort": [
        "a[::-1].sort(axis=0); b[::-1].sort(axis=0)",
        "a[:] = np.sort(a[::-1], axis=1)[:, ::-1]; b[:] = np.sort(b[::-1], axis=1)[:, ::-1]",
        "a.partition(5, axis=0); b.partition(5, axis=0)",
        "np.random.default_rng(1).shuffle(a); np.random.default_rng(1).shuffle(b)",
    ],
    "buffers": [
        "memoryview(a).cast('B')[5:10_000] = b'x' * 9_995; memoryview(b).cast('B')[5:10_000] = b'x' * 9_995",
        "struct.pack_into('3d', a, 9_000, 1, 2, 3); struct.pack_into('3d', b, 9_000, 1, 2, 3)",
        "ctypes.memmove(a.ctypes.data + 9, raw, 70_000); ctypes.memmove(b.ctypes.data + 9, raw, 70_000)",
        "ctypes.memset(a.ctypes.data, 7, a.nbytes); ctypes.memset(b.ctypes.data, 7, b.nbytes)",
    ],
    "os.preadv": """
    with open(path, "rb") as f:
        for x in (a, b):
            parts = [memoryview(x).cast("B")[100_000:200_000], memoryview(x).cast("B")[:50]]
            assert os.preadv(f.fileno(), parts, 7) == 100_050
            del parts""",
    "readinto": """
    for x in (a, b):
        with open(path, "rb", buffering=0) as f:
            assert f.readinto(memoryview(x).cast("B")[3:]) == x.nbytes - 3
        with open(path, "rb") as f:
            assert f.readinto(memoryview(x).cast("B")[:5_000]) == 5_000""",
    "recv_into": """
    for x in (a, b):
        left, right = socket.socketpair()
        view, data = memoryview(x).cast("B")[4_000:400_000], raw[:396_000]
        thread = threading.Thread(target=left.sendall, args=(data,))
        thread.start()
        while view:
            view = view[right.recv_into(view):]
        thread.join(); left.close(); right.close()
        del view""",
    "pickle out of band": """
    buffers = []
    data = pickle.dumps(a, 5, buffer_callback=buffers.append)
    x = pickle.loads(data, buffers=buffers)
    x[3] = 9; b[3] = 9
    assert np.shares_memory(x, a)
    del x, buffers""",
    "threads": """
    from concurrent.futures import ThreadPoolExecutor
    def work(row):
        a[row] = a[row] * 2 + row
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(work, range(300)))
    b[:] = b * 2 + np.arange(300.)[:, None]""",
}


def each(statements: str | list[str], before: str, after: str = "") -> str:
    """The body of the prelude's loop: each statement on a cold array of its own."""
    listed = [statements] if isinstance(statements, str) else statements
    return "\n".join(f"    {before}\n    {statement.strip()}\n    {after}\n" for statement in listed)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("accesses") / "x.npy"
    np.save(path, np.arange(90_000.0).reshape(300, 300))  # 11 blocks
    return path


@pytest.mark.parametrize("access", READS)
def test_reading(access: str, path: Path) -> None:
    run_child(PRELUDE + each(READS[access], "a = cold()"), str(path), timeout=40).check()


@pytest.mark.parametrize("access", WRITES)
def test_writing_in_mode_c(access: str, path: Path) -> None:
    """Changed like any array; the file stays as it is."""
    before = "b = np.load(path); a = cold('c')"
    same = "assert np.array_equal(a, b, equal_nan=True)"
    after = f"{same}; a.region.evict(); {same}; assert open(path, 'rb').read() == raw"
    run_child(PRELUDE + each(WRITES[access], before, after), str(path), timeout=40).check()


def test_mode_r_is_not_written(path: Path) -> None:
    run_child(
        PRELUDE
        + """
    a = cold()
    for write in (lambda: a.__setitem__(0, 1), lambda: a.sort(), lambda: np.add(a, 1, out=a), lambda: a.fill(1)):
        try:
            write()
        except ValueError as error:
            assert "read-only" in str(error)
        else:
            raise SystemExit("written")
    try:
        open(path, "rb").readinto(a)
        raise SystemExit("written")
    except TypeError:
        pass
    assert not a.flags.writeable and memoryview(a).readonly
    try:
        a.flags.writeable = True
        raise SystemExit("made writable")
    except ValueError:
        pass
    try:
        os.preadv(os.open(path, os.O_RDONLY), [ctypes.c_char.from_address(a.ctypes.data)], 0)
        raise SystemExit("written by the kernel")
    except OSError as error:
        assert error.errno == 14
    assert np.array_equal(a, b)
""",
        str(path),
    ).check()
