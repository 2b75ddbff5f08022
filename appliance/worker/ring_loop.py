"""Serving one virtqueue: the loop around the ring, and the control channel.

`RingLoop` handles the control channel: guest memory, and rings that start and stop. `RingServer`
serves a started ring. Where `PlainAnswers` is given, the loop over the ring runs in C and sleeps
there. It returns for requests that are not plain, for messages on the control channel, and for
errors. Without it, and while a front-end asks for a dirty log, the loop here answers every request
in Python: only here are the pages marked that a reply was written to.
"""

import errno
import logging
import os
import select
import socket
import time
from collections.abc import Sequence
from typing import Final

from appliance.dirty_log import open_log
from appliance.engine import (
    INFLIGHT_HEADER,
    GuestMap,
    MappedRegion,
    Ring,
    RingLayout,
    signal_fd,
)
from appliance.errors import ApplianceError, RingError
from appliance.fs.handler import Handler
from appliance.fuse_proto.dispatch import Dispatcher
from appliance.protos import control_pb2 as pb
from appliance.session import channel
from appliance.session.link import close_all
from appliance.session.request_statistics import QueueStatistics
from appliance.session.session_memory import InflightMemory
from appliance.worker.pending import Asking
from appliance.worker.plain_answers import PlainAnswers, RingWait
from appliance.worker.ring_server import RingServer

_LOG = logging.getLogger(__name__)

# How long a ring that must stop waits for the resolver before requests that wait get EIO.
_DRAIN_DEADLINE_S = 10.0
# How often the owner is told that the ring is draining, so that it does not replace this worker.
_DRAINING_S: Final = 1.0


