"""An array whose bytes lie in a database, a piece to each row of a table.

The store shows the rule for all of them: its constructor keeps what pickles (a path, a size), and the connection is
made where it is used, at the first read, one for each thread.

    python sqlite_store.py
"""

from __future__ import annotations

import sqlite3
import tempfile
import threading
from contextlib import closing
from pathlib import Path

import numpy as np

import userfault
from userfault.stores import Store

PIECE = 1 << 16


class SqliteStore(Store):
    """The pieces of `pieces(number INTEGER PRIMARY KEY, data BLOB)`, one after the other."""

    def __init__(self, path: str) -> None:
        self.path = path
        with closing(sqlite3.connect(path)) as database:
            (self.size,) = database.execute("SELECT sum(length(data)) FROM pieces").fetchone()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Put together what is asked for from the pieces that it touches."""
        first, last = offset // PIECE, (offset + len(buffer) - 1) // PIECE
        query = "SELECT data FROM pieces WHERE number BETWEEN ? AND ? ORDER BY number"
        data = b"".join(row[0] for row in self._database().execute(query, (first, last)))
        start = offset - first * PIECE
        buffer[:] = data[start : start + len(buffer)]  # raises if the pieces were too short

    def _database(self) -> sqlite3.Connection:
        local = _connections.__dict__
        if self.path not in local:
            local[self.path] = sqlite3.connect(f"file:{self.path}?mode=ro", uri=True)
        connection: sqlite3.Connection = local[self.path]
        return connection

    def describe(self) -> str:
        """Return a name for messages."""
        return f"SqliteStore({self.path!r})"


_connections = threading.local()


def fill(path: str, data: bytes) -> None:
    """Make such a database."""
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE pieces (number INTEGER PRIMARY KEY, data BLOB)")
        pieces = ((at // PIECE, data[at : at + PIECE]) for at in range(0, len(data), PIECE))
        database.executemany("INSERT INTO pieces VALUES (?, ?)", pieces)


def main() -> None:
    """Fill a database, and read from it as from an array."""
    numbers = np.arange(1_000_000, dtype=np.int64)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "pieces.sqlite")
        fill(path, numbers.tobytes())
        with userfault.open_array(SqliteStore(path), dtype=np.int64) as array:
            print(array[765_432], array[::250_000].tolist())
            print(f"{array.region.stats().blocks_filled} blocks came out of the database")


if __name__ == "__main__":
    # Under its own name, not as __main__: the pager imports the class from there.
    from sqlite_store import main as run

    run()
