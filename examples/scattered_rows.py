"""Read some rows of a .npy file that is larger than what is read of it.

    python scattered_rows.py [FILE.npy]

Without a file, one of 80 MB is made for the occasion.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import userfault


def report(path: Path) -> None:
    """Open the file, read a hundred rows, and say what that took."""
    started = time.perf_counter()
    with userfault.open_array(path, budget="64MiB") as array:
        print(f"{array.shape} {array.dtype}, opened in {(time.perf_counter() - started) * 1e3:.1f} ms")
        rows = np.random.default_rng(0).integers(0, len(array), 100)
        started = time.perf_counter()
        total = sum(float(array[row].sum()) for row in rows)
        print(f"{len(rows)} rows read in {(time.perf_counter() - started) * 1e3:.1f} ms, their sum is {total:.6g}")
        stats = array.region.stats()
        print(f"{stats.faults} faults brought {stats.bytes_read} of {array.nbytes} bytes in")


def main() -> None:
    """Use the file on the command line, or make one."""
    if len(sys.argv) > 1:
        report(Path(sys.argv[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.npy"
        np.save(path, np.arange(10_000_000.0).reshape(10_000, 1000))
        report(path)


if __name__ == "__main__":
    main()
