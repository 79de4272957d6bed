"""Leaks made visible: what a process holds, compared before and after.

Looked at: open descriptors; mappings of memfds and userfaultfds, by what they cover; child processes, dead
ones too; threads, those of C libraries included. Not looked at: memory on the heap.
"""

from __future__ import annotations

import gc
import os
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Holdings", "holdings", "no_leaks"]

_POLL_S = 0.005


@dataclass(frozen=True, slots=True)
class Holdings:
    """What this process holds, by kind; each thing with a name for messages."""

    descriptors: dict[str, str]
    mappings: dict[str, int]
    children: dict[str, str]
    threads: dict[str, str]

    def beyond(self, before: Holdings) -> list[str]:
        """Return a line for each thing that is held now and was not held before."""
        grown = {
            name: f"{size - before.mappings.get(name, 0)} bytes of {name}"
            for name, size in self.mappings.items()
            if size > before.mappings.get(name, 0)
        }
        return [
            *_new("descriptor", self.descriptors, before.descriptors),
            *_new("mapping", grown, {}),
            *_new("child process", self.children, before.children),
            *_new("thread", self.threads, before.threads),
        ]


def _new(kind: str, after: dict[str, str], before: dict[str, str]) -> list[str]:
    return [f"{kind} {key}: {name}" for key, name in after.items() if before.get(key) != name]


def holdings() -> Holdings:
    """Take stock of this process."""
    return Holdings(_descriptors(), _mappings(), _children(), _threads())


@contextmanager
def no_leaks(settle_s: float = 5.0) -> Iterator[None]:
    """Check that a block leaves nothing behind that it has opened.

    What ends on its own, such as a process that has been told to, is given a while; garbage is collected
    first. When the block raises, its own exception matters more, and nothing is checked. Import what it needs
    before: libraries open files and start threads when they are imported. Use it in the main thread of a
    process without others' work.

    Args:
        settle_s: How long to wait for what is still there.

    Raises:
        AssertionError: Something is left; the message names each thing.
    """
    gc.collect()
    before = holdings()
    yield
    gc.collect()
    deadline = time.monotonic() + settle_s
    while (left := holdings().beyond(before)) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    if left:
        raise AssertionError("left behind:\n  " + "\n  ".join(left))


def _descriptors() -> dict[str, str]:
    names = ((name, _link(f"/proc/self/fd/{name}")) for name in os.listdir("/proc/self/fd"))
    return {name: target for name, target in names if target}


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except FileNotFoundError:  # the descriptor that listed the folder
        return ""


def _mappings() -> dict[str, int]:
    """Return bytes by name and inode: pieces of one mapping come and go as its protection changes."""
    sizes: dict[str, int] = {}
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            if "memfd:" in line or "userfaultfd" in line:
                span, _access, _offset, _device, inode, name = line.split(maxsplit=5)
                start, end = (int(number, 16) for number in span.split("-"))
                key = f"{name.strip()} (inode {inode})"
                sizes[key] = sizes.get(key, 0) + end - start
    return sizes


def _children() -> dict[str, str]:
    """Return the processes whose parent this one is, dead ones too."""
    found = {}
    for pid in _child_pids():
        try:
            with open(f"/proc/{pid}/stat", encoding="utf-8", errors="surrogateescape") as file:
                text = file.read()
        except (FileNotFoundError, ProcessLookupError):  # gone meanwhile
            continue
        name, fields = text[text.find("(") + 1 : text.rfind(")")], text[text.rfind(")") + 2 :].split()
        if int(fields[1]) == os.getpid():
            found[pid] = f"{name} (dead, not waited for)" if fields[0] == "Z" else name
    return found


def _child_pids() -> list[str]:
    """Return at least the children; all processes where the kernel keeps no list (CONFIG_PROC_CHILDREN)."""
    pids = []
    for thread in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{thread}/children", encoding="ascii") as file:
                pids += file.read().split()
        except FileNotFoundError:
            if os.path.exists(f"/proc/self/task/{thread}"):
                return list(filter(str.isdigit, os.listdir("/proc")))
    return pids


def _threads() -> dict[str, str]:
    found = {}
    for thread in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{thread}/comm", encoding="utf-8", errors="surrogateescape") as file:
                found[thread] = file.read().strip()
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found
