"""The shipped stores against the conformance kit."""

from __future__ import annotations

import os
import random
from pathlib import Path

from userfault.stores import FileStore, MemoryStore, Store
from userfault.testing import CountingStore, PatternStore, SlowStore, StoreTests


class TestMemoryStore(StoreTests):
    def make_store(self, data: bytes, tmp_path: Path) -> Store:
        return MemoryStore(data)


class TestFileStore(StoreTests):
    def make_store(self, data: bytes, tmp_path: Path) -> Store:
        (tmp_path / "data").write_bytes(data)
        return FileStore(tmp_path / "data")

    def lose_backing(self, store: Store, tmp_path: Path) -> None:
        (tmp_path / "data").unlink()

    def change_backing(self, store: Store, tmp_path: Path) -> None:
        os.utime(tmp_path / "data", ns=(0, 12345))


class TestWritableFileStore(StoreTests):
    def make_store(self, data: bytes, tmp_path: Path) -> Store:
        (tmp_path / "data").write_bytes(data)
        return FileStore(tmp_path / "data", writable=True)

    def lose_backing(self, store: Store, tmp_path: Path) -> None:
        (tmp_path / "data").unlink()

    def change_backing(self, store: Store, tmp_path: Path) -> None:
        os.truncate(tmp_path / "data", 10)  # the time changes by our own hand


class TestPartOfFile(StoreTests):
    """An odd piece from the middle, longer than what is examined at a time."""

    data = random.Random(3).randbytes((2 << 20) + 70001)

    def make_store(self, data: bytes, tmp_path: Path) -> Store:
        (tmp_path / "data").write_bytes(b"before" + data + b"after")
        return FileStore(tmp_path / "data", 6, len(data))

    def lose_backing(self, store: Store, tmp_path: Path) -> None:
        os.truncate(tmp_path / "data", 100)


class TestOneByteOfFile(TestPartOfFile):
    """The least store there is."""

    data = b"x"

    def change_backing(self, store: Store, tmp_path: Path) -> None:
        (tmp_path / "data").write_bytes(b"other bytes")


class TestPatternStore(StoreTests):
    def make_store(self, data: bytes, tmp_path: Path) -> Store:
        return PatternStore(1 << 45, seed=5)

    def reference_bytes(self, store: Store, offset: int, length: int) -> bytes:
        """The bytes by the definition, one page after the other."""
        page = PatternStore(1 << 45, seed=5)
        end = min(offset + length, store.size)
        pages = b"".join(page.expected(start, 4096) for start in range(offset // 4096 * 4096, end, 4096))
        return pages[offset % 4096 :][: end - offset]


class TestCountingStore(StoreTests):
    def make_store(self, data: bytes, tmp_path: Path) -> Store:
        return CountingStore(MemoryStore(data), tmp_path / "log")


class TestSlowStore(StoreTests):
    def make_store(self, data: bytes, tmp_path: Path) -> Store:
        return SlowStore(MemoryStore(data), 0.001)
