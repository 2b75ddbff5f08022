"""Serving one clone of a mount's /dev/fuse descriptor, and what happens to requests that must wait.

`DeviceLoop` waits for requests and for the supervisor's answers. `DeviceServer` answers requests.
A request whose answer is not there yet is set aside as a copy of its bytes. If this process is
killed, the kernel still has every request that was not answered. The supervisor, which holds the
descriptor too, then has them sent again (FUSE_NOTIFY_RESEND), or fails them where the kernel cannot
do that.
"""

import contextlib
import os
import select
import socket
import time
from collections.abc import Callable
from errno import EIO

from appliance.fs.handler import Handler
from appliance.fs.passthrough import PassthroughHandler
from appliance.fuse_proto.dispatch import Dispatcher
from appliance.fuse_proto.operations import NotReady
from appliance.protos import control_pb2 as pb
from appliance.session import channel
from appliance.session.request_statistics import QueueStatistics
from appliance.session.wants import BackingWanted, Want
from appliance.worker.device_delivery import DeviceEndedError, FuseDevice
from appliance.worker.pending import Asking, Parking
from appliance.worker.plain_answers import PlainAnswers


class DeviceLoop:
    """Serves a clone until the mount is gone or the supervisor closes the channel.

    Only answers of the resolver come over the channel. While none is due, the worker therefore
    waits in read(2) on the device alone, which saves two of four system calls per request. The
    supervisor ends a worker by a signal.

    Args:
        sock: the worker's end of its control channel (lent).
        device_fd: the clone (owned).
        dispatcher: answers requests that are not plain.
        handler: the operations behind `dispatcher`, for its batches.
        statistics: of this clone.
        plain: answers plain requests in C; None: the dispatcher answers everything.
    """

    def __init__(
        self,
        sock: socket.socket,
        device_fd: int,
        dispatcher: Dispatcher,
        handler: Handler,
        statistics: QueueStatistics,
        plain: PlainAnswers | None = None,
    ) -> None:
        self._sock = sock
        self._device_fd = device_fd
        self._handler = handler
        self._plain = plain
        self._asking = Asking(sock)
        device = FuseDevice(device_fd, plain)
        self._server = DeviceServer(device, dispatcher, handler, self._asking.ask, statistics)
        self._poller = select.epoll()
        self._poller.register(sock, select.EPOLLIN)
        self._poller.register(device_fd, select.EPOLLIN)

    def run(self) -> None:
        """Serve until the mount or the supervisor is gone."""
        try:
            while True:
                self._serve_until_parked()
                if not self._serve_until_resolved():
                    return
        except DeviceEndedError:
            with contextlib.suppress(OSError):  # the supervisor may know, and be gone
                if self._plain is not None:
                    self._plain.report_used()
                channel.send(self._sock, pb.Envelope(device_ended=pb.DeviceEnded()))

    def _serve_until_parked(self) -> None:
        # The open file description is shared with the supervisor, and so with dead predecessors.
        os.set_blocking(self._device_fd, True)
        while not self._server.has_parked:
            self._server.serve_one()

    def _serve_until_resolved(self) -> bool:
        os.set_blocking(self._device_fd, False)
        while self._server.has_parked:
            if not self._serve_ready():
                return False
        return True

    def _serve_ready(self) -> bool:
        # One request at a time: another worker may have taken what woke this one.
        for fd, _event in self._poller.poll():
            if fd != self._sock.fileno():
                self._server.serve_one()
            elif not self._serve_channel():
                return False
        return True

    def _serve_channel(self) -> bool:
        message = channel.receive(self._sock)
        if message is None:
            return False
        envelope, _fds = message
        want = self._asking.answered(envelope)
        if isinstance(want, BackingWanted) and isinstance(self._handler, PassthroughHandler):
            self._handler.grant(want, envelope.resolved.backing_id)
        if want is not None:
            self._server.resolved(want, envelope.resolved.errno)
        return True


class DeviceServer:
    """A /dev/fuse descriptor, and the requests from it that wait for the resolver.

    Every method may raise DeviceEndedError: the mount is gone.

    Args:
        device: the descriptor and its buffers (lent).
        dispatcher: answers requests.
        handler: the operations behind `dispatcher`, for its batches.
        ask: sends a want to the resolver.
        statistics: gets the time that each request took; the dispatcher counts the requests.
    """

    def __init__(
        self,
        device: FuseDevice,
        dispatcher: Dispatcher,
        handler: Handler,
        ask: Callable[[Want], None],
        statistics: QueueStatistics,
    ) -> None:
        self._device = device
        self._dispatcher = dispatcher
        self._handler = handler
        self._statistics = statistics
        # Requests, with the time at which each was read.
        self._parked: Parking[tuple[bytes, int]] = Parking(ask, statistics.set_parked)

    @property
    def has_parked(self) -> bool:
        """Whether requests wait for the resolver."""
        return bool(self._parked)

    def serve_one(self) -> bool:
        """Answer one request; return False if there was none."""
        request = self._device.receive()
        if request is None:
            return False
        with self._handler.batch():
            self._serve(request, time.monotonic_ns())
        return True

    def resolved(self, want: Want, error: int) -> None:
        """Run what waited for `want` again, or answer it with `error` (a positive errno)."""
        parked = self._parked.take(want)
        if error == 0:
            with self._handler.batch():
                for request, taken_ns in parked:
                    self._serve(memoryview(request), taken_ns)
            parked, error = self._parked.take_hopeless(want), EIO
        for request, taken_ns in parked:
            self._device.fail(memoryview(request), self._dispatcher, error)
            self._note_latency(request, taken_ns)

    def _serve(self, request: memoryview, taken_ns: int) -> None:
        try:
            if not self._device.serve(request, self._dispatcher):
                self._handler.unanswered(request)
        except NotReady as exc:
            self._parked.park(exc, (bytes(request), taken_ns))
        else:
            self._note_latency(request, taken_ns)

    def _note_latency(self, request: bytes | memoryview, taken_ns: int) -> None:
        opcode = int.from_bytes(request[4:8], "little")
        self._statistics.add_latency(opcode, time.monotonic_ns() - taken_ns)
