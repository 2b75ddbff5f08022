"""One worker: it serves one virtqueue, or a mount, and holds nothing that the guest could miss.

What it is told (memory table, ring, INIT's outcome) the supervisor keeps and tells a successor
again; what it has popped is in the inflight record. So it can be killed at any instruction.
"""

import errno
import logging
import os
import select
import socket
import time
from functools import partial
from pathlib import Path

from appliance.engine import GuestMap, MappedRegion, Ring, RingLayout, signal_fd
from appliance.errors import ApplianceError, RingError
from appliance.fs.files import RemoteParts
from appliance.fs.handler import Handler
from appliance.fs.passthrough import PassthroughHandler
from appliance.fuse_proto.dispatch import Dispatcher
from appliance.fuse_proto.init import DEVICE_FLAGS, PASSTHROUGH_FLAGS, WANTED_FLAGS
from appliance.log import configure_logging
from appliance.protos import control_pb2 as pb
from appliance.session import channel
from appliance.session.grants import Grants
from appliance.session.session_memory import InflightMemory, SessionMemory
from appliance.store.store import Store
from appliance.worker.device_loop import DeviceWorker
from appliance.worker.pending import Asking
from appliance.worker.ring_loop import QueueServer

_LOG = logging.getLogger(__name__)
# How long a ring that must stop waits for the resolver before parked requests get EIO.
_DRAIN_DEADLINE_S = 10.0
_EVENTFD_BYTES = 8


def main(sock: socket.socket) -> None:
    """Serve one queue or device until the supervisor closes `sock`, which this function owns."""
    message = channel.receive(sock)
    if message is None:
        return
    envelope, (session_fd, grants_fd, *device_fds) = message
    config = envelope.configure
    configure_logging(config.log_level, is_json=config.log_json)
    grants = Grants(grants_fd)
    store = Store.open(Path(config.store_path), is_readonly=True)
    session = SessionMemory(session_fd)
    counters = session.counters(config.queue)
    wanted_flags = WANTED_FLAGS
    remote = RemoteParts(
        has_blobs=config.has_remote_blobs,
        has_directories=config.has_remote_directories,
        has_root=config.has_remote_root,
        used=lambda keys: channel.send(sock, pb.Envelope(cache_used=pb.CacheUsed(keys=keys))),
    )
    new_handler: type[Handler] | partial[PassthroughHandler] = Handler
    if config.device.passthrough:
        wanted_flags = PASSTHROUGH_FLAGS
        new_handler = partial(
            PassthroughHandler,
            released=lambda nodeid: channel.send(
                sock, pb.Envelope(released=pb.Released(nodeid=nodeid))
            ),
        )
    elif device_fds:
        wanted_flags = DEVICE_FLAGS
    handler = new_handler(
        grants,
        store,
        is_root_listable=config.list_root,
        remote=remote,
        makes_images=config.makes_images,
    )
    dispatcher = Dispatcher(handler, session, counters, wanted_flags=wanted_flags)
    if device_fds:
        DeviceWorker(sock, device_fds[0], dispatcher, handler).run()
    else:
        Worker(sock, config.queue, dispatcher, handler).run()


class Worker:
    """The state of one worker process that serves a virtqueue; owns every fd it is sent."""

    def __init__(
        self, sock: socket.socket, queue: int, dispatcher: Dispatcher, handler: Handler
    ) -> None:
        self._sock = sock
        self._queue = queue
        self._dispatcher = dispatcher
        self._handler = handler
        self._memory = GuestMap()
        self._regions: list[MappedRegion] = []
        self._incoming: list[tuple[MappedRegion, int]] = []
        self._server: QueueServer | None = None
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
        self._server = QueueServer(ring, self._dispatcher, self._handler, self._asking.ask)
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
