"""The proof of the doctor: a region that is really opened, touched and closed.

It happens in a child, with a time limit, because what may be wrong is exactly what would hang or kill a process.  The
child is this module run as a program; it writes one line of JSON.  Its output goes to files, not pipes: the pager's
processes hold them too, and a reader of a pipe would wait for the last of them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from errno import EFAULT
from typing import IO

TIMEOUT_S = 60.0
"""An overloaded machine needs seconds to start a pager; a machine on which it hangs needs for ever."""
SIZE = 1 << 20
_PAGE = os.sysconf("SC_PAGESIZE")


@dataclass(frozen=True, slots=True)
class Trial:
    """How it went.

    Attributes:
        ok: The region gave the right bytes.
        seconds: From its opening, the start of the pager included, to its end.
        in_system_calls: Whether a fault inside a system call was served too; None: it did not come to that.
        error: What went wrong, on one line.
    """

    ok: bool
    seconds: float = 0.0
    in_system_calls: bool | None = None
    error: str = ""


def attempt() -> Trial:
    """Open a region here, touch it, and close it.

    Raises:
        Error: as `Region` and `Pager`.
    """
    from userfault import MemoryStore, Pager, Region

    data = os.urandom(SIZE)
    started = time.perf_counter()
    with (
        Pager() as pager,
        Region(MemoryStore(data), block_size=_PAGE, pager=pager) as region,
        region.memory as view,
    ):
        right = view[SIZE // 2] == data[SIZE // 2] and bytes(view) == data  # one touch with the GIL held, then all
        region.evict()
        served = _write_from(view[:_PAGE])
    error = "" if right else "the bytes that were read are not those of the store"
    return Trial(right, time.perf_counter() - started, served, error)


def _write_from(view: memoryview) -> bool:
    """Let write(2) fault, and tell whether that was served."""
    reader, writer = os.pipe()
    try:
        return os.write(writer, view) == _PAGE
    except OSError as error:
        if error.errno != EFAULT:
            raise
        return False
    finally:
        view.release()
        os.close(reader)
        os.close(writer)


def try_in_child(timeout_s: float = TIMEOUT_S) -> Trial:
    """Do `attempt` in a child; whatever happens to that, this returns."""
    home = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    code = f"import sys; sys.path[:] = sys.argv[1:]; from {__name__} import main; main()"
    command = [sys.executable, "-I", "-c", code, *filter(None, sys.path), home]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err)  # noqa: S603  # ourselves
        except OSError as error:
            return Trial(ok=False, error=f"no child could be started: {error}")
        try:
            child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return Trial(ok=False, error=f"no answer within {timeout_s:g} seconds: the touch of a page hangs")
        finally:
            child.kill()
            child.wait()
        return _judge(child.returncode, _text(out), _text(err))


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace").strip()


def _judge(status: int, out: str, err: str) -> Trial:
    if status < 0:
        last = err.splitlines()[-1] if err else "it said nothing"
        return Trial(ok=False, error=f"the child was ended by {signal.Signals(-status).name}: {last}")
    try:
        return Trial(**json.loads(out))
    except (ValueError, TypeError):
        last = (err or out or "it said nothing").splitlines()[-1]
        return Trial(ok=False, error=f"the child ended with status {status}: {last}")


def main() -> None:
    """Be the child."""
    try:
        trial = attempt()
    except Exception as error:  # noqa: BLE001  # whatever it is, it is the answer
        trial = Trial(ok=False, error=" ".join(str(error).split()) or type(error).__name__)
    print(json.dumps(asdict(trial)))
