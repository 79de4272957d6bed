"""What `userfault fdinfo` says of the numbers it finds."""

from __future__ import annotations

import io
import json
import os
import re

import pytest

from userfault.cli import main, meaning
from userfault.cli.command import CommandError
from userfault.cli.descriptors import Descriptor, Process, Situation, _infos, _refusal, look
from userfault.cli.fdinfo import as_json, show
from userfault.cli.screen import PlainScreen
from userfault.errors import KernelError
from userfault.kernel import Feature, Ioctl, MapEntry, process
from userfault.kernel.fdinfo import FdInfo
from userfault.pager.link import FEATURES
from userfault.protocol import constants

_APPLICATION = Process(12, "python3", "sleeping")
_WORKER = Process(20, "userfault-worke", "sleeping")
_SUPERVISOR = Process(19, "userfault-super", "sleeping")
_OTHER = Process(30, "qemu", "running")


def _info(
    pending: int = 0,
    total: int = 0,
    *,
    features: int = 0,
    initialized: bool = True,
    flags: int = os.O_CLOEXEC,
    inode: int = 700,
) -> FdInfo:
    return FdInfo(pending, total, 0xAA, Feature(features), Ioctl.API, initialized, flags, inode)


def _entry(start: int, path: str = "", *flags: str) -> MapEntry:
    return MapEntry(start, start + 0x10000, "rw-s", 0, 0, 0, path, frozenset(flags))


def _situation(*infos: FdInfo, ranges: tuple[MapEntry, ...] = (), asked: Process = _APPLICATION) -> Situation:
    return Situation(asked, tuple(Descriptor(fd, info) for fd, info in enumerate(infos, 3)), ranges)


# -- one descriptor --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("info", "kind"),
    [
        (_info(features=FEATURES), "pager"),
        (_info(features=constants.FEATURES), "protocol"),
        (_info(features=constants.FEATURES | Feature.MOVE), "protocol"),
        (_info(features=constants.GUARD_FEATURES), "guard"),
        (_info(features=constants.GUARD_FEATURES | Feature.MOVE), "guard"),
        (_info(), "other"),
        (_info(features=FEATURES | 1 << 40), "other"),
        (_info(initialized=False), "new"),
    ],
)
def test_the_features_tell_whose_it_is(info: FdInfo, kind: str) -> None:
    assert meaning.kind(info) == kind
    assert meaning.KINDS[meaning.kind(info)]


@pytest.mark.parametrize(
    ("pending", "total", "said"),
    [
        (0, 0, "nobody waits"),
        (1, 1, "1 thread waits; the pager has not read its message"),
        (0, 1, "1 thread waits; the pager has read its message"),
        (3, 3, "3 threads wait; the pager has read none of their messages"),
        (2, 3, "3 threads wait; the pager has read 1 of their messages"),
        (0, 3, "3 threads wait; the pager has read all of their messages"),
        (2, 1, "1 thread waits; the pager has not read its message"),
        (0, 1500, "1,500 threads wait; the pager has read all of their messages"),
    ],
)
def test_pending_and_total_in_words(pending: int, total: int, said: str) -> None:
    assert meaning.waiting(_info(pending, total)) == said


def test_where_nobody_waits_nothing_is_advised() -> None:
    assert meaning.advice(_info(), _APPLICATION, [Process(20, "x", "stopped")]) == ""


def test_messages_that_nobody_reads_mean_that_the_pager_hangs() -> None:
    assert "nobody reads: the pager hangs" in meaning.advice(_info(1, 2), _APPLICATION, [_WORKER])


def test_a_process_that_must_serve_itself_is_told_of_the_gil() -> None:
    said = meaning.advice(_info(1, 1), _APPLICATION, [])

    assert "a thread of this one must answer" in said
    assert "holds the GIL" in said


def test_messages_read_and_not_answered_mean_that_the_store_hangs() -> None:
    assert "hangs while it fetches the pages" in meaning.advice(_info(0, 2), _APPLICATION, [_WORKER])


@pytest.mark.parametrize("pending", [0, 1])
def test_a_stopped_pager_is_named_with_the_remedy(pending: int) -> None:
    said = meaning.advice(_info(pending, 1), _APPLICATION, [_SUPERVISOR, Process(20, "userfault-worke", "stopped")])

    assert said == "process 20 (userfault-worke) is stopped: kill -CONT 20 lets it go on."


