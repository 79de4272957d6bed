"""Who holds the memory of a region: leases, and the regions that several arrays of this process share.

An array that `open_array` has made has a region of its own.  Arrays that are opened from recipes share one where they
can, or a thousand slices that travel to a process would open a thousand regions there.  Each of them is closed by
itself all the same; the region ends with the last.
"""

from __future__ import annotations

import os
from threading import RLock
from weakref import WeakSet

import numpy as np

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from userfault.region import Region


class Lease:
    """Held by an array and each of its slices; the count of its references is the count of them."""

    __slots__ = ("__weakref__", "region", "root", "tenants")

    def __init__(self, region: Region, tenants: WeakSet[Lease] | None = None) -> None:
        self.region = region
        self.root: np.ndarray[Any, Any] = np.frombuffer(region.memory, dtype=np.uint8)
        """A hidden plain array over all of the memory, the base of every other."""
        self.tenants: WeakSet[Lease] = WeakSet() if tenants is None else tenants
        """Every lease of the region, this one too."""
        self.tenants.add(self)


class Shared:
    """The regions that recipes have opened for reading, by what was opened. Any thread may call it."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Know of no region; in a forked child: its parent's are not there, and the lock may be held for ever."""
        self.lock = RLock()  # a finalizer may close an array while this thread holds it
        self._tenants: dict[bytes, WeakSet[Lease]] = {}

    def lease(self, key: bytes, open_region: Callable[[], Region]) -> Lease:
        """Return a lease of the region that `key` stands for, opened if nobody here has it."""
        with self.lock:
            lease = self._find(key)
        if lease is None:
            region = open_region()  # without our lock, since it takes time, and locks of its own
            with self.lock:
                lease = self._find(key)
                if lease is None:
                    lease = Lease(region)
                    self._tenants = {key: leases for key, leases in self._tenants.items() if leases}
                    self._tenants[key] = lease.tenants
                    return lease
            region.revoke()  # another thread was quicker
        return lease

    def _find(self, key: bytes) -> Lease | None:
        for lease in self._tenants.get(key, ()):
            if not (lease.region.closed or lease.region.pager.closed):
                return Lease(lease.region, lease.tenants)
        return None


shared = Shared()
os.register_at_fork(after_in_child=shared.begin)
