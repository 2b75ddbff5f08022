"""The gRPC server: the three services under every family of names, health and reflection.

The health service is written here, as the servicer of the library sends to one watcher after
another: a watcher that does not read delays the others and the end of the server. Reflection is
that of the library.
"""

import asyncio
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Mapping,
)
from contextlib import aclosing
from typing import Final, TypeVar

import grpc
from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1.health import SERVICE_NAME
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection import SERVICE_NAME as REFLECTION_SERVICE
from grpc_reflection.v1alpha.reflection import aio as reflection

from appliance.castore.digest import EMPTY_DIGEST
from appliance.errors import (
    ApplianceError,
    ConfigError,
    InvalidRequestError,
    ReadOnlyStoreError,
)
from appliance.nix.store_path import DIGEST_SIZE
from appliance.protos import bulk_pb2, pathinfo_rpc_pb2, snix_store_pb2
from appliance.rpc.blob_handlers import BlobHandlers
from appliance.rpc.bulk_handlers import BulkHandlers
from appliance.rpc.call_counters import CallCounters
from appliance.rpc.calls import CALLS_MAX, WATCHES_MAX, Edge, Handler, decode_untrusted
from appliance.rpc.directory_handlers import DirectoryHandlers
from appliance.rpc.path_info_handlers import PathInfoHandlers
from appliance.services.contracts import Services
from appliance.services.grpc_messages import BULK, CHANNEL_OPTIONS, FAMILIES, Family
from appliance.services.grpc_status import not_found
from appliance.system.tracing import is_tracing, set_served_method

# The messages of a call: request and answer.
Q = TypeVar("Q")
A = TypeVar("A")

# How often the services are asked whether they work, and how long each answer may take.
_PROBE_INTERVAL_S: Final = 5.0
_PROBE_TIMEOUT_S: Final = 5.0
# How long the last calls may take to reach their handlers after the server stopped accepting.
_SETTLE_S: Final = 0.1
# Calls on one connection, so that one client does not take all the room. gRPC counts a call for
# some time after its end and refuses one beyond the limit, so this is far more than a client needs.
_STREAMS_MAX: Final = CALLS_MAX // 2
# All calls, including those that are refused or have not sent their request yet. More of them are
# refused by gRPC itself.
_ALL_CALLS_MAX: Final = 2 * (CALLS_MAX + WATCHES_MAX)
_PING_INTERVAL_MIN_MS: Final = 5000
_SILENCE_MS: Final = 60_000
_PING_MS: Final = 20_000
# The newer name of the reflection service.
_REFLECTION_V1: Final = "grpc.reflection.v1.ServerReflection"
_SERVER_OPTIONS: Final = (
    *CHANNEL_OPTIONS,
    ("grpc.max_concurrent_streams", _STREAMS_MAX),
    # Clients ping while a call says nothing, to notice a dead connection. By default, gRPC hangs up
    # on a client that pings more often than every five minutes.
    ("grpc.http2.min_ping_interval_without_data_ms", _PING_INTERVAL_MIN_MS),
    # A connection whose client has vanished is given up in the same way.
    ("grpc.keepalive_time_ms", _SILENCE_MS),
    ("grpc.keepalive_timeout_ms", _PING_MS),
    ("grpc.http2.ping_timeout_ms", _PING_MS),
    # Two servers must not share a port unnoticed.
    ("grpc.so_reuseport", 0),
    # Bytes that a call may be sent before it asks for the next message. By default gRPC lets this
    # grow to megabytes for each call with the bandwidth of the connection. A message that was asked
    # for arrives without a pause in either case.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 256 << 10),
)
# Reflection finds only descriptors that were imported.
_DESCRIPTORS: Final = (
    pathinfo_rpc_pb2.DESCRIPTOR,
    snix_store_pb2.DESCRIPTOR,
    bulk_pb2.DESCRIPTOR,
)

HEALTH_SERVICE: Final[str] = SERVICE_NAME
# Bytes in a request to the health service; a watch keeps its request.
_REQUEST_MAX: Final = 1024
_SERVING: Final[int] = pb.HealthCheckResponse.SERVING
_NOT_SERVING: Final[int] = pb.HealthCheckResponse.NOT_SERVING
_UNKNOWN: Final[int] = pb.HealthCheckResponse.SERVICE_UNKNOWN