def test_a_pager_in_a_debugger_is_named() -> None:
    said = meaning.advice(_info(1, 1), Process(20, "qemu", "tracing stop"), [])

    assert said == "process 20 (qemu) is stopped by a debugger."


def test_features_are_named_and_new_ones_are_numbers() -> None:
    found = meaning.features(_info(features=Feature.MOVE | Feature.EVENT_FORK | 1 << 20 | 1 << 22))

    assert found == ["EVENT_FORK", "MOVE", "0x500000"]
    assert meaning.features(_info()) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (os.O_CLOEXEC, ["blocking", "close-on-exec"]),
        (os.O_NONBLOCK, ["non-blocking", "inherited by programs that are started"]),
    ],
)
def test_flags_in_words(flags: int, words: list[str]) -> None:
    assert meaning.opened(_info(flags=flags)) == words


# -- processes -------------------------------------------------------------------------------------------------------


def test_processes_of_a_pager_are_known_by_their_names() -> None:
    assert [one.role for one in (_WORKER, _SUPERVISOR, _APPLICATION)] == ["worker", "supervisor", ""]


def test_who_holds_a_copy() -> None:
    assert meaning.holders([], []) == "no other process, as far as can be seen"
    assert meaning.holders([5], []) == "descriptor 5; no other process, as far as can be seen"
    assert (
        meaning.holders([], [_WORKER, _OTHER]) == "process 20 (userfault-worke), sleeping; process 30 (qemu), running"
    )


def test_a_pager_belongs_to_the_application_it_serves() -> None:
    descriptor = Descriptor(3, _info(features=FEATURES), (_APPLICATION, _SUPERVISOR))

    said = meaning.part(Situation(_WORKER, (descriptor,), ()))

    assert said.startswith("It is the worker of a userfault pager.")
    assert "the application it serves: process 12 (python3);" in said
    assert "the application it serves; the registered" in meaning.part(Situation(_WORKER, (), ()))
    assert meaning.part(_situation(_info())) == ""


@pytest.mark.parametrize(
    ("text", "shown"),
    [("plain ü", "plain ü"), ("a\nb\x1b[31m", r"a\nb\x1b[31m"), ("\udcff", r"\udcff"), ("\u202egnp", r"\u202egnp")],
)
def test_names_do_nothing_to_a_terminal(text: str, shown: str) -> None:
    assert meaning.printable(text) == shown
    assert meaning.memory(_entry(0, text)) == shown
    assert meaning.called(Process(1, text, "sleeping")) == f"process 1 ({shown})"


# -- ranges ----------------------------------------------------------------------------------------------------------


def test_modes_in_words() -> None:
    assert meaning.modes(_entry(0, "", "rd", "um", "uw")) == ["missing", "write-protected"]
    assert meaning.modes(_entry(0, "", "ui", "sh")) == ["minor"]


def test_what_lies_beneath_a_range() -> None:
    assert meaning.memory(_entry(0, "", "um")) == "anonymous memory"
    assert meaning.memory(_entry(0, "/memfd:x (deleted)", "um")) == "/memfd:x (deleted)"
    assert meaning.memory(_entry(0, "/anon_hugepage (deleted)", "um", "ht")) == "/anon_hugepage (deleted), huge pages"


_RANGE = _entry(0x7F0000000000, "/memfd:x (deleted)", "um", "uw")


@pytest.mark.parametrize(
    ("situation", "said"),
    [
        (_situation(_info(), ranges=(_RANGE,)), "They belong to descriptor 3, the only userfaultfd"),
        (_situation(_info(), _info(), ranges=(_RANGE,)), "They belong to descriptor 3, the only userfaultfd"),
        (_situation(_info(initialized=False), _info(inode=701), ranges=(_RANGE,)), "They belong to descriptor 4,"),
        (
            _situation(_info(), _info(inode=701), ranges=(_RANGE,)),
            "The kernel does not tell which .* userfaultfd: 3, 4.",
        ),
        (
            _situation(_info(inode=0), _info(inode=0), ranges=(_RANGE,)),
            "The kernel does not tell .* userfaultfd: 3, 4.",
        ),
        (_situation(ranges=(_RANGE,)), "No descriptor here serves them: another process holds their userfaultfd."),
        (_situation(_info()), "touches the memory of another process"),
        (_situation(_info(), asked=_WORKER), "^$"),
        (_situation(), "^$"),
    ],
)
def test_who_the_ranges_belong_to(situation: Situation, said: str) -> None:
    assert re.search(said, meaning.ownership(situation))


