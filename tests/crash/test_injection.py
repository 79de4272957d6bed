"""Every system call that the package makes fails, in every role: right bytes, or an error that says what it is.

What goes wrong is named by a scene, a role, a call, an errno and a number, and can be played again just so:

    USERFAULT_INJECTION="files|worker|ioctl(UFFDIO_COPY)|ENOMEM|3" python -m pytest tests/crash -k played_again
"""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from tests.crash.injection import seccomp
from tests.crash.injection.plan import (
    FRESH,
    KEPT,
    REHEARSALS,
    Rehearsal,
    Tally,
    all_ways,
    each_of_writing,
    each_once,
    elsewhere,
)
from tests.crash.injection.stage import Failure, Stage

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable

    from tests.crash.injection.plan import Step

pytestmark = pytest.mark.skipif(bool(seccomp.why_not()), reason=seccomp.why_not() or "it can be done here")

AGAIN = "USERFAULT_INJECTION"
STAGES = 2
"""How many play at once: whoever asks for leave, and whoever gives it, take turns on a core."""
PARTS = 6
"""Of the short form: each is a test, so that a busy machine has time enough for it."""
BEFORE = """
export|application|mmap(memfd)|EPERM|1
export|application|recvmsg|ENOMEM|3
export|application|userfaultfd|ENOSYS|2
export|worker|epoll_ctl|ENOSPC|1
files|worker|sendmsg|ENOMEM|9
first|application|fcntl(F_SETOWN_EX)|EPERM|1
first|application|sendmsg|EAGAIN|3
first|application|write(memfd)|ENOSPC|1
first|supervisor|sendmsg|ENOMEM|1
kernel|application|msync|EIO|1
kill_supervisor|worker|socketpair|EMFILE|1
kill_worker|supervisor|socketpair|ENFILE|1
others|worker|ioctl(UFFDIO_WRITEPROTECT)|EINTR|1
stop_worker|supervisor|poll|ENOMEM|7
suspect|supervisor|sendmsg|EAGAIN|1
"""
"""What went wrong once."""


@pytest.fixture(scope="module")
def rehearsal() -> Rehearsal:
    """How often which call is made in which scene."""
    found = Rehearsal()
    with Stage() as one, Stage() as other, ThreadPoolExecutor(STAGES) as pool:
        for _ in range(REHEARSALS):
            for done in [pool.submit(found.play, one, FRESH), pool.submit(found.play, other, KEPT)]:
                done.result()
            if not found.missing():
                break
    return found


def test_nothing_goes_wrong_when_nothing_fails(rehearsal: Rehearsal) -> None:
    assert not rehearsal.wrong, "\n".join(rehearsal.wrong)


def test_every_call_that_is_made_is_in_the_list(rehearsal: Rehearsal) -> None:
    assert not rehearsal.unlisted(), "add them to injection.calls:\n" + "\n".join(rehearsal.unlisted())


def test_every_call_in_the_list_is_made(rehearsal: Rehearsal) -> None:
    assert not rehearsal.missing(), "have a scene make them, or forget them:\n" + "\n".join(rehearsal.missing())


@pytest.mark.parametrize("part", range(PARTS))
def test_each_call_fails_once_in_each_role(rehearsal: Rehearsal, rng: random.Random, part: int) -> None:
    steps = list(each_once(rehearsal, rng))[part::PARTS]
    tally = play_all(steps)
    for _ in range(REHEARSALS):  # time does not repeat itself
        if unreached := tally.unreached(steps):
            play_until_reached([elsewhere(rehearsal, failure) for failure in unreached], tally)
    assert not tally.wrong, "\n\n".join(tally.wrong)
    assert not tally.unreached(steps), tally.unreached(steps)


def test_each_call_of_a_write_back_fails(rehearsal: Rehearsal, rng: random.Random, soak: bool) -> None:
    tally = play_all(each_of_writing(rehearsal, rng, soak=soak))
    assert not tally.wrong, "\n\n".join(tally.wrong)


@pytest.mark.soak
def test_each_call_fails_in_each_way(rehearsal: Rehearsal, rng: random.Random) -> None:
    steps = list(all_ways(rehearsal, rng))
    tally = play_all(steps)
    assert not tally.wrong, "\n\n".join(tally.wrong)
    assert not tally.unreached(steps), tally.unreached(steps)


def test_what_is_played_again() -> None:
    tally = play_all(map(parse, os.environ.get(AGAIN, BEFORE).strip().splitlines()))
    assert not tally.wrong, "\n\n".join(tally.wrong)


def parse(line: str) -> Step:
    scene, role, label, number, nth = line.split("|")
    return scene, FRESH, Failure(role, label, getattr(errno, number), int(nth))


def play_all(steps: Iterable[Step]) -> Tally:
    """Play each step; print what came of it."""
    tally = Tally()
    play_until_reached([[step] for step in steps], tally)
    return tally


def play_until_reached(choices: list[list[Step]], tally: Tally) -> None:
    """Play steps, on several stages at once: of each list until a call has failed; print what came of it so far."""
    with ThreadPoolExecutor(STAGES) as pool:
        for done in [pool.submit(play, choices[part::STAGES], tally) for part in range(STAGES)]:
            done.result()
    print(tally.table())


def play(choices: list[list[Step]], tally: Tally) -> None:
    """Play on one stage.  Threads, and time, do not repeat themselves: what was not reached is tried from the front."""
    with Stage() as stage:
        for steps in choices:
            for step in steps:
                if play_step(stage, step, tally):
                    break


def play_step(stage: Stage, step: Step, tally: Tally) -> bool:
    """Play a scene, twice if need be; return whether the call has failed."""
    scene, fresh, failure = step
    played = stage.play(scene, failure, fresh=fresh)
    if not played.hits:
        played = stage.play(scene, failure._replace(nth=1), fresh=fresh)
    tally.add(scene, failure, played)
    return bool(played.hits)
