"""`userfault fdinfo PID`: every userfaultfd of a process, who waits there and why, and what memory is registered."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from userfault.cli import figures, meaning
from userfault.cli.command import NO, YES
from userfault.cli.descriptors import Descriptor, Process, Situation, look

if TYPE_CHECKING:
    from userfault.cli.screen import Screen
    from userfault.kernel.maps import MapEntry

_DESCRIPTION = """\
Say which userfaultfds a process has, userfault's and others', how many threads
wait there, what that means for a program that hangs, and which of its memory
is registered. Nothing is disturbed by looking.
The exit status is 1 if the process has none.

  userfault fdinfo 4242
  userfault fdinfo 4242 --json | jq '.userfaultfds[].pending'
"""


class FdinfoCommand:
    """Look at a process."""

    name = "fdinfo"
    summary = "every userfaultfd of a process, who waits there, and why"
    description = _DESCRIPTION

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments."""
        parser.add_argument("pid", metavar="PID", type=_pid, help="number of the process, as ps shows it")
        parser.add_argument("--json", action="store_true", help="write one JSON object")

    def run(self, arguments: argparse.Namespace, screen: Screen) -> int:
        """Look, and report."""
        situation = look(arguments.pid)
        if arguments.json:
            screen.file.write(as_json(situation) + "\n")
        else:
            show(screen, situation)
        return YES if situation.descriptors else NO


def _pid(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not the number of a process; ps -e shows them")
    return int(text)


# -- for people ------------------------------------------------------------------------------------------------------


def show(screen: Screen, situation: Situation) -> None:
    """Write it: the process, each descriptor, the ranges, and a sentence about what the kernel does not tell."""
    screen.line(_headline(situation), "bold")
    part, ownership = meaning.part(situation), meaning.ownership(situation)
    if part:
        screen.line(part)
    for descriptor in situation.descriptors:
        screen.heading(f"Descriptor {descriptor.fd}")
        screen.facts(_facts(situation, descriptor))
    if situation.ranges:
        screen.heading("Registered ranges")
        screen.facts([_range(entry) for entry in situation.ranges])
    if ownership:
        screen.line()
        screen.line(ownership)


def _headline(situation: Situation) -> str:
    process, found = situation.process, len(situation.descriptors)
    number = figures.count(found, "descriptor") if found else "no descriptor"
    return f"{meaning.called(process)}, {process.state}, has {number} for userfaultfd"


def _facts(situation: Situation, descriptor: Descriptor) -> list[tuple[str, str]]:
    info = descriptor.info
    handshake = "handshake done" if info.initialized else "no handshake yet"
    facts = [
        ("what", meaning.KINDS[meaning.kind(info)]),
        ("waiting", meaning.waiting(info)),
        ("counts", f"pending {info.pending}, total {info.total}"),
        ("protocol", f"{info.api:#x}, {handshake}"),
        ("features", ", ".join(meaning.features(info)) or "none"),
        ("open", ", ".join(meaning.opened(info))),
        ("also held by", meaning.holders(situation.copies(descriptor), descriptor.others)),
    ]
    advice = meaning.advice(info, situation.process, descriptor.others)
    return [*facts, ("advice", advice)] if advice else facts


def _range(entry: MapEntry) -> tuple[str, str]:
    words = f"{figures.size(entry.size)}, {' and '.join(meaning.modes(entry))} pages of {meaning.memory(entry)}"
    return f"{entry.start:x}-{entry.end:x}", words


# -- for programs ----------------------------------------------------------------------------------------------------


def as_json(situation: Situation) -> str:
    """Return everything as one JSON object."""
    whole = {
        **_process(situation.process),
        "role": situation.process.role,
        "meaning": meaning.part(situation),
        "userfaultfds": [_descriptor(situation.process, descriptor) for descriptor in situation.descriptors],
        "ranges": [_entry(entry) for entry in situation.ranges],
        "ownership": meaning.ownership(situation),
    }
    return json.dumps(whole, indent=2)


def _process(process: Process) -> dict[str, object]:
    return {"pid": process.pid, "name": process.name, "state": process.state}


def _descriptor(process: Process, descriptor: Descriptor) -> dict[str, object]:
    info = descriptor.info
    kind = meaning.kind(info)
    return {
        "fd": descriptor.fd,
        "inode": info.inode,
        "kind": kind,
        "meaning": meaning.KINDS[kind],
        "pending": info.pending,
        "total": info.total,
        "waiting": meaning.waiting(info),
        "advice": meaning.advice(info, process, descriptor.others),
        "api": info.api,
        "handshake": info.initialized,
        "features": meaning.features(info),
        "flags": info.flags,
        "open": meaning.opened(info),
        "others": [_process(one) for one in descriptor.others],
    }


def _entry(entry: MapEntry) -> dict[str, object]:
    return {
        "start": entry.start,
        "end": entry.end,
        "size": entry.size,
        "modes": meaning.modes(entry),
        "permissions": entry.permissions,
        "path": entry.path,
        "memory": meaning.memory(entry),
    }
