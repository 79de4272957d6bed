"""An array that is decompressed where it is touched, and whose damage is an exception instead of a signal.

The file is a table of where each piece begins, and then the pieces, compressed with zlib. A touch of a damaged piece
would end the process with SIGBUS, since a touch cannot raise; `ensure` brings the range in beforehand, and raises.

    python compressed_store.py
"""

from __future__ import annotations

import os
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np

import userfault
from userfault.stores import Store

PIECE = 1 << 18
_HEAD = struct.Struct("<QQ")  # bytes when decompressed, pieces


class CompressedStore(Store):
    """What `compress` wrote. zlib releases the GIL, so that several pieces are decompressed at once."""

    def __init__(self, path: str) -> None:
        self.path = path
        with open(path, "rb") as file:
            self.size, count = _HEAD.unpack(file.read(_HEAD.size))
            self.starts = struct.unpack(f"<{count + 1}Q", file.read(8 * (count + 1)))

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Decompress the pieces that are touched."""
        first, last = offset // PIECE, (offset + len(buffer) - 1) // PIECE
        with open(self.path, "rb") as file:
            data = b"".join(self._piece(file.fileno(), number) for number in range(first, last + 1))
        start = offset - first * PIECE
        buffer[:] = data[start : start + len(buffer)]

    def _piece(self, fd: int, number: int) -> bytes:
        start, end = self.starts[number : number + 2]
        return zlib.decompress(os.pread(fd, end - start, start))

    def describe(self) -> str:
        """Return a name for messages."""
        return f"CompressedStore({self.path!r})"


def compress(path: str, data: bytes) -> None:
    """Write data in pieces."""
    pieces = [zlib.compress(data[at : at + PIECE]) for at in range(0, len(data), PIECE)]
    starts = [_HEAD.size + 8 * (len(pieces) + 1)]
    for piece in pieces:
        starts.append(starts[-1] + len(piece))
    head = _HEAD.pack(len(data), len(pieces)) + struct.pack(f"<{len(starts)}Q", *starts)
    Path(path).write_bytes(head + b"".join(pieces))


def damage(path: str, number: int) -> None:
    """Overwrite the middle of a piece."""
    store = CompressedStore(path)
    with open(path, "r+b") as file:
        file.seek((store.starts[number] + store.starts[number + 1]) // 2)
        file.write(b"damage")


def main() -> None:
    """Compress an array, read some of it, and meet a damaged piece."""
    numbers = np.arange(500_000, dtype=np.int64)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "numbers.z")
        compress(path, numbers.tobytes())
        print(f"{numbers.nbytes} bytes in a file of {os.path.getsize(path)}")
        damage(path, 12)
        with userfault.open_array(CompressedStore(path), dtype=np.int64, block_size="256KiB") as array:
            print(array[1234], array[300_000:300_003])
            try:
                array.ensure(np.s_[350_000:450_000])
            except userfault.StoreError as error:
                print(f"{error.cause}; between byte {error.offset} and {error.offset + error.length}")


if __name__ == "__main__":
    # Under its own name, not as __main__: the pager imports the class from there.
    from compressed_store import main as run

    run()
