"""Serving one clone of a mount's /dev/fuse descriptor: read, answer, park what must wait.

A request whose answer is not there yet is parked as a copy of its bytes. Should this process
be killed, the kernel still has every request that was not answered: the supervisor, which holds the
descriptor too, has them sent again (FUSE_NOTIFY_RESEND), or fails them where the kernel cannot.
"""

from collections.abc import Callable
from errno import EIO

from appliance.devfuse import Device
from appliance.fs.handler import Handler
from appliance.fuse_proto.dispatch import Dispatcher
from appliance.fuse_proto.operations import NotReady
from appliance.session.wants import Want
from appliance.worker.parking import Parking


class DeviceServer:
    """A /dev/fuse descriptor and the requests from it that wait for the resolver.

    Every method may raise DeviceEndedError: the mount is gone.
    """

    def __init__(
        self, device: Device, dispatcher: Dispatcher, handler: Handler, ask: Callable[[Want], None]
    ) -> None:
        self._device = device
        self._dispatcher = dispatcher
        self._handler = handler
        self._parked: Parking[bytes] = Parking(ask)

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
            self._serve(request)
        return True

    def resolved(self, want: Want, error: int) -> None:
        """Run what waited for `want` again, or answer it with `error` (a positive errno)."""
        requests = self._parked.take(want)
        if error == 0:
            with self._handler.batch():
                for request in requests:
                    self._serve(memoryview(request))
            requests, error = self._parked.take_hopeless(want), EIO
        for request in requests:
            self._device.fail(memoryview(request), self._dispatcher, error)

    def _serve(self, request: memoryview) -> None:
        try:
            if not self._device.serve(request, self._dispatcher):
                self._handler.unanswered(request)
        except NotReady as exc:
            self._parked.park(exc, bytes(request))
