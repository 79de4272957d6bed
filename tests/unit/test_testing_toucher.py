"""Touching memory by address; and the trap that it avoids."""

from __future__ import annotations

import ctypes
import threading

from userfault.kernel import memory
from userfault.kernel.abi import RegisterMode
from userfault.kernel.userfaultfd import Userfaultfd
from userfault.testing import poke, run_child, touch


def test_it_reads_and_writes() -> None:
    buffer = ctypes.create_string_buffer(b"hello", 5)
    address = ctypes.addressof(buffer)

    assert touch(address) == b"h"
    assert touch(address, 5) == b"hello"
    poke(address + 1, b"ELL")
    assert buffer.raw == b"hELLo"


def serve_ourselves() -> bytes:
    """Be the pager in a thread of the very process whose main thread stops in the fault."""
    length = memory.PAGE_SIZE
    address, source = memory.map_memory(length), memory.map_memory(length)
    poke(source, b"brought in")
    with Userfaultfd.open(user_mode_only=True) as uffd:
        uffd.register(address, length, RegisterMode.MISSING)

        def serve() -> None:
            uffd.read()
            uffd.copy(address, source, length)

        thread = threading.Thread(target=serve)
        thread.start()
        found = touch(address, 10)
        thread.join()
    return found


def test_a_thread_of_the_same_process_can_serve_a_touch() -> None:
    assert run_child(serve_ourselves, timeout=20).check().value == b"brought in"
