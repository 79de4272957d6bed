"""Eviction policies: which block goes when there is no room for another.

A policy sees what costs nothing to know: that a block has come in, and, when it is asked for a victim, whether a block
has been used since that was last asked (`used`, from samples of the application's page tables; where there are none, it
answers no).  It never sees a single access, and it is never called on the way of a fault.

Which is the default was decided on traces (`benchmarks/policy.py`; the figures are in `design/eviction.md`): S3-FIFO,
with its ghosts taken from both of its queues, so that it resists scans and keeps what is popular also where nothing is
known but the faults.

Sources: S3-FIFO: Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023.  CLOCK: Corbató, 1968.
2Q, whose ghosts these are: Johnson and Shasha, VLDB 1994.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Used = Callable[[int], bool]

_PRIME = (1 << 31) - 1


class EvictionPolicy(ABC):
    """Decides which block goes next. Make your own by subclassing; pass an instance as `Region(policy=)`.

    It travels to the pager by pickle, empty, as a store does, so its class must be importable and a fresh instance must
    pickle. One thread at a time calls it. A worker that takes over after another's death begins with a fresh one, to
    which it admits what is in memory. One that raises, or names a block that it was not given, is replaced by `fifo`,
    and standard error says so. Blocks are numbers from 0.
    """

    asks: bool = True
    """Whether `victim` asks what was used; if not, nobody need find out."""

    def resize(self, blocks: int) -> None:  # noqa: B027  # most need not know
        """Take note of how many blocks may be in memory: at first, and when a budget changes."""

    @abstractmethod
    def admit(self, block: int) -> None:
        """Take note that a block has come in; or that a victim could not be dropped, since it is pinned or busy."""

    @abstractmethod
    def victim(self, used: Used) -> int:
        """Choose a block that was admitted, forget that it is in memory, and return it. Called only if there is one.

        `used(block)` says whether it has been used since that was last asked about it.
        """

    @abstractmethod
    def remove(self, block: int) -> None:
        """Forget a block that has gone otherwise; perhaps it never was admitted."""


class FifoPolicy(EvictionPolicy):
    """The oldest goes first. What everybody else does; good for data that is used once."""

    asks = False

    def __init__(self) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()

    def admit(self, block: int) -> None:
        """Put it at the end."""
        self._order[block] = None

    def victim(self, used: Used) -> int:  # it does not matter
        """Take the oldest."""
        return self._order.popitem(last=False)[0]

    def remove(self, block: int) -> None:
        """Forget it."""
        self._order.pop(block, None)


class ClockPolicy(FifoPolicy):
    """The oldest that has not been used since the hand last passed."""

    asks = True

    def victim(self, used: Used) -> int:
        """Take the oldest; one that has been used goes to the end instead, once."""
        for _ in range(len(self._order)):
            block, _ = self._order.popitem(last=False)
            if not used(block):
                return block
            self._order[block] = None
        return super().victim(used)


class RandomPolicy(EvictionPolicy):
    """Any. Of a loop that is a little larger than memory it keeps a part, where others keep nothing.

    Args:
        seed: Of its random numbers.
    """

    asks = False

    def __init__(self, seed: int = 0) -> None:
        self._state = seed % _PRIME or 1
        self._blocks: list[int] = []
        self._places: dict[int, int] = {}

    def admit(self, block: int) -> None:
        """Note it."""
        if block not in self._places:
            self._places[block] = len(self._blocks)
            self._blocks.append(block)

    def victim(self, used: Used) -> int:  # it does not matter
        """Take any."""
        self._state = self._state * 48271 % _PRIME  # Lehmer's generator, which pickles, and needs no module
        block = self._blocks[self._state % len(self._blocks)]
        self.remove(block)
        return block

    def remove(self, block: int) -> None:
        """Forget it: the last one takes its place."""
        place = self._places.pop(block, None)
        if place is None:
            return
        last = self._blocks.pop()
        if last != block:
            self._blocks[place] = last
            self._places[last] = place


class S3FifoPolicy(EvictionPolicy):
    """Scan-resistant: a newcomer has to be used, or to come back, before it is kept for long.

    Newcomers stand in a small queue.  Those that are not used while they pass through it go first, so a scan pushes
    itself out and not what is popular.  Whoever is dropped leaves its name among the ghosts for a while; a block that
    comes in and finds its own name there joins the main queue, and so does one that was used in the small one.

    Args:
        small: The part of memory that the small queue may fill.
        ghosts: How many names are kept, by blocks that memory holds.
    """

    def __init__(self, small: float = 0.1, ghosts: float = 0.5) -> None:
        self._shares = small, ghosts
        self._small: OrderedDict[int, None] = OrderedDict()
        self._main: OrderedDict[int, None] = OrderedDict()
        self._ghosts: OrderedDict[int, None] = OrderedDict()
        self._most_small = self._most_ghosts = 1

    def resize(self, blocks: int) -> None:
        """Divide memory anew."""
        small, ghosts = self._shares
        self._most_small = max(1, int(blocks * small))
        self._most_ghosts = max(1, int(blocks * ghosts))

    def admit(self, block: int) -> None:
        """Take a newcomer into the small queue, one that is missed into the main one."""
        if block in self._ghosts:
            del self._ghosts[block]
            self._main[block] = None
        elif block not in self._main:
            self._small[block] = None

    def victim(self, used: Used) -> int:
        """Take the oldest unused one of the small queue if that is too long, else of the main one."""
        for _ in range(len(self._small) + len(self._main)):
            from_small = len(self._small) >= self._most_small or not self._main
            block, _ = (self._small if from_small else self._main).popitem(last=False)
            if not used(block):
                return self._bury(block)
            self._main[block] = None
        return self._bury((self._small or self._main).popitem(last=False)[0])

    def _bury(self, block: int) -> int:
        self._ghosts[block] = None
        while len(self._ghosts) > self._most_ghosts:
            self._ghosts.popitem(last=False)
        return block

    def remove(self, block: int) -> None:
        """Forget it, also its name."""
        for queue in (self._small, self._main, self._ghosts):
            queue.pop(block, None)


POLICIES: dict[str, type[EvictionPolicy]] = {
    "s3fifo": S3FifoPolicy,
    "clock": ClockPolicy,
    "fifo": FifoPolicy,
    "random": RandomPolicy,
}
DEFAULT = "s3fifo"


def check_policy(policy: object) -> str | EvictionPolicy:
    """Return the policy that a user has passed, a name or an instance; None stands for the default.

    Raises:
        TypeError, ValueError: naming the value and the remedy.
    """
    if policy is None:
        return DEFAULT
    if isinstance(policy, EvictionPolicy):
        return policy
    if not isinstance(policy, str):
        raise TypeError(f"policy must be a name or an EvictionPolicy, not {type(policy).__name__}")
    if policy not in POLICIES:
        names = ", ".join(map(repr, POLICIES))
        raise ValueError(f"policy must be one of {names}, or an EvictionPolicy of your own, got {policy!r}")
    return policy


def make_policy(policy: str | EvictionPolicy) -> EvictionPolicy:
    """Return the policy of a name, or the one that it is."""
    return POLICIES[policy]() if isinstance(policy, str) else policy
