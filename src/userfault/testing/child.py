"""Running what may hang or crash in a process of its own.

The child is a fresh interpreter with the parent's ``sys.path``. It has a watchdog that needs neither the GIL
nor a signal handler of Python: when the time is up it prints the stack of every thread and ends the process,
even one that sleeps in a page fault for ever. A second clock in the parent kills what even that cannot end.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["ChildError", "ChildResult", "ChildTimeoutError", "run_child"]

_GRACE_S = 10.0
_TIMEOUT_MARK = "Timeout ("  # what faulthandler's watchdog prints first


@dataclass(frozen=True, slots=True)
class ChildResult:
    """How a child ended.

    Attributes:
        status: Its exit status, or the negative number of the signal that ended it.
        stdout: What it printed.
        stderr: What it complained about; stacks, if it crashed.
        value: What the function returned; ``None`` if it did not get that far.
    """

    status: int
    stdout: str
    stderr: str
    value: Any = None

    @property
    def signal(self) -> signal.Signals | None:
        """The signal that ended it, if one did."""
        return signal.Signals(-self.status) if self.status < 0 else None

    def check(self) -> ChildResult:
        """Return itself if the child ended well.

        Raises:
            ChildError: It did not.
        """
        if self.status:
            raise ChildError("the child failed", self)
        return self


class ChildError(AssertionError):
    """A child did not end as it should; ``result`` says how it did, and the message shows its output."""

    def __init__(self, message: str, result: ChildResult) -> None:
        super().__init__(message, result)
        self.result = result

    def __str__(self) -> str:
        result = self.result
        how = f"signal {result.signal.name}" if result.signal else f"status {result.status}"
        parts = [f"{self.args[0]} ({how})"]
        outputs = {"stdout": result.stdout, "stderr": result.stderr}
        parts += [f"-- its {name} --\n{text}" for name, text in outputs.items() if text]
        return "\n".join(parts)


class ChildTimeoutError(ChildError):
    """A child took too long; its stderr has the stack of every thread."""


def run_child(
    task: str | Callable[..., Any], *args: Any, timeout: float = 30.0, env: Mapping[str, str] | None = None
) -> ChildResult:
    """Run source code, or a function, in a fresh interpreter, and wait for its end.

    Args:
        task: Python source, which finds the arguments under the name ``args``; or a function of a module,
            which gets them. The module is imported by name, or loaded from its file where that is not
            possible (as with tests).
        *args: Anything that can be pickled.
        timeout: Seconds until the child prints all stacks and is ended.
        env: Environment variables to add.

    Returns:
        How it ended, whatever that was; ``.check()`` insists on success.

    Raises:
        ChildTimeoutError: It took longer than ``timeout``.
        ValueError: The function is not found by its name in its module.
    """
    payload = _payload(task, args, timeout)
    with tempfile.TemporaryFile() as job, tempfile.TemporaryFile() as answer:
        job.write(payload)
        job.seek(0)
        # Files, not pipes: whatever the child leaves running may keep them open without keeping us here.
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            status = _run(job, answer, out, err, timeout, {**os.environ, **(env or {})})
            stdout, stderr = _text(out), _text(err)
        answer.seek(0)
        value = _value(answer.read())
    result = ChildResult(status, stdout, stderr, value)
    if (status == -signal.SIGKILL and stderr.endswith(_KILLED)) or (status == 1 and _TIMEOUT_MARK in stderr):
        raise ChildTimeoutError(f"the child took longer than {timeout:g} seconds", result)
    return result


_KILLED = "\nkilled: not even its watchdog could end it\n"


def _run(
    job: IO[bytes], answer: IO[bytes], out: IO[bytes], err: IO[bytes], timeout: float, env: Mapping[str, str]
) -> int:
    command = [sys.executable, "-c", _BOOT, str(job.fileno()), str(answer.fileno())]
    descriptors = (job.fileno(), answer.fileno())
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=err,
        pass_fds=descriptors,
        env=env,
        start_new_session=True,
    ) as process:
        try:
            if _ends_within(process.pid, timeout + _GRACE_S):
                return process.wait()
            os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
            err.seek(0, os.SEEK_END)
            err.write(_KILLED.encode())
            return status
        except BaseException:  # Ctrl-C reaches us only: it has a session of its own
            os.killpg(process.pid, signal.SIGKILL)
            raise


def _ends_within(pid: int, seconds: float) -> bool:
    """Wait for a process without polling, as ``Popen.wait`` with a timeout does."""
    fd = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))
    finally:
        os.close(fd)


def _payload(task: str | Callable[..., Any], args: tuple[Any, ...], timeout: float) -> bytes:
    """Pickle the job in two layers: the arguments can be read only when path and module are there."""
    function = None
    if not isinstance(task, str):
        module = sys.modules[task.__module__]
        if "<" in task.__qualname__ or not hasattr(module, task.__qualname__.partition(".")[0]):
            raise ValueError(f"{task.__qualname__} is not in {module.__name__}: define it at module level")
        function = module.__name__, getattr(module, "__file__", None), task.__qualname__
    job = {
        "path": sys.path,
        "timeout": timeout,
        "source": task if function is None else None,
        "function": function,
        "args": pickle.dumps(args, 5),
    }
    return pickle.dumps(job, 5)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")


def _value(data: bytes) -> Any:
    return pickle.loads(data) if data else None


_BOOT = """
import faulthandler, os, pickle, resource, sys
with os.fdopen(int(sys.argv[1]), "rb") as file:
    job = pickle.load(file)
answer = int(sys.argv[2])
os.set_inheritable(answer, False)
faulthandler.enable()
faulthandler.dump_traceback_later(job["timeout"], exit=True)
resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
sys.path[:] = job["path"]

def load(name, path):
    import importlib, importlib.util
    try:
        module = importlib.import_module(name)
        if getattr(module, "__file__", None) == path:
            return module
    except ImportError:
        pass
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

if job["function"] is None:
    args = pickle.loads(job["args"])
    sys.argv = ["<child>", *map(str, args)]
    exec(compile(job["source"], "<child>", "exec"), {"__name__": "__main__", "args": args})
else:
    name, path, qualname = job["function"]
    function = load(name, path)
    for part in qualname.split("."):
        function = getattr(function, part)
    value = function(*pickle.loads(job["args"]))
    if value is not None:
        with os.fdopen(answer, "wb") as file:
            pickle.dump(value, file, 5)
"""
