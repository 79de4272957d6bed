"""`userfault doctor`: what this machine offers, what is missing, what that means, and what to do about it."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
from dataclasses import asdict
from typing import TypeAlias

from userfault import __version__
from userfault.cli import figures
from userfault.cli.command import NO, YES
from userfault.cli.limits import limits
from userfault.cli.machine import needed, offered, python, ways_in
from userfault.cli.screen import Finding, Screen
from userfault.cli.trial import Trial, try_in_child
from userfault.kernel.capabilities import Capabilities, probe

Report: TypeAlias = dict[str, list[Finding]]

_DESCRIPTION = """\
Say what this machine offers, what is missing, what that means, and what to do
about it; then open a region in a child process and read from it.
The exit status is 0 only if that worked.

  userfault doctor
  userfault doctor --json | jq '.findings["Ways in"]'
"""


class DoctorCommand:
    """Examine the machine."""

    name = "doctor"
    summary = "what this machine offers, what is missing, and the remedy"
    description = _DESCRIPTION

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments."""
        parser.add_argument("--json", action="store_true", help="write one JSON object instead of a table")

    def run(self, arguments: argparse.Namespace, screen: Screen) -> int:
        """Examine, try, report."""
        capabilities = probe()
        report = examine(capabilities)
        trial = try_in_child()
        report["A region, opened in a child"] = list(judge(trial, capabilities))
        if arguments.json:
            screen.file.write(as_json(capabilities, report, trial) + "\n")
        else:
            show(screen, report, trial)
        return YES if trial.ok else NO


def examine(capabilities: Capabilities) -> Report:
    """Return the findings, by part."""
    return {
        "Ways in": list(ways_in(capabilities)),
        "What regions need": list(needed(capabilities)),
        "What else the kernel offers": list(offered(capabilities)),
        "Limits": list(limits()),
        "Python": list(python()),
    }


def judge(trial: Trial, found: Capabilities) -> Iterator[Finding]:
    """Yield what the trial showed."""
    if not trial.ok:
        yield Finding("missing", "region", "does not work", trial.error, value=False)
        return
    yield Finding(
        "ok",
        "region",
        "works",
        f"opened, read and closed in {figures.duration(trial.seconds)}, pager and all",
        value=True,
    )
    served = bool(trial.in_system_calls)
    meaning = "write(2) from a block that was not in memory"
    remedy = "" if served or not found.privileged else "It should be: there is privilege. Please report this."
    yield Finding(
        "ok" if served else "limited",
        "faults in system calls",
        "served" if served else "EFAULT",
        meaning,
        remedy,
        served,
    )


def show(screen: Screen, report: Report, trial: Trial) -> None:
    """Write the tables, and the answer last."""
    screen.line(f"Linux {platform.release()} on {platform.machine()}, userfault {__version__}")
    for part, findings in report.items():
        screen.heading(part)
        screen.findings(findings)
    screen.line()
    if trial.ok:
        limited = sum(finding.status == "limited" for findings in report.values() for finding in findings)
        screen.line(
            "Regions work here." + (f" See what is limited above ({limited})." if limited else ""), "bold green"
        )
    else:
        screen.line(f"Regions do not work here: {trial.error}", "bold red")


def as_json(capabilities: Capabilities, report: Report, trial: Trial) -> str:
    """Return everything as one JSON object."""
    whole = {
        "works": trial.ok,
        "kernel": platform.release(),
        "machine": platform.machine(),
        "userfault": __version__,
        "capabilities": capabilities.as_dict(),
        "findings": {part: [asdict(finding) for finding in findings] for part, findings in report.items()},
        "trial": asdict(trial),
    }
    return json.dumps(whole, indent=2)