class _MethodNames(grpc.aio.ServerInterceptor):
    """Tells the task of each call which method it answers."""

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Q, A] | None"]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Q, A] | None":
        set_served_method(handler_call_details.method.removeprefix("/"))
        return await continuation(handler_call_details)


# --- The server ---


class Server:
    """Serves `services`; created and used on one event loop.

    Args:
        services: what is served (lent).
        verifies_blobs: blobs are verified before they are sent (see `BlobHandlers`).
        is_readonly: everything that is put is refused.
        counters: counts the calls, if it is given.
    """

    def __init__(
        self,
        services: Services,
        *,
        verifies_blobs: bool = False,
        is_readonly: bool = False,
        counters: CallCounters | None = None,
    ) -> None:
        self._services = services
        self._counters = counters
        self._blobs = BlobHandlers(services.blobs, verifies=verifies_blobs)
        self._directories = DirectoryHandlers(services.directories)
        self._bulk = BulkHandlers(services.blobs, self._directories)
        self._edge = Edge()
        self._is_readonly = is_readonly
        self._server = grpc.aio.server(
            options=_SERVER_OPTIONS,
            maximum_concurrent_rpcs=_ALL_CALLS_MAX,
            interceptors=[_MethodNames()] if is_tracing() else None,
        )
        self._health = Health()
        self._probing: asyncio.Task[None] | None = None
        for family in FAMILIES:
            self._add_family(family)
        bulk = {
            **self._bulk.methods(self._edge),
            "ReadRange": self._edge.stream(self._blobs.read_range),
        }
        if is_readonly:
            refused = self._edge.sink(_refuse_put)
            bulk = {**bulk, "PutBlobs": refused, "PutDirectories": refused}
        self._add({BULK: bulk})
        self._add({HEALTH_SERVICE: self._health.methods(self._edge)})
        self._add_reflection()

    def listen(self, target: str, credentials: grpc.ServerCredentials | None = None) -> int:
        """Listen on `target`, as gRPC writes it; return the port, if the address has one.

        With `credentials`, connections are encrypted.

        Raises:
            ConfigError: gRPC cannot listen there; it does not report why.
        """
        try:
            if credentials is not None:
                return self._server.add_secure_port(target, credentials)
            return self._server.add_insecure_port(target)
        except RuntimeError as exc:
            raise ConfigError(f"cannot listen on {target}: gRPC refuses it") from exc

    async def start(self) -> None:
        """Begin to serve, once the services have been probed."""
        await self._probe()
        await self._server.start()
        self._probing = asyncio.create_task(self._keep_probing())

    async def stop(self, grace_s: float) -> None:
        """Accept no more calls; return when work has ended, or was cancelled after `grace_s`."""
        if self._probing is not None:
            self._probing.cancel()
        self._health.end()
        stopping = asyncio.create_task(self._server.stop(grace_s))
        idle = asyncio.create_task(self._wait_idle())
        await asyncio.wait({stopping, idle}, return_when=asyncio.FIRST_COMPLETED)
        idle.cancel()
        await self._server.stop(0)
        await stopping

    async def _wait_idle(self) -> None:
        # Calls to the services end by themselves, watches of health do not. The last calls may not
        # have reached their handlers yet.
        await asyncio.sleep(_SETTLE_S)
        await self._edge.wait_idle()

    def _add_family(self, family: Family) -> None:
        handlers: Mapping[str, Mapping[str, Handler]] = {
            family.blobs(): self._blobs.methods(self._edge),
            family.directories(): self._directories.methods(self._edge),
            family.path_infos(): PathInfoHandlers(self._services.path_infos).methods(self._edge),
        }
        if self._is_readonly:
            stream, single = self._edge.sink(_refuse_put), self._edge.unary(_refuse_put)
            handlers = {
                name: {**methods, "Put": single if name == family.path_infos() else stream}
                for name, methods in handlers.items()
            }
        self._add(handlers)

    def _add(self, handlers: Mapping[str, Mapping[str, Handler]]) -> None:
        counters = self._counters
        self._server.add_generic_rpc_handlers(
            [
                grpc.method_handlers_generic_handler(
                    name, counters.counted(name, methods) if counters else dict(methods)
                )
                for name, methods in handlers.items()
            ]
        )

    def _add_reflection(self) -> None:
        names = [name for family in FAMILIES for name in _service_names(family)]
        names.append(BULK)
        names += [HEALTH_SERVICE, REFLECTION_SERVICE, _REFLECTION_V1]
        handler = self._edge.exchange(_Reflection(names).answer)
        self._add(
            {
                name: {"ServerReflectionInfo": handler}
                for name in (REFLECTION_SERVICE, _REFLECTION_V1)
            }
        )

    async def _keep_probing(self) -> None:
        while True:
            await asyncio.sleep(_PROBE_INTERVAL_S)
            await self._probe()

    async def _probe(self) -> None:
        works = (
            await _works(self._services.blobs.has(EMPTY_DIGEST)),
            await _works(self._services.directories.get(EMPTY_DIGEST)),
            await _works(self._services.path_infos.get(bytes(DIGEST_SIZE))),
        )
        for family in FAMILIES:
            for name, is_working in zip(_service_names(family), works, strict=True):
                self._health.set(name, is_working=is_working)
        self._health.set("", is_working=all(works))


