"""What is played: where each call of the list is made, which of them fails when; and what came of it, as a table."""

from __future__ import annotations

import signal
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from tests.crash.injection.calls import CALLS
from tests.crash.injection.scenes import SCENES
from tests.crash.injection.stage import Failure
from tests.crash.injection.witness import APPLICATION, PYTHONS

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable, Iterator

    from tests.crash.injection.stage import Played, Stage

REHEARSALS = 3
"""How often scenes are played, at most, until every call of the list has been seen: some depend on time."""
FRESH, KEPT = True, False
"""Whether the pager is closed after the scene, and was not there before."""


@dataclass
class Rehearsal:
    """How often which call is made in which scene.

    Attributes:
        made: By role and label: by scene, and whether with a fresh pager, the number of calls.
        took: By scene, and whether with a fresh pager: seconds.
        wrong: What went wrong, though nothing failed.
    """

    made: dict[tuple[str, str], dict[tuple[str, bool], int]] = field(default_factory=lambda: defaultdict(dict))
    took: dict[tuple[str, bool], float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def play(self, stage: Stage, fresh: bool) -> None:
        """Play all scenes, in which nothing fails: with a fresh pager each, or with one for all."""
        if fresh is KEPT:
            stage.play("first", fresh=KEPT, strict=True)
        for scene in SCENES:
            played = stage.play(scene, fresh=fresh, strict=True)
            self.wrong += [f"{scene}: {text}" for text in played.wrong]
            if played.status is not None:
                self.wrong.append(f"{scene}: the victim ended with status {played.status}: {played.complaints}")
            self.took[scene, fresh] = played.took
            for call, number in played.counts.items():
                self.made[call][scene, fresh] = number

    def unlisted(self) -> list[str]:
        """Return the calls that were made and are not in the list, with the scenes."""
        return [
            f"{role}: {label}, in {sorted({scene for scene, _ in where})}"
            for (role, label), where in sorted(self.made.items())
            if (role, label) not in AT_TIMES and (label not in CALLS or role not in CALLS[label].roles)
        ]

    def missing(self) -> list[str]:
        """Return the calls that are in the list and were not made."""
        return [
            f"{role}: {entry.label}"
            for entry in CALLS.values()
            for role in entry.roles
            if (role, entry.label) not in self.made and (role, entry.label) not in AT_TIMES
        ]

    def soonest_first(self, where: Iterable[tuple[str, bool]]) -> list[tuple[str, bool]]:
        """Return scenes, the one that is over soonest first."""
        return sorted(where, key=lambda one: self.took[one])


AT_TIMES = {
    (APPLICATION, PYTHONS),
    (APPLICATION, "clock_nanosleep"),
    (APPLICATION, "write(standard error)"),
    ("supervisor", "clock_nanosleep"),
    ("supervisor", "lseek(SEEK_DATA)"),
    ("supervisor", "lseek(SEEK_HOLE)"),
}
"""Calls that are made only when the machine is slow, or something else has failed before: neither promised nor new."""

Step: TypeAlias = "tuple[str, bool, Failure]"
"""A scene, whether with a fresh pager, and what fails in it."""


def each_once(rehearsal: Rehearsal, rng: random.Random) -> Iterator[Step]:
    """Yield scenes in which each call fails once in each role, in one of its ways, somewhere."""
    for entry in CALLS.values():
        for role in entry.roles if entry.errnos else ():
            if not (where := rehearsal.made.get((role, entry.label))):
                continue
            scene, fresh = rehearsal.soonest_first(where)[0]
            nth = rng.randint(1, where[scene, fresh])
            yield scene, fresh, Failure(role, entry.label, rng.choice(entry.errnos), nth)


WRITING = ("write_back", "kill_writer")
"""Scenes of write-back."""
OF_WRITING = (
    *("openat(file)", "newfstatat(file)", "pwrite64(file)", "fsync(file)", "preadv2(memfd)", "lseek(SEEK_DATA)"),
    *("lseek(SEEK_HOLE)", "ioctl(UFFDIO_WRITEPROTECT)", "ioctl(UFFDIO_COPY)", "fallocate", "mmap(anonymous)", "clone3"),
)
"""Calls that a worker makes there, and that would otherwise fail in whichever scene is soonest over."""


def each_of_writing(rehearsal: Rehearsal, rng: random.Random, *, soak: bool) -> Iterator[Step]:
    """Yield scenes of write-back in which each of its calls fails: somewhere; or in each way, early and late."""
    for name in OF_WRITING:
        for scene in WRITING if soak else (rng.choice(WRITING),):
            most = rehearsal.made["worker", name][scene, FRESH]
            for number in CALLS[name].errnos if soak else (rng.choice(CALLS[name].errnos),):
                for nth in sorted({1, rng.randint(1, most), most}) if soak else (rng.randint(1, most),):
                    yield scene, FRESH, Failure("worker", name, number, nth)


def elsewhere(rehearsal: Rehearsal, failure: Failure) -> list[Step]:
    """Return every scene that has made a call, the soonest over first: for one that was not reached in another."""
    where = rehearsal.soonest_first(rehearsal.made[failure.role, failure.label])
    return [(scene, fresh, failure._replace(nth=1)) for scene, fresh in where]


def all_ways(rehearsal: Rehearsal, rng: random.Random) -> Iterator[Step]:
    """Yield scenes in which each call fails in each role in each of its ways: first, last, in the middle, anywhere."""
    for entry in CALLS.values():
        for role in entry.roles:
            if not (where := rehearsal.made.get((role, entry.label))):
                continue
            for number in entry.errnos:
                for how in ("first", "middle", "last", "anywhere"):
                    scene, fresh = rehearsal.soonest_first(where)[0] if how == "first" else rng.choice(list(where))
                    most = where[scene, fresh]
                    nth = {"first": 1, "middle": (most + 1) // 2, "last": most, "anywhere": rng.randint(1, most)}[how]
                    yield scene, fresh, Failure(role, entry.label, number, nth)


def second_of_two(scene: str, failure: Failure) -> bool:
    """Whether a scene has one of the pager's processes killed, and the call fails in the other: both may be dead."""
    return failure.role.startswith(OTHERS.get(scene, "nobody"))


OTHERS = {
    **dict.fromkeys(("kill_worker", "stop_worker", "flap", "crash", "suspect"), "supervisor"),
    **dict.fromkeys(("kill_supervisor", "stop_supervisor"), "worker"),
}


class Tally:
    """What came of all of it."""

    OUTCOMES = ("right", "error", "SIGBUS", "SIGABRT", "wrong")

    def __init__(self) -> None:
        self.outcomes: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        self.wrong: list[str] = []

    def add(self, scene: str, failure: Failure, played: Played) -> None:
        """Judge what was played; whatever was not reached does not count."""
        if not played.hits:
            return
        wrong = list(played.wrong)
        outcome = "error" if played.errors else "right"
        if played.status is not None:
            outcome = signal.Signals(played.signal).name if played.signal else f"status {played.status >> 8}"
            announced = outcome == "SIGBUS" and "SIGBUS" in played.complaints
            if not announced and not (outcome == "SIGABRT" and second_of_two(scene, failure)):
                wrong.append(f"the victim ended: {outcome}")
        if wrong:
            outcome = "wrong"
            self.wrong.append("\n".join([f"{scene}: {failure}", *wrong, played.complaints]))
        self.outcomes[failure.label, failure.role][outcome] += 1

    def unreached(self, steps: Iterable[Step]) -> list[Failure]:
        """Return what should have failed and has not: no such call in that role."""
        return [failure for _, _, failure in steps if (failure.label, failure.role) not in self.outcomes]

    def table(self) -> str:
        """Return what came of it, a line for each call and role."""
        head = f"{'':32} {'':20} {'failed':>8}" + "".join(f"{outcome:>8}" for outcome in self.OUTCOMES)
        lines = [
            f"{label:32} {role:20} {sum(found.values()):8}" + "".join(f"{found[o]:8}" for o in self.OUTCOMES)
            for (label, role), found in sorted(self.outcomes.items())
        ]
        total = Counter[str]()
        for found in self.outcomes.values():
            total.update(found)
        lines.append(f"{'all':53} {sum(total.values()):8}" + "".join(f"{total[o]:8}" for o in self.OUTCOMES))
        return "\n".join([head, *lines])
