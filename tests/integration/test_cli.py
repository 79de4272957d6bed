"""The command line as its users meet it: a program, with signals, pipes, terminals and wrong surroundings."""

from __future__ import annotations

import json
import os
import pty
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import userfault
from userfault.cli import sample as sample_module
from userfault.cli import trial as trial_module
from userfault.cli.sample import Sample
from userfault.cli.screen import PlainScreen
from userfault.cli.show import Show, choose_rows
from userfault.cli.trial import Trial, try_in_child

_SOURCE = str(Path(userfault.__file__).parents[1])
_MAIN = "import sys; from userfault.cli import main; sys.exit(main())"
_TIMEOUT_S = 90
_SMALL = "16MiB"


def _command(*words: str) -> list[str]:
    return [sys.executable, "-X", "faulthandler", "-W", "error", "-c", _MAIN, *words]


def _environment(**changes: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": _SOURCE, "PYTHONUTF8": "1"} | changes


def _run(*words: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        _command(*words),
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
        env=_environment(**changes),
        stdin=subprocess.DEVNULL,
    )


# -- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor_says_that_regions_work() -> None:
    result = _run("doctor")

    assert (result.returncode, result.stderr) == (0, "")
    assert "Regions work here." in result.stdout.splitlines()[-1]
    assert "region" in result.stdout


def test_doctor_as_json() -> None:
    result = _run("doctor", "--json")

    report = json.loads(result.stdout)
    assert (result.returncode, report["works"], report["trial"]["ok"]) == (0, True, True)
    assert report["capabilities"]["kernel"] == os.uname().release
    assert {"Ways in", "What regions need", "Limits"} <= report["findings"].keys()


def test_doctor_needs_neither_numpy_nor_rich_nor_site_packages() -> None:
    bare = f"import sys; sys.path.append({_SOURCE!r}); {_MAIN}"

    result = subprocess.run(
        [sys.executable, "-I", "-S", "-W", "error", "-c", bare, "doctor"],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )

    assert (result.returncode, result.stderr) == (0, "")
    assert "pip install 'userfault[numpy]'" in result.stdout


def test_python_dash_m_is_the_command_line() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "userfault", "--version"],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
        env=_environment(),
    )

    assert (result.returncode, result.stdout) == (0, f"userfault {userfault.__version__}\n")


def test_doctor_without_privilege_names_the_gates() -> None:
    if os.geteuid():
        pytest.skip("needs root, to give its rights up")
    # CAP_DAC_READ_SEARCH is kept, so that the interpreter can be read wherever it is; it opens no gate.
    drop = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    keep = ["--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"]

    result = subprocess.run(
        [*drop, *keep, *_command("doctor")],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
        env=_environment(PYTHONDONTWRITEBYTECODE="1"),
    )

    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0":
        pytest.skip("vm.unprivileged_userfaultfd gives everybody a privileged descriptor")
    assert (result.returncode, result.stderr) == (0, "")
    assert "refused by privilege" in result.stdout
    assert "Regions work here. See what is limited above" in result.stdout


def _without_descriptors() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (8, 8))


def test_doctor_says_no_where_regions_do_not_work() -> None:
    result = subprocess.run(
        _command("doctor"),
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
        env=_environment(),
        preexec_fn=_without_descriptors,
    )

    assert result.returncode == 1
    assert "Regions do not work here: " in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


def test_a_trial_that_hangs_is_ended() -> None:
    trial = try_in_child(timeout_s=0)

    assert not trial.ok
    assert "no answer within 0 seconds" in trial.error


@pytest.mark.parametrize(
    ("status", "out", "err", "said"),
    [
        (-signal.SIGBUS, "", "Fatal Python error: Bus error", "ended by SIGBUS: Fatal Python error: Bus error"),
        (-signal.SIGABRT, "", "", "ended by SIGABRT: it said nothing"),
        (1, "", "Traceback\nImportError: no", "status 1: ImportError: no"),
        (0, "not json", "", "status 0: not json"),
    ],
)
def test_a_trial_that_dies_is_told(status: int, out: str, err: str, said: str) -> None:
    trial = trial_module._judge(status, out, err)

    assert not trial.ok
    assert said in trial.error


def test_a_trial_whose_interpreter_is_gone_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")

    assert "no child could be started" in try_in_child().error


def test_an_attempt_here_is_right() -> None:
    trial = trial_module.attempt()

    assert trial == Trial(ok=True, seconds=trial.seconds, in_system_calls=trial.in_system_calls, error="")


# -- demo ------------------------------------------------------------------------------------------------------------


def test_demo_shows_everything_and_leaves_nothing(tmp_path: Path) -> None:
    result = _run("demo", "--size", _SMALL, "--folder", str(tmp_path))

    assert (result.returncode, result.stderr) == (0, "")
    assert "all 1,000 rows equal, byte for byte" in result.stdout
    assert "killed with SIGKILL" in result.stdout
    assert "workers     2" in result.stdout
    assert "userfault.open_array" in result.stdout
    assert "each character" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_demo_removes_its_temporary_folder(tmp_path: Path) -> None:
    result = _run("demo", "--size", _SMALL, TMPDIR=str(tmp_path))

    assert result.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_demo_keeps_its_file_and_uses_it_again(tmp_path: Path) -> None:
    first = _run("demo", "--size", _SMALL, "--folder", str(tmp_path), "--keep")
    made = (tmp_path / "userfault-demo.npy").stat()

    second = _run("demo", "--size", _SMALL, "--folder", str(tmp_path))

    kept = (tmp_path / "userfault-demo.npy").stat()
    assert (first.returncode, second.returncode) == (0, 0)
    assert "made by an earlier run" in second.stdout
    assert (kept.st_ino, kept.st_mtime_ns) == (made.st_ino, made.st_mtime_ns)