async def _refuse_put(_sent: bytes | AsyncIterator[bytes]) -> bytes:
    raise ReadOnlyStoreError("this daemon is read-only")


class _Reflection:
    """The servicer of the library, on bytes."""

    def __init__(self, names: list[str]) -> None:
        self._servicer = reflection.ReflectionServicer(names)

    async def answer(self, requests: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        decoded = _decoded(requests)
        async with aclosing(self._servicer.ServerReflectionInfo(decoded, None)) as answers:
            async for answer in answers:
                yield answer.SerializeToString()


async def _decoded(
    requests: AsyncIterator[bytes],
) -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
    async for request in requests:
        yield decode_untrusted(reflection_pb2.ServerReflectionRequest, request)


def _service_names(family: Family) -> tuple[str, str, str]:
    return (family.blobs(), family.directories(), family.path_infos())


async def _works(question: Coroutine[object, object, object]) -> bool:
    try:
        async with asyncio.timeout(_PROBE_TIMEOUT_S):
            await question
    except (ApplianceError, TimeoutError):
        return False
    return True


# --- Health (grpc.health.v1) ---


class Health:
    """Whether each service works, by its name; "" is the server as a whole."""

    def __init__(self) -> None:
        self._statuses = {"": _SERVING}
        self._has_ended = False
        self._changed = asyncio.Event()

    def set(self, service: str, *, is_working: bool) -> None:
        """Record whether a service works, and send that to its watchers."""
        if not self._has_ended:
            self._set(service, _SERVING if is_working else _NOT_SERVING)

    def end(self) -> None:
        """Record, for good, that no service works."""
        self._has_ended = True
        for service in self._statuses:
            self._set(service, _NOT_SERVING)

    def methods(self, edge: Edge) -> Mapping[str, Handler]:
        """Return the handlers by the names of their methods."""
        return {
            "Check": edge.unary(self.check, is_work=False),
            "Watch": edge.stream(self.watch, is_watch=True),
        }

    async def check(self, request: bytes) -> bytes:
        """Return the status of a service."""
        service = _service_untrusted(request)
        status = self._statuses.get(service)
        if status is None:
            raise not_found(f"service {service!r} is not served")
        return _encode(status)

    async def watch(self, request: bytes) -> AsyncGenerator[bytes, None]:
        """Send the status now and whenever it changes, without end."""
        service = _service_untrusted(request)
        sent = None
        while True:
            changed = self._changed
            status = self._statuses.get(service, _UNKNOWN)
            if status != sent:
                sent = status
                yield _encode(status)
            await changed.wait()

    def _set(self, service: str, status: int) -> None:
        if self._statuses.get(service) != status:
            self._statuses[service] = status
            self._changed.set()
            self._changed = asyncio.Event()


def _service_untrusted(request: bytes) -> str:
    if len(request) > _REQUEST_MAX:
        raise InvalidRequestError(
            f"health request has {len(request)} bytes, expected at most {_REQUEST_MAX}"
        )
    service: str = decode_untrusted(pb.HealthCheckRequest, request).service
    return service


def _encode(status: int) -> bytes:
    encoded: bytes = pb.HealthCheckResponse(status=status).SerializeToString()
    return encoded
