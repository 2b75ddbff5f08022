"""Serving one virtqueue: pop, answer, set aside what must wait, and run it again.

`RingLoop` waits for kicks and for the supervisor's messages. `RingServer` serves a ring that was
started. A request whose answer is not there yet is set aside by its head index alone: its chain
stays popped (and in the inflight record), other requests go on, and when the resolver has done its
work the chain is walked again from guest memory and runs as if it had just arrived. Heads recovered
after a worker's death run the same way.
"""

import errno
import logging
import os
import select
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Final

from appliance.engine import GuestMap, MappedRegion, Ring, RingLayout, signal_fd
from appliance.errors import ApplianceError, RingError
from appliance.fs.handler import Handler
from appliance.fuse_proto.dispatch import Dispatcher
from appliance.fuse_proto.operations import NotReady
from appliance.protos import control_pb2 as pb
from appliance.session import channel
from appliance.session.session_memory import InflightMemory
from appliance.session.wants import BlobWanted, Want
from appliance.worker import ring_delivery
from appliance.worker.pending import Asking, Parking
from appliance.worker.plain_answers import PlainAnswers

_LOG = logging.getLogger(__name__)

# Requests served between two looks at the control channel.
BATCH: Final = 32
# How long a ring that must stop waits for the resolver before requests that wait get EIO.
_DRAIN_DEADLINE_S = 10.0
_EVENTFD_BYTES = 8