class RingLoop:
    """The loop of a worker that serves a virtqueue; owns every descriptor that it is sent.

    Args:
        sock: the worker's end of its control channel (lent).
        queue: the number of the virtqueue.
        dispatcher: answers requests that are not plain.
        handler: the operations behind `dispatcher`, for its batches.
        statistics: of this queue.
        plain: answers plain requests in C; None: the dispatcher answers everything.
    """

    def __init__(
        self,
        sock: socket.socket,
        queue: int,
        dispatcher: Dispatcher,
        handler: Handler,
        statistics: QueueStatistics,
        plain: PlainAnswers | None = None,
    ) -> None:
        self._sock = sock
        self._queue = queue
        self._dispatcher = dispatcher
        self._handler = handler
        self._statistics = statistics
        self._plain = plain
        self._memory = GuestMap()
        # Of a change that is told in several messages: what comes, and what goes.
        self._incoming: list[tuple[MappedRegion, int]] = []
        self._outgoing: list[MappedRegion] = []
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
            for fd, events in self._poller.poll(self._timeout_s(is_busy=is_busy)):
                if fd == self._sock.fileno():
                    if not self._serve_channel():
                        return
                else:
                    self._check_kick(events)
            is_busy = self._serve_ring()

    def _timeout_s(self, *, is_busy: bool) -> float | None:
        if is_busy:
            return 0
        if self._stop_id is None:
            return None
        return max(0, min(_DRAINING_S, self._stop_deadline_s - time.monotonic()))

    # --- The ring ---

    def _serve_ring(self) -> bool:
        server = self._server
        if server is None:
            return False
        try:
            if self._stop_id is None:
                return server.serve()
            if server.has_parked and time.monotonic() > self._stop_deadline_s:
                server.fail_parked(errno.EIO)
            if server.has_parked:
                self._send(pb.Envelope(ring_draining=pb.RingDraining()))
            else:
                self._drop_ring()
                self._answer_stop()
        except RingError as exc:
            self._break_ring(exc)
        return False

    def _check_kick(self, events: int) -> None:
        # The kick is edge-triggered and never read: the ring itself says what there is to do.
        if events & ~select.EPOLLIN and self._server is not None:
            self._break_ring(
                RingError(f"the kick descriptor cannot be waited for: epoll events {events:#x}")
            )

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
        if self._plain is not None:
            self._plain.report_used()
        if self._server is not None:
            self._last_avail = self._server.ring.last_avail
            self._server = None
            self._poller.unregister(self._ring_fds["kick"])
        close_all(list(self._ring_fds.values()))
        self._ring_fds.clear()
        self._asking.forget()

    def _answer_stop(self) -> None:
        stopped = pb.RingStopped(last_avail=self._last_avail)
        self._send(pb.Envelope(id=self._stop_id or 0, ring_stopped=stopped))
        self._stop_id = None

    # --- The control channel ---

    def _serve_channel(self) -> bool:
        message = channel.receive(self._sock)
        if message is None:
            return False
        envelope, fds = message
        match envelope.WhichOneof("body"):
            case "set_memory":
                self._set_memory(envelope, fds)
            case "change_memory":
                self._change_memory(envelope, fds)
            case "start_ring":
                self._start_ring(envelope, fds)
            case "stop_ring":
                self._stop_ring(envelope)
            case "set_call":
                self._set_call(envelope, fds)
            case "set_log":
                self._set_log(envelope, fds)
            case "resolved":
                self._resolved(envelope)
            case "ping":
                self._done(envelope.id)
            case other:
                raise AssertionError(other)
        return True

    def _set_memory(self, envelope: pb.Envelope, fds: list[int]) -> None:
        table = envelope.set_memory
        self._incoming += zip(map(_mapped, table.regions), fds, strict=True)
        if table.last:
            self._map(envelope.id, self._memory.regions)

    def _change_memory(self, envelope: pb.Envelope, fds: list[int]) -> None:
        change = envelope.change_memory
        self._outgoing += map(_mapped, change.removed)
        self._incoming += zip(map(_mapped, change.added), fds, strict=True)
        if change.last:
            outgoing, self._outgoing = self._outgoing, []
            self._map(envelope.id, outgoing)

    def _map(self, envelope_id: int, outgoing: Sequence[MappedRegion]) -> None:
        incoming, self._incoming = self._incoming, []
        error = ""
        try:
            for region in outgoing:
                self._memory.remove(region)
            for region, fd in incoming:
                self._memory.add(fd, region)
        except ApplianceError as exc:
            error = str(exc)
        finally:
            close_all([fd for _region, fd in incoming])
        # What is only added moves nothing of the ring.
        if outgoing and self._server is not None:
            try:
                self._server.ring.translate()
            except RingError as exc:
                self._break_ring(exc)
        self._done(envelope_id, error)

    def _start_ring(self, envelope: pb.Envelope, fds: list[int]) -> None:
        start = envelope.start_ring
        names = ["inflight", "kick"] + ["call"] * start.has_call + ["err"] * start.has_err
        names += ["log"] * start.HasField("log")
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
            ring, self._dispatcher, self._handler, self._asking.ask, self._statistics
        )
        if self._plain is not None:
            wait = RingWait(self._poller.fileno(), self._ring_fds["kick"])
            self._server.answer_plain(self._plain, wait)
        self._done(envelope.id)
        try:
            self._server.recover()
        except RingError as exc:
            self._break_ring(exc)

    def _new_ring(self, start: pb.StartRing) -> Ring:
        # The descriptors are the front-end's: any kind of file, of any size by now.
        try:
            memory = InflightMemory(
                self._ring_fds["inflight"],
                offset=start.inflight_offset,
                num_queues=start.inflight_num_queues,
                queue_size=start.inflight_queue_size,
            )
            inflight = memory.area(self._queue)
        except (ValueError, OSError) as exc:
            raise RingError(f"inflight buffer: {exc}") from exc
        log = open_log(start.log, self._ring_fds.get("log"))
        has_predecessor = INFLIGHT_HEADER.unpack_from(inflight)[1] != 0
        ring = Ring(
            self._memory,
            RingLayout(start.num, start.desc, start.avail, start.used),
            base=start.base,
            features=start.features,
            inflight=inflight,
            call_fd=self._ring_fds.get("call", -1),
            err_fd=self._ring_fds.get("err", -1),
        )
        ring.log = log
        if log is not None and has_predecessor:
            # It may have died between its last write to the used ring and the mark for that.
            log.completed(ring.cdata)
        if start.follows_used and not has_predecessor:
            ring.cdata.last_avail = ring.cdata.used_idx
        try:
            self._poller.register(self._ring_fds["kick"], select.EPOLLIN | select.EPOLLET)
        except OSError as exc:
            raise RingError(f"kick descriptor: {exc.strerror}") from exc
        return ring

    def _stop_ring(self, envelope: pb.Envelope) -> None:
        self._stop_id = envelope.id
        self._stop_deadline_s = time.monotonic() + _DRAIN_DEADLINE_S
        if self._server is None:
            self._answer_stop()

    def _set_call(self, envelope: pb.Envelope, fds: list[int]) -> None:
        old = self._ring_fds.pop("call", None)
        new = fds[0] if fds else -1
        if self._server is not None:
            self._server.ring.set_call(new)
        if fds:
            self._ring_fds["call"] = new
        if old is not None:
            os.close(old)
        if envelope.id:  # an older session process does not ask for an answer
            self._done(envelope.id)

    def _set_log(self, envelope: pb.Envelope, fds: list[int]) -> None:
        error = ""
        if self._server is not None:
            self._server.ring.log = None
            try:
                self._server.ring.log = open_log(envelope.set_log.log, *fds)
            except RingError as exc:
                error = str(exc)
        close_all(fds)
        self._done(envelope.id, error)

    # --- The resolver ---

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


def _mapped(region: pb.Region) -> MappedRegion:
    return MappedRegion(region.gpa, region.size, region.user_addr, region.mmap_offset)
