"""What the victims share: how one begins, speaks, listens, and touches memory in each of the ways that differ."""

from __future__ import annotations

import ast
import faulthandler
import os
import resource
import sys
import tempfile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import userfault

PAGE = 4096
BLOCK = 65536


def begin(functions: dict[str, Any]) -> None:
    """Run the function that the command line names, under a watchdog; its result is printed."""
    limit, name, *args = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    faulthandler.dump_traceback_later(float(limit), exit=True)
    result = functions[name](*map(ast.literal_eval, args))
    if result is not None:
        say(result)


def say(*words: object) -> None:
    """Print a line, at once and in one piece."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def listen() -> str:
    """Wait for a line of the test; empty when it has nothing more to say."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            break
        line += byte
    return line.decode().strip()


def introduce(region: userfault.Region) -> None:
    """Say `ready`, the pids of supervisor and worker, and the number of the userfaultfd."""
    pager = region.pager
    say("ready", pager.pid, pager.worker_pid, pager.link.uffd.fd)


def ones(length: int) -> int:
    """Return a descriptor of a file of bytes that are never zero."""
    with tempfile.TemporaryFile() as file:
        fd = os.dup(file.fileno())
    os.pwrite(fd, b"\x01" * length, 0)
    return fd


def preadv_all(fd: int, into: memoryview) -> None:
    """Fill memory from the beginning of a file, in as many system calls as it takes."""
    done = 0
    while done < len(into):
        done += os.preadv(fd, [into[done:]], done)


def write_all(data: memoryview) -> bytes:
    """Send memory through a pipe; return what came out at its other end."""
    reader, writer = os.pipe()
    received = b""
    while len(received) < len(data):
        sent = os.write(writer, data[len(received) : len(received) + BLOCK])
        received += os.read(reader, sent)
    os.close(reader)
    os.close(writer)
    return received
