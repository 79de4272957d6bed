"""A pager of one's own, with the kernel package alone: another process that answers faults with pages it makes up.

It must be another process. A thread that touches memory from Python holds the GIL while it is stopped, so that a pager
thread beside it never runs. This process makes the userfaultfd, since that belongs to the memory of its creator, passes
a copy to the pager over a socket, and keeps its own open: if the last copy closes, missing pages become zeros. What is
not here is what happens if the pager dies: then threads wait for ever. (`userfault.Pager` has a supervisor for that.)

    python own_pager.py
"""

from __future__ import annotations

import socket
import subprocess
import sys

from userfault.kernel import PAGE_SIZE, PageFault, RegisterMode, Userfaultfd, memory

PAGES = 1000


def answer_faults(connection: socket.socket) -> None:
    """Be the pager: fill each page with the number of the page, until the other side is gone."""
    message, (fd,), _, _ = socket.recv_fds(connection, 8, 1)
    start = int.from_bytes(message, "little")
    uffd = Userfaultfd(fd)
    page = bytearray(PAGE_SIZE)
    while True:
        for event in uffd.read():
            if isinstance(event, PageFault):
                number = (event.address - start) // PAGE_SIZE
                page[:] = number.to_bytes(4, "little") * (PAGE_SIZE // 4)
                uffd.copy(event.address, memory.address_of(page), PAGE_SIZE)  # EEXIST would mean: answered before


def main() -> None:
    """Register memory, start the pager, and read."""
    ours, theirs = socket.socketpair()
    pager = subprocess.Popen([sys.executable, __file__, "pager"], stdin=theirs.fileno())
    theirs.close()
    length = PAGES * PAGE_SIZE
    with Userfaultfd.open() as uffd:
        start = memory.map_memory(length)
        uffd.register(start, length, RegisterMode.MISSING)
        socket.send_fds(ours, [start.to_bytes(8, "little")], [uffd.fileno()])
        view = memory.view(start, length)
        numbers = [int.from_bytes(view[at * PAGE_SIZE : at * PAGE_SIZE + 4], "little") for at in (0, 7, 999)]
        print(f"read {numbers}, made up by process {pager.pid}")
        view.release()
        pager.kill()
        pager.wait()
        memory.unmap(start, length)
    ours.close()


if __name__ == "__main__":
    if sys.argv[1:] == ["pager"]:
        answer_faults(socket.socket(fileno=0))
    else:
        main()
