"""What the tests of arrays in several processes run in processes of their own; importable under every start method."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any

import numpy as np

import userfault
from userfault.arrays.lease import shared

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS = np.arange(60_000.0).reshape(60, 1000)


def look(array: np.ndarray) -> tuple[str, bool]:
    """Say what has arrived: its type, and whether its bytes are those of ROWS."""
    first = int(array[0, 0] // 1000)
    return type(array).__name__, np.array_equal(array, ROWS[first : first + len(array)])


def look_at_many(arrays: list[Any]) -> tuple[bool, int]:
    """Look at arrays that are alive together; say whether all are right, and how many regions they have."""
    return all(look(array) == ("PagedArray", True) for array in arrays), len({id(array.region) for array in arrays})


def regions() -> int:
    return userfault.default_pager().regions


def pass_on(array: np.ndarray) -> np.ndarray:
    return array[1:]


def child(array: userfault.PagedArray, pipe: Any) -> None:
    """Open the array of an argument: it may be one that was inherited, whose memory is not here, or one that came."""
    mine = array.recipe().open()
    pipe.send((look(mine), regions(), mine[2:]))
    pipe.close()


# -- multiprocessing and executors ----------------------------------------------------------------------------------


def pool(path: str, method: str) -> dict[str, Any]:
    array = userfault.open_array(path)
    with multiprocessing.get_context(method).Pool(2) as processes:
        each = processes.map(look, [array[n : n + 3] for n in range(0, 60, 3)])
        many = processes.apply(look_at_many, ([array[n % 60 :] for n in range(1000)],))
        back = processes.map(pass_on, [array[5:], array[20:]])
    return {"each": set(each), "many": many, "back": [look(part) for part in back], "faults": faults(array)}


def faults(array: userfault.PagedArray) -> int:
    return array.region.stats().faults


def argument(path: str, method: str) -> tuple[Any, ...]:
    context: Any = multiprocessing.get_context(method)
    array = userfault.open_array(path)
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(array[10:20], theirs))
    process.start()
    theirs.close()
    seen, held, part = ours.recv()
    process.join()
    assert process.exitcode == 0
    return seen, held, look(part)


def queue(path: str, method: str) -> list[Any]:
    context: Any = multiprocessing.get_context(method)
    array = userfault.open_array(path)
    there, back = context.Queue(), context.Queue()
    process = context.Process(target=serve, args=(there, back))
    process.start()
    for n in range(20):
        there.put(array[n:])
    there.put(None)
    seen = [back.get() for _ in range(20)]
    process.join()
    assert process.exitcode == 0
    return seen


def serve(there: Any, back: Any) -> None:
    while (array := there.get()) is not None:
        back.put(look(array))


def executor(path: str, method: str) -> tuple[Any, Any]:
    array = userfault.open_array(path)
    with ProcessPoolExecutor(2, multiprocessing.get_context(method)) as processes:
        seen = set(processes.map(look, [array[n : n + 3] for n in range(0, 60, 3)]))
        return seen, look(processes.submit(pass_on, array[5:]).result())


def changed(path: str, method: str) -> tuple[Any, ...]:
    """Mode c: what is as in the store travels by recipe, and what is not by value; each process has its own."""
    array = userfault.open_array(path, "c")
    with multiprocessing.get_context(method).Pool(1) as processes:
        before = processes.apply(change, (array[:5],))
        untouched = bool(np.array_equal(array, ROWS))
        array[3, 3] = -1
        after = processes.apply(change, (array[:5],))
    return before, untouched, after, float(array[3, 3])


def change(array: np.ndarray) -> tuple[str, float, float]:
    was = float(array[3, 3])
    array[3, 3] = 77
    return type(array).__name__, was, float(array[3, 3])


# -- loaders --------------------------------------------------------------------------------------------------------


class Rows:
    """A data set as loaders like it: it may be used here first, be forked, or be pickled."""

    def __init__(self, array: userfault.PagedArray) -> None:
        self.recipe = array.recipe()
        self.length = len(array)
        self.pid = 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> np.ndarray:
        if self.pid != os.getpid():
            self.array, self.pid = self.recipe.open(), os.getpid()
        row: np.ndarray = self.array[index].copy()
        return row


def load(path: str, method: str) -> tuple[bool, int]:
    """Load batches in workers, as torch's DataLoader does; say whether all are right, and the regions of a worker."""
    context: Any = multiprocessing.get_context(method)
    rows = Rows(userfault.open_array(path, budget="1MiB"))
    assert np.array_equal(rows[7], ROWS[7])
    indices, batches = context.Queue(), context.Queue()
    workers = [context.Process(target=load_batches, args=(rows, indices, batches)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for start in range(0, 60, 5):
        indices.put(list(range(start, start + 5)))
    for _ in workers:
        indices.put(None)
    right, most = True, 0
    for _ in range(12):
        wanted, batch, held = batches.get()
        right, most = right and np.array_equal(batch, ROWS[wanted]), max(most, held)
    for worker in workers:
        worker.join()
    return right and not any(worker.exitcode for worker in workers), most


def load_batches(rows: Rows, indices: Any, batches: Any) -> None:
    while (wanted := indices.get()) is not None:
        batches.put((wanted, np.stack([rows[index] for index in wanted]), regions()))


# -- fork -----------------------------------------------------------------------------------------------------------


def in_child(action: Callable[[], Any]) -> Any:
    """Return what a forked child makes of it: its value, or its error as text."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reader)
        try:
            try:
                answer = action()
            except Exception as error:  # noqa: BLE001  # its text is the answer
                answer = f"{type(error).__name__}: {error}"
            with os.fdopen(writer, "wb") as file:
                file.write(ForkingPickler.dumps(answer))
        except BaseException:  # noqa: BLE001  # the child must not go on as its parent
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        data = file.read()
    assert os.waitpid(pid, 0)[1] == 0
    return pickle.loads(data)


def close_all(*arrays: userfault.PagedArray) -> list[int]:
    for array in arrays:
        array.close()
    return [array.size for array in arrays]


def forked(path: str) -> dict[str, Any]:
    """Use inherited arrays and regions in a child, without a touch of their memory."""
    array, private = userfault.open_array(path), userfault.open_array(path, "c")
    shared_with_us = array.recipe().open()
    memory = userfault.open_array(userfault.MemoryStore(b"abc" * 100_000))
    region = array.region

    def open_region() -> bytes:
        with pickle.loads(pickle.dumps(region)) as mine:
            return bytes(mine.memory[:8])

    return {
        "recipe": in_child(lambda: look(array[5:9].recipe().open())),
        "shared": in_child(lambda: look(shared_with_us[5:9].recipe().open())),
        "sent": look(in_child(lambda: array[5:9])),
        "memory": bytes(in_child(lambda: memory[1:5])),
        "region": in_child(open_region),
        "region sent": in_child(lambda: region).size == region.size,
        "private": in_child(private.recipe),
        "private sent": in_child(lambda: ForkingPickler.dumps(private)),
        "private region": in_child(lambda: pickle.dumps(private.region)),
        "closing": in_child(lambda: close_all(array, private, shared_with_us, memory)),
        "parent": [look(each) for each in (array, private, shared_with_us)],
    }


def fork_while_shared(path: str) -> Any:
    """Fork while another thread is just opening a recipe: the child has a lock and a table of its own."""
    recipe = userfault.open_array(path).recipe()
    held = recipe.open()
    entered, over = threading.Event(), threading.Event()

    def hold() -> None:
        with shared.lock:
            entered.set()
            over.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait()
    seen = in_child(lambda: (look(recipe.open()), held.region is not recipe.open().region))
    over.set()
    thread.join()
    return seen


def forks_and_threads(path: str) -> list[Any]:
    """Fork again and again while threads open and close arrays of one recipe."""
    recipe = userfault.open_array(path).recipe()
    over = threading.Event()

    def open_and_close() -> None:
        while not over.is_set():
            with recipe.open() as array:
                assert look(array) == ("PagedArray", True)

    threads = [threading.Thread(target=open_and_close) for _ in range(3)]
    for thread in threads:
        thread.start()
    seen = [in_child(lambda: look(recipe.open())) for _ in range(10)]
    over.set()
    for thread in threads:
        thread.join()
    return seen


# -- pagers that go -------------------------------------------------------------------------------------------------


def open_after_a_loss(path: str) -> tuple[bool, bool]:
    """Lose the pager beneath a shared region; a recipe is then opened on another."""
    recipe = userfault.open_array(path).recipe()
    old = recipe.open()
    pager = old.region.pager
    while not pager.closed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pager.worker_pid, signal.SIGKILL)
        time.sleep(0.001)
    new = recipe.open()
    return new.region is not old.region, look(new)[1]