# -- the whole -------------------------------------------------------------------------------------------------------


def test_text_for_people() -> None:
    file = io.StringIO()
    descriptors = (Descriptor(7, _info(2, 3, features=FEATURES | 1 << 40), (_WORKER,)), Descriptor(9, _info()))

    show(PlainScreen(file), Situation(_APPLICATION, descriptors, (_RANGE,)))

    assert file.getvalue() == (
        "process 12 (python3), sleeping, has 2 descriptors for userfaultfd\n"
        "\nDescriptor 7\n"
        "  what          another program's\n"
        "  waiting       3 threads wait; the pager has read 1 of their messages\n"
        "  counts        pending 2, total 3\n"
        "  protocol      0xaa, handshake done\n"
        "  features      PAGEFAULT_FLAG_WP, MISSING_SHMEM, THREAD_ID, WP_HUGETLBFS_SHMEM, POISON, 0x10000000000\n"
        "  open          blocking, close-on-exec\n"
        "  also held by  descriptor 9; process 20 (userfault-worke), sleeping\n"
        "  advice        If it is the same when you look again, nobody reads: the pager hangs.\n"
        "\nDescriptor 9\n"
        "  what          another program's\n"
        "  waiting       nobody waits\n"
        "  counts        pending 0, total 0\n"
        "  protocol      0xaa, handshake done\n"
        "  features      none\n"
        "  open          blocking, close-on-exec\n"
        "  also held by  descriptor 7; no other process, as far as can be seen\n"
        "\nRegistered ranges\n"
        "  7f0000000000-7f0000010000  64 KiB, missing and write-protected pages of /memfd:x (deleted)\n"
        "\nThey belong to descriptor 7, the only userfaultfd of the process.\n"
    )


def test_a_process_without_any_is_a_line() -> None:
    file = io.StringIO()

    show(PlainScreen(file), _situation())

    assert file.getvalue() == "process 12 (python3), sleeping, has no descriptor for userfaultfd\n"


def test_json_for_programs() -> None:
    descriptor = Descriptor(7, _info(1, 1, features=FEATURES), (_WORKER,))

    whole = json.loads(as_json(Situation(_APPLICATION, (descriptor,), (_RANGE,))))

    [found], [entry] = whole["userfaultfds"], whole["ranges"]
    assert (whole["pid"], whole["name"], whole["state"], whole["role"]) == (12, "python3", "sleeping", "")
    assert (found["fd"], found["kind"], found["pending"], found["total"], found["api"]) == (7, "pager", 1, 1, 0xAA)
    assert (found["handshake"], found["flags"], found["open"][0]) == (True, os.O_CLOEXEC, "blocking")
    assert found["others"] == [{"pid": 20, "name": "userfault-worke", "state": "sleeping"}]
    assert (entry["start"], entry["size"], entry["modes"]) == (0x7F0000000000, 65536, ["missing", "write-protected"])


# -- what cannot be asked --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["abc", "0", "-1", "+1", "1_0", " 1", "1.5", "²", "", "self"])
def test_what_is_no_number_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["fdinfo", text])

    out, err = capsys.readouterr()
    assert (left.value.code, out, err.count("\n")) == (2, "", 1)
    assert f"{text!r} is not the number of a process" in err


@pytest.mark.parametrize(
    ("errno", "said"),
    [
        (2, "there is no process 12;"),
        (3, "there is no process 12;"),
        (1, "process 12 is not yours to look at: run as"),
        (13, "process 12 is not yours to look at: run as"),
        (24, "open(/proc/12/fd): [Errno 24] Too many open files"),
    ],
)
def test_refusals_name_the_process_and_the_remedy(errno: int, said: str) -> None:
    assert _refusal(12, KernelError(errno, "open(/proc/12/fd)")).startswith(said)


def test_descriptors_that_are_closed_meanwhile_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(writer)
    monkeypatch.setattr(process, "userfaultfds", lambda _: [reader, writer])

    assert list(_infos(os.getpid())) == []
    os.close(reader)


def test_an_error_about_a_descriptor_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, pid: int) -> FdInfo:
        raise KernelError(13, f"open(/proc/{pid}/fdinfo/{fd})")

    monkeypatch.setattr(process, "userfaultfds", lambda _: [3])
    monkeypatch.setattr("userfault.cli.descriptors.read_fdinfo", refuse)

    with pytest.raises(CommandError, match="not yours to look at"):
        look(os.getpid())
