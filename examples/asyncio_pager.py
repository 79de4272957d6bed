"""A pager in Python with asyncio, in another process: pages that are slow to come are waited for side by side.

Here each page takes a tenth of a second, as if from far away, and eight threads want sixteen pages: two tenths of a
second, not sixteen. They touch with the GIL released; with the GIL held all would be right too, but one at a time.

    python asyncio_pager.py
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import userfault
from userfault.kernel import PAGE_SIZE, memfd
from userfault.protocol import MADV_NOUSERFAULT, MADV_USERFAULT, UFFD_CLOEXEC, USERFAULTFD_PROTOCOL, Version, Wake
from userfault.testing import touch

PAGES, THREADS, AWAY_S = 16, 8, 0.1


async def be_the_pager(fd: int, pages: mmap.mmap, address: int) -> None:
    """Shake hands, then begin an answer to each fault while others wait, until the memory is closed."""
    fills: dict[int, asyncio.Task[None]] = {}
    answers: set[asyncio.Task[None]] = set()
    news = asyncio.Event()

    async def fill(number: int) -> None:
        await asyncio.sleep(AWAY_S)
        pages[number * PAGE_SIZE : (number + 1) * PAGE_SIZE] = bytes([number]) * PAGE_SIZE

    async def answer(number: int) -> None:
        if number not in fills:  # two threads in one page are two faults: fill it once, never again, and answer both
            fills[number] = asyncio.create_task(fill(number))
        await fills[number]
        start = address + number * PAGE_SIZE
        os.write(fd, Wake(start, start + PAGE_SIZE).encode())

    os.write(fd, hello := Version(USERFAULTFD_PROTOCOL).encode())
    assert os.read(fd, 8) == hello  # all ones: not known there
    os.set_blocking(fd, False)
    asyncio.get_running_loop().add_reader(fd, news.set)
    with contextlib.suppress(ConnectionResetError):  # the end is this, or nothing to read
        while await news.wait():
            news.clear()
            with contextlib.suppress(BlockingIOError):  # it was taken back, and will be told again
                if not (data := os.read(fd, 8)):
                    break
                offset = int.from_bytes(data, sys.byteorder) - address
                if 0 <= offset < len(pages):
                    answers.add(task := asyncio.create_task(answer(offset // PAGE_SIZE)))
                    task.add_done_callback(answers.discard)
    print(f"{len(fills)} pages filled by process {os.getpid()}")


def main() -> None:
    """Make memory, start the pager, and read with several threads."""
    fd = memfd.create("pages", PAGES * PAGE_SIZE)
    pages = mmap.mmap(fd, PAGES * PAGE_SIZE)
    os.close(fd)
    descriptor = userfault.userfaultfd(UFFD_CLOEXEC)
    userfault.madvise(pages, MADV_USERFAULT)
    descriptor.register(pages)
    exported = descriptor.export()
    fds = (exported.fileno(), exported.memory_fd)
    command = [sys.executable, __file__, *map(str, fds), str(exported.address)]
    with (
        subprocess.Popen(command, pass_fds=fds, start_new_session=True),
        exported,
        ThreadPoolExecutor(THREADS) as threads,
    ):
        touch(exported.address)  # the pager has started when this returns
        began = time.perf_counter()
        addresses = range(exported.address, exported.address + exported.size, PAGE_SIZE)
        numbers = [first[0] for first in threads.map(touch, addresses)]
        print(f"read {numbers} in {time.perf_counter() - began:.1f} s", flush=True)
    userfault.madvise(pages, MADV_NOUSERFAULT)
    pages.close()


if __name__ == "__main__":
    if sys.argv[1:]:
        fd, memory_fd, address = map(int, sys.argv[1:])
        asyncio.run(be_the_pager(fd, mmap.mmap(memory_fd, 0), address))
    else:
        main()
