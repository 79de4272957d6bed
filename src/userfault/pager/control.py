"""The worker's other thread: requests of the application, and the lives of those around it.

It waits in one poll for the request socket, the supervisor, the application and its own threads, and wakes twice a
second besides (more often while the fault loop yields, see `placement`): to write the counters down, and to ask the
kernel whether the application's memory still exists, since an exec keeps the process and a forked child may hold the
socket (`ESRCH` from any operation that needs the memory).  Answers go out without waiting; what the socket does not
take stays queued, so that an application that is stopped in a fault with the GIL held never stops its pager.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import select
import socket
import time
from collections import deque

from userfault.blocks.geometry import PAGE_SIZE
from userfault.errors import Error, StoreError
from userfault.pager import evict, failure, faults, wire
from userfault.pager.ending import write_all_back
from userfault.pager.evictor import Evictor
from userfault.pager.exports import FDS_OF_OUTLET, Exports
from userfault.pager.fellow import Fellow
from userfault.pager.placement import WATCH_NS
from userfault.pager.pool import pool_of
from userfault.pager.requests import Request
from userfault.pager.served import Served
from userfault.pager.wire import Message
from userfault.shield import begin
from userfault.stores.descriptors import limit_open_files

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from userfault.kernel.userfaultfd import Userfaultfd
    from userfault.pager.faults import FaultLoop
    from userfault.pager.spawn import Will
    from userfault.pager.writeback import WriteBack

TICK_MS = 500
GONE = errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.EBADF
SPARE = 32
"""Descriptors that are neither regions nor files of stores: sockets, pidfds, a glance into /proc."""


class Control:
    """Answers requests until the application is gone. `run` is called by one thread; `post` by any."""

    def __init__(self, will: Will, uffd: Userfaultfd, loop: FaultLoop) -> None:
        self.will = will
        self.uffd = uffd
        self.loop = loop
        loop.on_filled = self.progress
        self.regions: dict[int, Served] = {}
        self.evictor = Evictor(will["pid"], self.post)
        self.control = socket.socket(fileno=will["control"])
        self._opening: dict[int, bool] = {}
        """Regions whose store is being made, in a thread; False once they are not wanted any more."""
        self._made: deque[tuple[Message, Served | StoreError]] = deque()
        self._later: deque[Message] = deque()
        """Regions to be closed, now that their changes are written back."""
        self._requests: dict[int, list[Request]] = {}
        self._outbox: deque[Message] = deque()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.poll()
        self.fellow = Fellow(will, self._poll, self._holdings)
        self.exports = Exports(will["pid"], self.fellow.tell, self.progress)
        self._progress = self._told = False
        self._listening = True
        self._waits_for_room = False
        """Whether the application has to read before more can be sent."""
        self._over = False
        self._verbs: dict[int, Callable[[Message], None]] = {
            wire.OPEN: self._open,
            wire.CLOSE: self._close,
            wire.ENSURE: self._ensure,
            wire.RETRY: self._ensure,
            wire.EVICT: self._evict,
            wire.SYNC: self._sync,
            wire.BYE: self._bye,
            wire.EXPORT: self._export,
            wire.RENEW: self._renew,
            wire.FLUSH: self._flush,
            wire.BUDGET: self._budget,
            wire.ADVISE: self._advise,
            wire.UNMAPPED: self._unmapped,
        }

    # -- the loop --------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Listen until the application is gone, then end the process's work."""
        for fd in (self._bell, self.will["application"], self.control.fileno()):
            self._poll.register(fd, select.POLLIN)
        tick = 0
        while not self._over:
            ready = dict(self._poll.poll(self._patience()))
            now = time.perf_counter_ns()
            self.fellow.beat()
            self._look(ready)  # first: what is done below may open descriptors of the same numbers
            with contextlib.suppress(OSError):  # no descriptor to be had for /proc, say: no reason to die
                self.loop.placement.watch(now)
                if now >= tick:
                    tick = now + TICK_MS * 1_000_000
                    self._tick()
            self._send()
        write_all_back(self.regions.values(), self.fellow)
        self.fellow.tell(Message(wire.GOODBYE))

    def _patience(self) -> int:
        """Milliseconds until there is something to do, even if nobody says anything."""
        if self._outbox and not self._waits_for_room:
            return 5
        return WATCH_NS // 1_000_000 if self.loop.placement.yielding else TICK_MS

    def _look(self, ready: dict[int, int]) -> None:
        if self._bell in ready:
            with contextlib.suppress(OSError):
                os.eventfd_read(self._bell)
        if self._progress and not self._told:
            self._told = True
            self.fellow.tell(Message(wire.PROGRESS))
        while self._made:
            self._take_on(*self._made.popleft())
        while self._later:
            self._close(self._later.popleft())
        if self.fellow.look(ready):
            self.post(Message(wire.HELLO, a=os.getpid(), b=self.fellow.pid))
        if self.will["application"] in ready:
            self._over = True
        events = ready.get(self.control.fileno(), 0)
        if events & (select.POLLIN | select.POLLHUP):
            self._hear_application()

    def _tick(self) -> None:
        self.fellow.tick()
        self._watch_loop()
        for region in list(self.regions.values()):
            region.publish(self.loop.placement.cpu)
            region.tick(time.perf_counter_ns())
        done, error = self.uffd.zeropage(
            1 << 16, PAGE_SIZE
        )  # nothing is registered there: ENOENT from a living process
        if not done and error == errno.ESRCH:
            self._over = True

    def _watch_loop(self) -> None:
        """Fail the block that the fault loop is being kept waiting for, and begin anew: nobody can end a read."""
        reading = self.loop.reading
        since, region, block = reading or (0, None, 0)
        limit = region.source.retries.timeout_ns if region else 0
        late = limit and time.perf_counter_ns() - since > limit
        if region and late and not region.closing and self.loop.reading is reading:
            offset, length = region.geometry.span(block)
            cause = f"timeout of {limit / 1e9:g} s, in the fault loop"
            error = StoreError("the read did not return in time", cause=cause)
            region.fail(block, failure.describe(error, region.source.name, offset, length, 1))
            region.publish(self.loop.placement.cpu)
            self._send()
            os._exit(1)

    def progress(self) -> None:
        """Something has been achieved: this worker's death will not count against it. Called by any thread."""
        if not self._progress:
            self._progress = True
            self._ring()  # the socket is the control thread's, and may be changing

    def _ring(self) -> None:
        with contextlib.suppress(OSError):  # the loop looks twice a second anyway
            os.eventfd_write(self._bell, 1)

    def post(self, message: Message) -> None:
        """Send a message to the application, some time soon."""
        self._outbox.append(message)
        self._ring()

    def _send(self) -> None:
        self._waits_for_room = False
        try:
            while self._outbox:
                wire.send(self.control, self._outbox[0], socket.MSG_DONTWAIT)
                self._outbox.popleft()
            wanted = select.POLLIN
        except BlockingIOError:
            wanted = select.POLLIN | select.POLLOUT
            self._waits_for_room = True
        except OSError as error:
            if error.errno in GONE:  # the application closed its end; it may still live, and fault
                self._outbox.clear()
            return  # else no memory for a packet, for the moment: the next turn of the loop tries again
        if self._listening:
            self._poll.modify(self.control.fileno(), wanted)

    def _holdings(self) -> tuple[list[tuple[int, int]], list[tuple[int, tuple[int, ...]]]]:
        """Return what a new supervisor has to know of: the numbers and the descriptors of regions, and of exports."""
        return [(region.id, region.fd) for region in self.regions.values()], self.exports.descriptors()

    # -- the application -------------------------------------------------------------------------------------

    def _hear_application(self) -> None:
        try:
            message = wire.receive(self.control, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        if message is None:  # closed, or exec: the tick finds out which
            self._poll.unregister(self.control)
            self._listening = False
            self._tick()
            wanted = self.regions or self._opening or len(self.exports)
            self._over = self._over or not wanted  # then nobody will ever need us
            return
        try:
            self._verbs[message.kind](message)
        except Exception as error:  # noqa: BLE001  # one bad request must not end the pager
            self._refuse(message, error)

    def _refuse(self, message: Message, error: BaseException) -> None:
        if not isinstance(error, Error):
            error = StoreError("the pager failed", cause=str(failure.plain(error).cause))
        self.post(Message(wire.FAILED, message.id, text=failure.encode(error)))

    def _open(self, message: Message) -> None:
        """Begin to take a region on. Its store is made in a thread, since that may take its time."""
        if not message.fds:
            raise OSError(errno.EMFILE, "the pager has no descriptor left for another region; see `ulimit -n`")
        if message.region in self.regions or message.region in self._opening:  # sent again to a new worker
            os.close(message.fds[0])
            if message.region in self.regions:
                self.post(Message(wire.OK, message.id))
            return
        try:
            begin(lambda: self._make(message))
        except RuntimeError:  # no more threads to be had
            os.close(message.fds[0])
            raise
        self._opening[message.region] = True

    def _make(self, message: Message) -> None:
        result: Served | StoreError
        try:
            result = Served(message.fds[0], self.uffd)
        except BaseException as error:  # noqa: BLE001  # whatever a store's class may do when it is made
            result = failure.plain(error)
        self._made.append((message, result))
        self._ring()

    def _take_on(self, message: Message, made: Served | StoreError) -> None:
        """Serve a region whose store has been made, unless it was closed meanwhile."""
        wanted = self._opening.pop(message.region)
        if isinstance(made, StoreError) or not wanted:
            if isinstance(made, Served):
                made.close((faults.FAULT,))
            os.close(message.fds[0])
            self._refuse(message, made if isinstance(made, StoreError) else StoreError("the region was closed"))
            return
        self.adopt(made)  # before the supervisor hears of it: one that starts meanwhile gets it by will
        self.fellow.tell(Message(wire.KEEP, region=made.id, fds=(made.fd,)))
        self.post(Message(wire.OK, message.id))

    def adopt(self, region: Served) -> None:
        """Serve a region from now on."""
        region.on_settled = self.progress
        region.on_news = lambda kind, error: self.post(Message(kind, region=region.id, text=error))
        self.regions[region.id] = region
        self._share_descriptors()
        self.evictor.serve(region)
        self.loop.add(region)

    def _share_descriptors(self) -> None:
        """Leave to the files of stores what regions and exports do not need."""
        taken = len(self.regions) + FDS_OF_OUTLET * len(self.exports)
        limit_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0] - taken - SPARE)

    def _close(self, message: Message) -> None:
        if message.region in self._opening:
            self._opening[message.region] = False
        region = self.regions.get(message.region)
        if region is not None and region.writeback and not message.flags & wire.WRITTEN:
            self._write_back_and_close(region.writeback, message)
            return
        if region is not None:
            del self.regions[region.id]
            self.loop.remove(region)
            self.fellow.tell(Message(wire.DROP, region=region.id))  # a successor must never serve it again
            region.close((faults.FAULT,))
            region.room.leave()
            for request in list(self._requests.pop(region.id, [])):
                request.abandon(failure.encode(StoreError("the region was closed meanwhile")))
            os.close(region.fd)
        elif message.region in self.exports:
            self.exports.close(message.region)
        self.post(Message(wire.OK, message.id))

    def _write_back_and_close(self, writeback: WriteBack, message: Message) -> None:
        """Close a region when its changes are written back; if they cannot be, it stays, unless that was not asked."""

        def done(error: bytes | None) -> None:
            if error is not None and not message.flags & wire.FORCE:
                self.post(Message(wire.FAILED, message.id, text=error))
                return
            if error is not None:
                failure.report(f"{failure.decode(error)}; changes are lost, since nobody holds the region any more")
            message.flags |= wire.WRITTEN
            self._later.append(message)
            self._ring()

        writeback.flush(done)

    def _export(self, message: Message) -> None:
        self.exports.open(message)
        self._share_descriptors()
        self.post(Message(wire.OK, message.id))

    def _renew(self, message: Message) -> None:
        self.exports.renew(message.region, message.id)
        self.post(Message(wire.OK, message.id))

    def _region(self, message: Message) -> Served:
        region = self.regions.get(message.region)
        if region is None:
            raise StoreError("the region was closed meanwhile")
        return region

    def _ensure(self, message: Message) -> None:
        region = self._region(message)
        if message.a == message.b:
            self.post(Message(wire.OK, message.id))
            return

        def done(request: Request) -> None:
            open_requests.remove(request)
            if request.error is None:
                self.progress()
            if message.flags & wire.NO_ANSWER:
                return
            kind = wire.FAILED if request.error else wire.OK
            self.post(Message(kind, message.id, text=request.error or b""))

        write, retry = bool(message.flags & wire.WRITE), message.kind == wire.RETRY
        urgent = not message.flags & wire.NO_ANSWER
        request = Request(pool_of(region), message.a, message.b, done, write=write, retry=retry, urgent=urgent)
        open_requests = self._requests.setdefault(region.id, [])
        open_requests.append(request)
        request.pool.wants(request)

    def _evict(self, message: Message) -> None:
        region = self._region(message)

        def drop(_: bytes | None = None) -> None:
            dropped = evict.drop_range(region, message.a, message.b)
            self.post(Message(wire.OK, message.id, a=dropped))

        if region.writeback and region.writeback.dirty:
            region.writeback.flush(drop, durable=False)
        else:
            drop()

    def _flush(self, message: Message) -> None:
        region = self._region(message)

        def done(error: bytes | None) -> None:
            self.post(Message(wire.FAILED if error else wire.OK, message.id, text=error or b""))

        if region.writeback:
            region.writeback.flush(done)
        else:
            done(None)

    def _budget(self, message: Message) -> None:
        """A budget has changed: a region's, or the pager's, which is that of all."""
        for region in [self._region(message)] if message.region else list(self.regions.values()):
            self.evictor.serve(region)
        self.post(Message(wire.OK, message.id))

    def _advise(self, message: Message) -> None:
        residents = self._region(message).residents
        with residents.lock:
            residents.advise(message.a, message.b, sequential=bool(message.flags & wire.SEQUENTIAL))
        self.post(Message(wire.OK, message.id))

    def _unmapped(self, message: Message) -> None:
        region = self.regions.get(message.region)
        if region is not None and region.uses is not None:
            region.uses.unmapped()

    def _sync(self, message: Message) -> None:
        self._region(message).publish(self.loop.placement.cpu)
        self.post(Message(wire.OK, message.id))

    def _bye(self, message: Message) -> None:
        self.post(Message(wire.OK, message.id))
        self._send()
        self._over = True
