"""Seeing whether other threads of Python get to run."""

from __future__ import annotations

import threading
import time

__all__ = ["Ticker"]


class Ticker:
    """A thread that ticks as fast as it is let, and notes the longest time during which it was not."""

    def __init__(self) -> None:
        self._count, self._longest, self._last, self._stop = 0, 0.0, 0.0, False
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop:
            now = time.monotonic()
            self._longest, self._last = max(self._longest, now - self._last), now
            self._count += 1
            time.sleep(0)

    def _wait_for_ticks(self) -> None:
        """Let it tick; twice, as one tick may have been half done."""
        seen = self._count
        while self._count < seen + 2:
            time.sleep(0.0001)

    def start_over(self) -> float:
        """Forget the pauses so far, and return the time."""
        self._wait_for_ticks()
        self._longest = 0.0
        return time.monotonic()

    def longest_pause(self) -> float:
        """Return the longest pause since then, the one that ends now included."""
        self._wait_for_ticks()
        return self._longest

    def __enter__(self) -> None:
        self._last = time.monotonic()
        self._thread.start()

    def __exit__(self, *exc: object) -> None:
        self._stop = True
        self._thread.join()
