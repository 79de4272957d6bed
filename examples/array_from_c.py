"""An array whose pager is a C program: c_pager.c beside this file, which knows the protocol of 2014 and nothing else.

The array is read as any other, holding the GIL: the pager is another process and needs none. What it gets are two
descriptors and two numbers. It wants a C compiler that answers to `cc`.

    python array_from_c.py
"""

from __future__ import annotations

import mmap
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np

import userfault
from userfault.kernel import PAGE_SIZE, memfd
from userfault.protocol import MADV_NOUSERFAULT, MADV_USERFAULT, UFFD_CLOEXEC

SIZE = 40_000_000


def compile_pager(folder: Path) -> Path:
    """Compile c_pager.c into a folder."""
    program = folder / "c_pager"
    source = Path(__file__).with_name("c_pager.c")
    subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-Werror", str(source), "-o", str(program)], check=True)
    return program


def start_pager(program: Path, exported: userfault.Exported, file: Path) -> subprocess.Popen[str]:
    """Start the pager, with the two descriptors that it needs."""
    fds = (exported.fileno(), exported.memory_fd)
    arguments = [program, *fds, exported.address, exported.size, file]
    return subprocess.Popen(
        [*map(str, arguments)], pass_fds=fds, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def read_all(memory: mmap.mmap, file: Path) -> int:
    """Read the memory as an array, and count the bytes that are the file's."""
    array = np.frombuffer(memory, np.uint8, SIZE)  # the array's buffer is the memory itself
    expected = np.fromfile(file, np.uint8)
    rows = np.random.default_rng(1).integers(0, SIZE, 1000)
    assert all(array[row] == expected[row] for row in rows)  # here and there: each a fault, the GIL held
    return int(np.count_nonzero(array == expected))  # and then all of it


def main() -> None:
    """Make a file, memory for it, a descriptor; start the pager; read."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bytes.bin"
        file.write_bytes(np.random.default_rng(0).bytes(SIZE))
        program = compile_pager(Path(folder))

        length = -(-SIZE // PAGE_SIZE) * PAGE_SIZE  # whole pages; behind the end of the file there are zeros
        fd = memfd.create("array", length)
        memory = mmap.mmap(fd, length)
        os.close(fd)

        descriptor = userfault.userfaultfd(UFFD_CLOEXEC)
        userfault.madvise(memory, MADV_USERFAULT)
        descriptor.register(memory)
        exported = descriptor.export()
        with start_pager(program, exported, file) as pager:
            with exported:  # when it closes, the pager reads the end of the file, and ends
                equal = read_all(memory, file)
            said, _ = pager.communicate()
        print(f"{equal} of {SIZE} bytes equal, {said.strip()} by process {pager.pid} ({program.name})")
        userfault.madvise(memory, MADV_NOUSERFAULT)
        memory.close()


if __name__ == "__main__":
    main()
