"""The gRPC server: three services under every family of names, health and reflection."""

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Final

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import SERVICE_NAME as HEALTH_SERVICE
from grpc_health.v1.health import aio as health
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection import SERVICE_NAME as REFLECTION_SERVICE
from grpc_reflection.v1alpha.reflection import aio as reflection

from appliance.castore.digest import EMPTY_DIGEST
from appliance.castore.store_path import DIGEST_SIZE
from appliance.errors import ApplianceError, ConfigError
from appliance.protos import pathinfo_rpc_pb2, snix_store_pb2
from appliance.rpc.blob_handlers import BlobHandlers
from appliance.rpc.directory_handlers import DirectoryHandlers
from appliance.rpc.handlers import Edge, Handler
from appliance.rpc.methods import CHANNEL_OPTIONS, FAMILIES, Family
from appliance.rpc.path_info_handlers import PathInfoHandlers
from appliance.store.services import Services

_PROBE_INTERVAL_S: Final = 5.0
_PROBE_TIMEOUT_S: Final = 5.0
_SETTLE_S: Final = 0.1
# More are refused with RESOURCE_EXHAUSTED: each may hold a request in memory.
_CALLS_MAX: Final = 1024
# The newer name of the same service.
_REFLECTION_V1: Final = "grpc.reflection.v1.ServerReflection"
_SERVER_OPTIONS: Final = (
    *CHANNEL_OPTIONS,
    # Two servers must not share a port unnoticed.
    ("grpc.so_reuseport", 0),
    # What a call may be sent before it asks for the next message. Unasked, gRPC lets it grow to
    # megabytes for each call, by what the connection carries; a message asked for comes in one go.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 256 << 10),
)
_DESCRIPTORS: Final = (pathinfo_rpc_pb2.DESCRIPTOR, snix_store_pb2.DESCRIPTOR)

_SERVING: Final = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING: Final = health_pb2.HealthCheckResponse.NOT_SERVING


class Server:
    """Serves `services`; made and used on one event loop."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._edge = Edge()
        self._server = grpc.aio.server(options=_SERVER_OPTIONS, maximum_concurrent_rpcs=_CALLS_MAX)
        self._health = health.HealthServicer()
        self._probing: asyncio.Task[None] | None = None
        for family in FAMILIES:
            self._add_family(family)
        add_HealthServicer_to_server(self._health, self._server)
        self._add_reflection()

    def listen(self, target: str) -> int:
        """Listen on `target`, as gRPC writes it; return the port, if it has one.

        Raises:
            ConfigError: that is not possible; gRPC does not say why.
        """
        try:
            return self._server.add_insecure_port(target)
        except RuntimeError as exc:
            raise ConfigError(f"cannot listen on {target}: gRPC refuses it") from exc

    async def start(self) -> None:
        """Begin to serve."""
        await self._probe()
        await self._server.start()
        self._probing = asyncio.create_task(self._keep_probing())

    async def stop(self, grace_s: float) -> None:
        """Accept no more calls, and end when those under way have, or `grace_s` is over."""
        if self._probing is not None:
            self._probing.cancel()
        await self._health.enter_graceful_shutdown()
        stopping = asyncio.create_task(self._server.stop(grace_s))
        idle = asyncio.create_task(self._wait_idle())
        await asyncio.wait({stopping, idle}, return_when=asyncio.FIRST_COMPLETED)
        idle.cancel()
        await self._server.stop(0)
        await stopping

    async def _wait_idle(self) -> None:
        # Watchers of health never end by themselves; calls to the services do. The last of them
        # may be on their way to their handlers yet.
        await asyncio.sleep(_SETTLE_S)
        await self._edge.wait_idle()

    def _add_family(self, family: Family) -> None:
        handlers: Mapping[str, Mapping[str, Handler]] = {
            family.blobs(): BlobHandlers(self._services.blobs).methods(self._edge),
            family.directories(): DirectoryHandlers(self._services.directories).methods(self._edge),
            family.path_infos(): PathInfoHandlers(self._services.path_infos).methods(self._edge),
        }
        self._server.add_generic_rpc_handlers(
            [
                grpc.method_handlers_generic_handler(name, dict(methods))
                for name, methods in handlers.items()
            ]
        )

    def _add_reflection(self) -> None:
        names = [name for family in FAMILIES for name in _service_names(family)]
        names += [HEALTH_SERVICE, REFLECTION_SERVICE, _REFLECTION_V1]
        servicer = reflection.ReflectionServicer(names)
        handler = grpc.stream_stream_rpc_method_handler(
            servicer.ServerReflectionInfo,
            request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
            response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
        )
        self._server.add_generic_rpc_handlers(
            [
                grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": handler})
                for name in (REFLECTION_SERVICE, _REFLECTION_V1)
            ]
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
                await self._health.set(name, _SERVING if is_working else _NOT_SERVING)
        await self._health.set("", _SERVING if all(works) else _NOT_SERVING)


def _service_names(family: Family) -> tuple[str, str, str]:
    return (family.blobs(), family.directories(), family.path_infos())


async def _works(question: Coroutine[object, object, object]) -> bool:
    try:
        async with asyncio.timeout(_PROBE_TIMEOUT_S):
            await question
    except (ApplianceError, TimeoutError):
        return False
    return True