class RingLoop:
    """The loop of a worker that serves a virtqueue; it owns every descriptor that it is sent."""

    def __init__(
        self,
        sock: socket.socket,
        queue: int,
        dispatcher: Dispatcher,
        handler: Handler,
        plain: PlainAnswers | None = None,
    ) -> None:
        self._sock = sock
        self._queue = queue
        self._dispatcher = dispatcher
        self._handler = handler
        self._plain = plain
        self._memory = GuestMap()
        self._regions: list[MappedRegion] = []
        self._incoming: list[tuple[MappedRegion, int]] = []
        self._server: RingServer | None = None
        self._ring_fds: dict[str, int] = {}
        self._stop_id: int | None = None
        self._stop_deadline_s = 0.0
        self._last_avail = 0
        self._asking = Asking(sock)
        self._poller = select.epoll()
        self._poller.register(sock, select.EPOLLIN)

    def run(self) -> None:
        """Serve until the supervisor closes the channel."""
        is_busy = False
        while True:
            is_busy = self._serve_plain(is_busy=is_busy)
            for fd, _event in self._poller.poll(self._timeout_s(is_busy=is_busy)):
                if fd == self._sock.fileno():
                    if not self._serve_channel():
                        return
                else:
                    self._take_kick()
            is_busy = self._serve_ring()

    def _timeout_s(self, *, is_busy: bool) -> float | None:
        if is_busy:
            return 0
        if self._stop_id is None:
            return None
        return max(0, self._stop_deadline_s - time.monotonic())

    # The ring.

    def _serve_ring(self) -> bool:
        server = self._server
        if server is None:
            return False
        try:
            if self._stop_id is None:
                return server.serve_batch()
            if server.has_parked and time.monotonic() > self._stop_deadline_s:
                server.fail_parked(errno.EIO)
            if not server.has_parked:
                self._drop_ring()
                self._answer_stop()
        except RingError as exc:
            self._break_ring(exc)
        return False

    def _serve_plain(self, *, is_busy: bool) -> bool:
        # It waits, too. After it, `run` looks at the descriptors and the ring without waiting.
        server = self._server
        if server is None or self._plain is None or self._stop_id is not None:
            return is_busy
        try:
            server.serve_plain(self._poller.fileno(), self._ring_fds["kick"], is_busy=is_busy)
        except RingError as exc:
            self._break_ring(exc)
            return False
        return True

    def _take_kick(self) -> None:
        # The eventfd only says that there may be something; the ring itself says what.
        kick_fd = self._ring_fds.get("kick")
        if kick_fd is None:
            return
        try:
            is_open = bool(os.read(kick_fd, _EVENTFD_BYTES))
        except BlockingIOError:
            return  # the front-end, who holds it too, was faster
        except OSError:
            is_open = False
        if not is_open:
            self._break_ring(RingError("the kick descriptor cannot be read"))

    def _break_ring(self, exc: RingError) -> None:
        _LOG.error("%s; the ring stops", exc)
        server = self._server
        if server is not None:
            server.ring.signal_error()
        self._drop_ring()
        broken = pb.RingBroken(reason=str(exc), last_avail=self._last_avail)
        self._send(pb.Envelope(ring_broken=broken))
        if self._stop_id is not None:
            self._answer_stop()

    def _drop_ring(self) -> None:
        if self._server is not None:
            self._last_avail = self._server.ring.last_avail
            self._server = None
            self._poller.unregister(self._ring_fds["kick"])
        for fd in self._ring_fds.values():
            os.close(fd)
        self._ring_fds.clear()
        self._asking.forget()

    def _answer_stop(self) -> None:
        stopped = pb.RingStopped(last_avail=self._last_avail)
        self._send(pb.Envelope(id=self._stop_id or 0, ring_stopped=stopped))
        self._stop_id = None

    # The control channel.

    def _serve_channel(self) -> bool:
        message = channel.receive(self._sock)
        if message is None:
            return False
        envelope, fds = message
        match envelope.WhichOneof("body"):
            case "set_memory":
                self._set_memory(envelope, fds)
            case "start_ring":
                self._start_ring(envelope, fds)
            case "stop_ring":
                self._stop_ring(envelope)
            case "set_call":
                self._set_call(fds)
            case "resolved":
                self._resolved(envelope)
            case other:
                raise AssertionError(other)
        return True

    def _set_memory(self, envelope: pb.Envelope, fds: list[int]) -> None:
        self._incoming += [
            (MappedRegion(r.gpa, r.size, r.user_addr, r.mmap_offset), fd)
            for r, fd in zip(envelope.set_memory.regions, fds, strict=True)
        ]
        if not envelope.set_memory.last:
            return
        incoming, self._incoming = self._incoming, []
        error = ""
        try:
            for region in self._regions:
                self._memory.remove(region)
            self._regions = []
            for region, fd in incoming:
                self._memory.add(fd, region)
                self._regions.append(region)
        except ApplianceError as exc:
            error = str(exc)
        finally:
            for _region, fd in incoming:
                os.close(fd)
        if self._server is not None:
            try:
                self._server.ring.translate()
            except RingError as exc:
                self._break_ring(exc)
        self._done(envelope.id, error)

    def _start_ring(self, envelope: pb.Envelope, fds: list[int]) -> None:
        start = envelope.start_ring
        names = ["inflight", "kick"] + ["call"] * start.has_call + ["err"] * start.has_err
        self._ring_fds = dict(zip(names, fds, strict=True))
        try:
            ring = self._new_ring(start)
        except RingError as exc:
            # The front-end waits for the answer, unless it is a predecessor's ring that ends here.
            signal_fd(self._ring_fds.get("err", -1))
            self._done(envelope.id, str(exc))
            self._drop_ring()
            return
        self._server = RingServer(
            ring, self._dispatcher, self._handler, self._asking.ask, self._plain
        )
        self._done(envelope.id)
        try:
            self._server.recover()
        except RingError as exc:
            self._break_ring(exc)

    def _new_ring(self, start: pb.StartRing) -> Ring:
        # The descriptors are the front-end's: any kind of file, of any size by now.
        try:
            inflight = self._inflight_area(start)
        except (ValueError, OSError) as exc:
            raise RingError(f"inflight buffer: {exc}") from exc
        ring = Ring(
            self._memory,
            RingLayout(start.num, start.desc, start.avail, start.used),
            base=start.base,
            features=start.features,
            inflight=inflight,
            call_fd=self._ring_fds.get("call", -1),
            err_fd=self._ring_fds.get("err", -1),
        )
        try:
            self._poller.register(self._ring_fds["kick"], select.EPOLLIN)
        except OSError as exc:
            raise RingError(f"kick descriptor: {exc.strerror}") from exc
        return ring

    def _inflight_area(self, start: pb.StartRing) -> memoryview:
        memory = InflightMemory(
            self._ring_fds["inflight"],
            offset=start.inflight_offset,
            num_queues=start.inflight_num_queues,
            queue_size=start.inflight_queue_size,
        )
        return memory.area(self._queue)

    def _stop_ring(self, envelope: pb.Envelope) -> None:
        self._stop_id = envelope.id
        self._stop_deadline_s = time.monotonic() + _DRAIN_DEADLINE_S
        if self._server is None:
            self._answer_stop()

    def _set_call(self, fds: list[int]) -> None:
        old = self._ring_fds.pop("call", None)
        new = fds[0] if fds else -1
        if self._server is not None:
            self._server.ring.set_call(new)
        if fds:
            self._ring_fds["call"] = new
        if old is not None:
            os.close(old)

    # The resolver.

    def _resolved(self, envelope: pb.Envelope) -> None:
        want = self._asking.answered(envelope)
        if want is None or self._server is None:
            return  # asked for a ring that has stopped or broken since
        try:
            self._server.resolved(want, envelope.resolved.errno)
        except RingError as exc:
            self._break_ring(exc)

    def _done(self, envelope_id: int, error: str = "") -> None:
        self._send(pb.Envelope(id=envelope_id, done=pb.Done(error=error)))

    def _send(self, envelope: pb.Envelope) -> None:
        channel.send(self._sock, envelope)