def test_demo_touches_no_file_of_somebody_else(tmp_path: Path) -> None:
    path = tmp_path / "userfault-demo.npy"
    path.write_bytes(b"mine")

    result = _run("demo", "--size", _SMALL, "--folder", str(tmp_path))

    assert result.returncode == 2
    assert "is not the demo's file of this size" in result.stderr
    assert path.read_bytes() == b"mine"


def test_demo_checks_for_room_first(tmp_path: Path) -> None:
    result = _run("demo", "--size", "4EiB", "--folder", str(tmp_path))

    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "free, and the file takes 4 EiB" in result.stderr


def test_demo_says_no_if_a_byte_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show = Show(PlainScreen(sys.stdout), Sample(str(tmp_path / "x.npy"), 2048), keep=False)
    show.sample.make(lambda _: None)
    for i, number in enumerate(show.numbers):
        show.read[i] = sample_module.row(number)
    show.read[17, 3] += 1

    status = show.compare()

    assert status == 1
    assert "1 row of 1000 differ" in capsys.readouterr().out


def test_rows_of_the_sample_follow_from_their_numbers(tmp_path: Path) -> None:
    sample = Sample(str(tmp_path / "x.npy"), 5000)
    sample.make(lambda _: None)

    array = np.load(sample.path)

    assert array.shape == (5000, sample_module.COLUMNS)
    assert all((array[n] == sample_module.row(n)).all() for n in (0, 2047, 2048, 4999))
    assert len(np.unique(array[:, 0])) == 5000


def test_rows_to_touch_are_inside_and_scattered() -> None:
    numbers = choose_rows(2048)

    assert len(numbers) == 1000
    assert (min(numbers) >= 0, max(numbers) < 2048, len(set(numbers)) > 300) == (True, True, True)


def _start(folder: Path, size: str, *words: str) -> subprocess.Popen[str]:
    """Start a demo, and wait until its file is being made."""
    child = subprocess.Popen(
        _command("demo", "--size", size, "--folder", str(folder), *words),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_environment(),
        start_new_session=True,
    )
    deadline = time.monotonic() + _TIMEOUT_S
    while (
        not any(path.stat().st_size for path in folder.iterdir())
        and child.poll() is None
        and time.monotonic() < deadline
    ):
        select.select([], [], [], 0.002)
    return child


@pytest.mark.parametrize(
    ("number", "status", "said"),
    [(signal.SIGINT, 130, "userfault: interrupted\n"), (signal.SIGTERM, 143, ""), (signal.SIGHUP, 129, "")],
)
def test_a_signal_leaves_nothing_behind(number: int, status: int, said: str, tmp_path: Path) -> None:
    child = _start(tmp_path, "1GiB", "--keep")

    child.send_signal(number)
    _, err = child.communicate(timeout=_TIMEOUT_S)

    assert (child.returncode, err) == (status, said)
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_goes_away_leaves_nothing_behind(tmp_path: Path) -> None:
    child = _start(tmp_path, "128MiB")
    assert child.stdout is not None
    assert child.stderr is not None

    child.stdout.close()
    err = child.stderr.read()
    child.wait(_TIMEOUT_S)
    child.stderr.close()

    assert (child.returncode, err) == (141, "")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_for_the_output_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            _command("info", str(path)),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
            env=_environment(),
        )

    assert result.stderr.startswith("userfault info: ")
    assert result.returncode == 2


# -- terminals -------------------------------------------------------------------------------------------------------


def _in_terminal(words: Sequence[str], **changes: str) -> tuple[int, str]:
    """Run a command whose output is a terminal; return its status and everything it wrote there."""
    leader, follower = pty.openpty()
    try:
        child = subprocess.Popen(
            _command(*words),
            stdin=subprocess.DEVNULL,
            stdout=follower,
            stderr=subprocess.PIPE,
            env=_environment(COLUMNS="120", **changes),
        )
    finally:
        os.close(follower)
    parts = []
    try:
        while True:
            parts.append(os.read(leader, 65536))
    except OSError:  # EIO: the last writer is gone
        pass
    finally:
        os.close(leader)
    _, err = child.communicate(timeout=_TIMEOUT_S)
    assert err == b""
    return child.returncode, b"".join(parts).decode()


def test_doctor_in_a_terminal_is_a_table_with_marks() -> None:
    pytest.importorskip("rich")

    status, text = _in_terminal(["doctor"], TERM="xterm-256color")

    assert status == 0
    assert "✓" in text
    assert "\x1b[" in text


def test_demo_in_a_terminal_shows_a_bar(tmp_path: Path) -> None:
    pytest.importorskip("rich")

    status, text = _in_terminal(["demo", "--size", _SMALL, "--folder", str(tmp_path)], TERM="xterm-256color")

    assert status == 0
    assert "making it" in text
    assert "all 1,000 rows equal" in text


def test_a_dumb_terminal_gets_plain_text(tmp_path: Path) -> None:
    status, text = _in_terminal(["demo", "--size", _SMALL, "--folder", str(tmp_path)], TERM="dumb")

    assert status == 0
    assert "\x1b" not in text
    assert "making it [" in text
