"""A checkpoint that copies only the pages that have changed since the last one.

The memory is write-protected asynchronously (WP_ASYNC, Linux 6.7): the first write to a page lifts its protection and
is remembered by the kernel, and nobody is stopped. One scan finds these pages and protects them anew in the same step,
so that no write falls between the two.

    python changed_pages.py
"""

from __future__ import annotations

import mmap
import random

import userfault
from userfault.kernel import PAGE_SIZE, Feature, Pagemap, RegisterMode, Userfaultfd, WriteProtectMode, memory

PAGES = 4096


def main() -> None:
    """Change some pages, three times, and copy just these."""
    userfault.capabilities().require(Feature.WP_ASYNC)
    data = mmap.mmap(-1, PAGES * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    data[:] = random.randbytes(len(data))
    copy = bytearray(data)
    address = memory.address_of(data)
    with Userfaultfd.open(Feature.WP_ASYNC | Feature.PAGEFAULT_FLAG_WP) as uffd, Pagemap() as pagemap:
        uffd.register(address, len(data), RegisterMode.WP)
        uffd.write_protect(address, len(data), WriteProtectMode.WP)
        for _ in range(3):
            for page in random.sample(range(PAGES), 100):
                data[page * PAGE_SIZE + 5] ^= 0xFF
            copied = 0
            for start, end in pagemap.written(address, len(data), protect=True):
                copy[start - address : end - address] = data[start - address : end - address]
                copied += end - start
            print(f"{copied // PAGE_SIZE} of {PAGES} pages copied, equal: {copy == data[:]}")


if __name__ == "__main__":
    main()
