"""`userfault info FILE`: what a file is, how much of it is in memory, and which tool serves it best."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from userfault.blocks.geometry import DEFAULT_BLOCK_SIZE, Geometry, check_block_size
from userfault.cli import figures
from userfault.cli.command import YES, CommandError
from userfault.cli.storage import FileSystem, cached_bytes, file_system
from userfault.kernel.process import memory_available
from userfault.stores import FileStore

if TYPE_CHECKING:
    from userfault.cli.screen import Screen

_DESCRIPTION = """\
Say what a .npy or raw file is, how much of it is in the page cache, what
open_array would make of it, and whether numpy.memmap is the better tool.
Nothing but the header is read.

  userfault info weights.npy
  userfault info readings.bin --block-size 2MiB --json
"""
_MAGIC = b"\x93NUMPY"
_MOSTLY = 0.9
"""The part of a file in the page cache from which on it counts as being in memory."""
_TWICE = "a region would hold its bytes a second time"
_FAR = (
    "its bytes come over {}: ensure() raises what a touch could only answer with a signal, a budget bounds the memory, "
    "and a slow read delays nobody else"
)
_COLD = (
    "a plain local file is what mmap is made for; open_array adds a budget, errors as exceptions (ensure), statistics "
    "and residency, where they are needed"
)


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known about a file. Sizes are in bytes.

    Attributes:
        path: As it was given.
        size: All of it.
        kind: `".npy"` or `"raw"`.
        dtype: Type of the items.
        shape: None: open_array would make it of the size, or the header was not read.
        order: `"C"` or `"F"`.
        offset: Where the items begin.
        file_system: What it lies on; empty if unknown.
        cached: In the page cache; None if the kernel does not say.
        block_size: What a region would bring in at once.
        blocks: How many of these it would have.
        budget: The most that a region would keep in memory, if opened now.
        tool: `"numpy.memmap"`, `"userfault.open_array"` or `"numpy.load"`.
        advice: Why.
    """

    path: str
    size: int
    kind: str
    dtype: str
    shape: tuple[int, ...] | None
    order: str
    offset: int
    file_system: str
    cached: int | None
    block_size: int
    blocks: int
    budget: int
    tool: str
    advice: str


class InfoCommand:
    """Look at a file."""

    name = "info"
    summary = "what a file is, and which tool serves it best"
    description = _DESCRIPTION

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments."""
        parser.add_argument("file", metavar="FILE", help="a .npy file, or any other as raw bytes")
        parser.add_argument(
            "--block-size",
            type=_block_size,
            default=DEFAULT_BLOCK_SIZE,
            metavar="SIZE",
            help="count blocks of this size; default: 64KiB",
        )
        parser.add_argument("--json", action="store_true", help="write one JSON object")

    def run(self, arguments: argparse.Namespace, screen: Screen) -> int:
        """Look, and report."""
        facts = gather(arguments.file, arguments.block_size)
        if arguments.json:
            screen.file.write(json.dumps({name: getattr(facts, name) for name in Facts.__slots__}, indent=2) + "\n")
        else:
            show(screen, facts)
        return YES


def _block_size(text: str) -> int:
    try:
        return check_block_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def gather(path: str, block_size: int) -> Facts:
    """Find everything out.

    Raises:
        CommandError: if it is no file that a region could be made of.
        OSError: if it cannot be opened.
    """
    try:
        store = FileStore(path)
        kind, dtype, shape, order, offset = _items(store)
    except ValueError as error:
        raise CommandError(str(error)) from error
    store.close()
    where, cached = file_system(path), cached_bytes(path)
    if shape is not None and 0 in shape:
        tool, advice = "numpy.load", "it has no items, and a region needs at least one byte"
    else:
        tool, advice = advise(where, cached, store.size)
    return Facts(
        path=path,
        size=store.size,
        kind=kind,
        dtype=dtype,
        shape=shape,
        order=order,
        offset=offset,
        file_system=where.kind,
        cached=cached,
        block_size=block_size,
        blocks=Geometry(store.size, block_size).blocks,
        budget=max(memory_available() // 2, block_size),
        tool=tool,
        advice=advice,
    )


def _items(store: FileStore) -> tuple[str, str, tuple[int, ...] | None, str, int]:
    """Return kind, dtype, shape, order and offset of the items in a file."""
    start = bytearray(min(store.size, len(_MAGIC)))
    store.read_into(0, memoryview(start))
    if start != _MAGIC:
        return "raw", "uint8", (store.size,), "C", 0
    if find_spec("numpy") is None:
        return ".npy", "unknown: NumPy, which reads the header, is not installed", None, "C", 0
    from userfault.arrays.header import read_header

    header = read_header(store)
    if header is None:
        raise CommandError(f"{store.describe()} begins like a .npy file and is none")
    return ".npy", str(header.dtype), header.shape, header.order, header.offset


def advise(where: FileSystem, cached: int | None, size: int) -> tuple[str, str]:
    """Return the better tool for a file, and why, in a sentence."""
    if where.far:
        return "userfault.open_array", _FAR.format(where.kind)
    if where.memory:
        return "numpy.memmap", f"it is on {where.kind}, in memory already; {_TWICE}"
    if cached is not None and cached >= _MOSTLY * size:
        return "numpy.memmap", f"it is local and in the page cache, where the kernel maps it without a pager; {_TWICE}"
    return "numpy.memmap", _COLD


def show(screen: Screen, facts: Facts) -> None:
    """Write it."""
    screen.line(facts.path, "bold")
    place = f" on {facts.file_system}" if facts.file_system else ""
    rounded = f" ({figures.size(facts.size)})" if facts.size >= 1024 else ""
    order = "C" if facts.order == "C" else "Fortran"
    shape = "" if facts.shape is None else f" {facts.shape}, {order} order"
    if facts.cached is None:
        cached = "the kernel does not say (before Linux 6.5, or a file that you neither own nor may write)"
    else:
        cached = f"{figures.size(facts.cached)}, {figures.share(facts.cached, facts.size)}"
    blocks = f"{figures.count(facts.blocks, 'block')} of {figures.size(facts.block_size)}, brought in one by one"
    fits = "all of it fits" if facts.budget >= facts.size else "the oldest blocks make room for new ones"
    screen.facts(
        [
            ("size", f"{figures.count(facts.size, 'byte')}{rounded}{place}"),
            ("kind", f"{facts.kind}, items from byte {facts.offset}"),
            ("array", f"{facts.dtype}{shape}"),
            ("page cache", cached),
            ("open_array", blocks),
            ("budget", f"{figures.size(facts.budget)} unless you say otherwise: {fits}"),
            ("better tool", f"{facts.tool}: {facts.advice}"),
        ]
    )
