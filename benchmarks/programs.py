"""The C side of the benchmarks: built by the compiler that is there, and called from here.

Each call is one measurement of one repetition. It returns nanoseconds, after the sum of the touched bytes was
compared with the file's: a pager that brings in wrong bytes has no speed.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np

_SOURCES = Path(__file__).parent / "reference"
_COMPILE = ["cc", "-O2", "-Wall", "-Wextra", "-Werror"]
_TIMEOUT_S = 300

Order = np.ndarray[tuple[int], np.dtype[np.uint64]]


class ReferencePrograms:
    """The reference pager, the bulk copy and the touching loop, compiled into a folder.

    Raises:
        RuntimeError: there is no C compiler, or it refuses the sources; the message is the compiler's own.
    """

    def __init__(self, folder: Path, source: Path) -> None:
        self._source = source
        self._pager = compile_program(folder / "pager", "pager.c", "touch.c", "-pthread")
        self._bulk = compile_program(folder / "bulk", "bulk.c", "touch.c")
        self._touch = ctypes.CDLL(str(compile_program(folder / "touch.so", "touch.c", "-shared", "-fPIC")))
        self._touch.page_order.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int]
        self._touch.page_order.restype = None
        self._touch.touch_pages.argtypes = [
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_uint64,
            ctypes.c_void_p,
        ]
        self._touch.touch_pages.restype = ctypes.c_uint64

    def order(self, size: int, page: int, *, shuffled: bool) -> Order:
        """The offsets of the pages of `size` bytes in the order in which every toucher visits them."""
        order = np.empty(size // page, np.uint64)
        self._touch.page_order(order.ctypes.data, len(order), page, shuffled)
        return order

    def touch(self, address: int, order: Order) -> tuple[int, int]:
        """Read one byte at each offset from an address of this process, without the GIL: nanoseconds, sum."""
        total = ctypes.c_uint64()
        elapsed = self._touch.touch_pages(address, order.ctypes.data, len(order), ctypes.byref(total))
        return int(elapsed), total.value

    def pager(self, size: int, block: int, kind: str, cpus: tuple[int, int], order: str) -> tuple[int, int]:
        """Touch `size` bytes that the reference pager serves, CPU -1 meaning unpinned: nanoseconds, sum."""
        return self._run(self._pager, size, block, kind, *cpus, order)

    def bulk(self, size: int, call: int, cpu: int) -> tuple[int, int]:
        """Install `size` bytes with no faults, `call` bytes at a time: nanoseconds, sum."""
        return self._run(self._bulk, size, call, cpu)

    def _run(self, program: Path, *arguments: int | str) -> tuple[int, int]:
        command = [str(program), str(self._source), *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)}: {result.stderr.strip()}")
        elapsed, total = result.stdout.split()
        return int(elapsed), int(total)


def compile_program(target: Path, *arguments: str) -> Path:
    """Compile sources of ``reference``, or with a path of their own, into `target`.

    Raises:
        RuntimeError: there is no C compiler, or it refuses the sources; the message is the compiler's own.
    """
    sources = [str(_SOURCES / word) if word.endswith(".c") else word for word in arguments]
    try:
        result = subprocess.run([*_COMPILE, *sources, "-o", str(target)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise RuntimeError("no C compiler: install one that answers to 'cc'") from None
    if result.returncode:
        raise RuntimeError(f"cc refuses {arguments[0]}:\n{result.stderr}")
    return target