class RingServer:
    """One started ring and the requests of it that wait for the resolver.

    Every method may raise RingError: the guest broke the ring, and this object must not be used
    further.
    """

    def __init__(
        self,
        ring: Ring,
        dispatcher: Dispatcher,
        handler: Handler,
        ask: Callable[[Want], None],
        plain: PlainAnswers | None = None,
    ) -> None:
        self._ring = ring
        self._plain = plain
        self._dispatcher = dispatcher
        self._handler = handler
        self._parked: Parking[int] = Parking(ask)

    @property
    def has_parked(self) -> bool:
        """Whether popped requests wait for the resolver."""
        return bool(self._parked)

    @property
    def ring(self) -> Ring:
        """The ring served."""
        return self._ring

    def recover(self) -> None:
        """Run again what a killed predecessor had popped and not returned."""
        heads = self._ring.recovered
        if heads:
            _LOG.info("running %d requests of a dead worker again", len(heads))
            self._run_again(heads)

    def serve_batch(self) -> bool:
        """Answer up to BATCH requests; return whether to look again without sleeping."""
        ring = self._ring
        slots: Sequence[int]
        if self._plain is None:
            slots = range(ring.pop(BATCH))
        else:
            slots = self._plain.serve_batch(ring, BATCH)
        self._serve_all(iter(slots), self._serve)
        return ring.arm()

    def serve_plain(self, epoll_fd: int, kick_fd: int, *, is_busy: bool) -> None:
        """Serve, and wait, until something happens at another descriptor of `epoll_fd`.

        It may return earlier, with requests left in the ring. See `PlainAnswers.serve_ring`.
        """
        if self._plain is not None:
            slots = self._plain.serve_ring(self._ring, epoll_fd, kick_fd, is_busy=is_busy)
            self._serve_all(iter(slots), self._serve)

    def resolved(self, want: Want, error: int) -> None:
        """Run what waited for `want` again, or answer it with `error` (a positive errno)."""
        heads = self._parked.take(want)
        if error == 0:
            self._run_again(heads)
            heads, error = self._parked.take_hopeless(want), errno.EIO
        try:
            for head in heads:
                self._ring.load(head)
                ring_delivery.fail(self._ring, 0, self._dispatcher, error)
        finally:
            self._ring.signal()

    def fail_parked(self, error: int) -> None:
        """Answer everything that is parked with `error`."""
        for want in self._parked.wants():
            self.resolved(want, error)

    def _run_again(self, heads: list[int]) -> None:
        self._serve_all(iter(heads), self._load_and_serve)

    def _serve_all(self, requests: Iterator[int], serve: Callable[[int], None]) -> None:
        # No signal within a batch: the front-end could hold its snapshot by a full descriptor.
        # And none long after the reply it is about: the guest goes on while we serve the rest.
        ring = self._ring
        for first in requests:
            try:
                with self._handler.batch():
                    for request in chain((first,), requests):
                        serve(request)
                        if ring.is_signal_due:
                            break
            finally:
                ring.signal()

    def _load_and_serve(self, head: int) -> None:
        self._ring.load(head)
        self._serve(0)

    def _serve(self, slot: int) -> None:
        try:
            ring_delivery.serve(self._ring, slot, self._dispatcher)
        except NotReady as exc:
            if self._plain is not None and isinstance(exc.want, BlobWanted):
                self._plain.close_unlinked()
            self._parked.park(exc, self._ring.head(slot))
