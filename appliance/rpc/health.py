"""grpc.health.v1: whether each service works, for those who ask once and those who watch.

The library's own servicer sends to one watcher after another: one that does not read holds up the
others, and the end of the server.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Final

from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1.health import SERVICE_NAME

from appliance.errors import InvalidRequestError
from appliance.rpc.handlers import Edge, Handler, decode_untrusted
from appliance.rpc.status import not_found

HEALTH_SERVICE: Final[str] = SERVICE_NAME

_REQUEST_MAX: Final = 1024
_SERVING: Final[int] = pb.HealthCheckResponse.SERVING
_NOT_SERVING: Final[int] = pb.HealthCheckResponse.NOT_SERVING
_UNKNOWN: Final[int] = pb.HealthCheckResponse.SERVICE_UNKNOWN


class Health:
    """What is known of the services by their names; "" is the server as a whole."""

    def __init__(self) -> None:
        self._statuses = {"": _SERVING}
        self._has_ended = False
        self._changed = asyncio.Event()

    def set(self, service: str, *, is_working: bool) -> None:
        """Note that a service works, or does not, and tell who watches it."""
        if not self._has_ended:
            self._set(service, _SERVING if is_working else _NOT_SERVING)

    def end(self) -> None:
        """Say of all that they do not work, for good."""
        self._has_ended = True
        for service in self._statuses:
            self._set(service, _NOT_SERVING)

    def methods(self, edge: Edge) -> Mapping[str, Handler]:
        """Return the handlers by name of method."""
        return {
            "Check": edge.unary(self.check, is_work=False),
            "Watch": edge.stream(self.watch, is_watch=True),
        }

    async def check(self, request: bytes) -> bytes:
        """Say what is known of a service."""
        service = _service_untrusted(request)
        status = self._statuses.get(service)
        if status is None:
            raise not_found(f"service {service!r} is not served")
        return _encode(status)

    async def watch(self, request: bytes) -> AsyncGenerator[bytes, None]:
        """Say it now and whenever it is another, without end."""
        service = _service_untrusted(request)
        told = None
        while True:
            changed = self._changed
            status = self._statuses.get(service, _UNKNOWN)
            if status != told:
                told = status
                yield _encode(status)
            await changed.wait()

    def _set(self, service: str, status: int) -> None:
        if self._statuses.get(service) != status:
            self._statuses[service] = status
            self._changed.set()
            self._changed = asyncio.Event()


def _service_untrusted(request: bytes) -> str:
    # A watch holds its request for as long as it lasts.
    if len(request) > _REQUEST_MAX:
        raise InvalidRequestError(f"the name of a service is longer than {_REQUEST_MAX} bytes")
    service: str = decode_untrusted(pb.HealthCheckRequest, request).service
    return service


def _encode(status: int) -> bytes:
    encoded: bytes = pb.HealthCheckResponse(status=status).SerializeToString()
    return encoded
