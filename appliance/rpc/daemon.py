"""`appliance daemon`: serves the services of this machine over gRPC until it is told to stop.

gRPC opens most listening sockets itself, from their addresses. Sockets that a service manager
passed are served through a `Relay`.
"""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import quote

import grpc

from appliance.errors import ConfigError
from appliance.metrics.program_figures import ProgramFigures
from appliance.rpc.call_counters import CallCounters, daemon_exposition
from appliance.rpc.listen import (
    AbstractListen,
    InheritedListen,
    ListenAddress,
    Relay,
    TcpListen,
    UnixListen,
    inherited_socket,
)
from appliance.rpc.server import Server
from appliance.rpc.server_tls import TlsFiles, server_credentials
from appliance.services.addresses import GrpcAddress, ServiceAddresses, is_peer, unix_target
from appliance.services.open_services import open_services
from appliance.services.path_info_completion import CompletingPathInfoService
from appliance.services.put_policy import guarded
from appliance.services.space_watch import keeping_free
from appliance.store.writer import AsyncStore
from appliance.system.listening import (
    ListeningSocket,
    announce_ready,
    announce_status,
    announce_stopping,
    claim_socket_path,
    raise_descriptor_limit,
    set_socket_group,
    socket_mode,
    stop_event,
)
from appliance.system.watchdog import feeding_watchdog

if TYPE_CHECKING:
    from pathlib import Path

    from appliance.nix.signing import SecretKey
    from appliance.nix.trusted_keys import TrustedKeys

_LOG = logging.getLogger(__name__)

# How long calls may take to end when the daemon stops; then they are cancelled.
_GRACE_S: Final = 60.0
# Of the socket behind a relay, in a directory that nobody else may enter.
_PRIVATE_MODE: Final = 0o600


class SocketAccess(NamedTuple):
    """Who may connect to the sockets in the file system that the daemon creates.

    Args:
        mode: their permissions; by default, for their owner and group.
        gid: their group; None for that of the process.
    """

    mode: int = 0o660
    gid: int | None = None


class DaemonConfig(NamedTuple):
    """What the daemon serves, and where.

    Args:
        services: the services that are served.
        listen: the addresses to listen on.
        may_replace_paths: a PathInfo that is put replaces one that it contradicts.
        checks_content: read all contents of a path before its PathInfo is accepted.
        access: who may connect to sockets in the file system.
        tls: certificate and key for TCP sockets, created or inherited; None for no encryption.
        is_readonly: refuse everything that is put.
        trusted_keys: one of them must have signed a path without a content address.
        secret_keys: sign each path that is put.
        metrics: where metrics are served, over HTTP (lent); None for nowhere.
    """

    services: ServiceAddresses
    listen: Sequence[ListenAddress]
    may_replace_paths: bool = False
    checks_content: bool = False
    access: SocketAccess = SocketAccess()
    tls: TlsFiles | None = None
    min_free_bytes: int | None = None
    is_readonly: bool = False
    trusted_keys: "TrustedKeys | None" = None
    secret_keys: "Sequence[SecretKey]" = ()
    metrics: ListeningSocket | None = None


def serve(config: DaemonConfig) -> None:
    """Serve until SIGTERM, SIGINT or SIGHUP.

    Raises:
        ConfigError: the daemon cannot listen on one of its addresses.
        StoreError: the store cannot be opened.
    """
    raise_descriptor_limit()  # connections and large blobs being read take descriptors
    asyncio.run(_serve(config))


async def _serve(config: DaemonConfig) -> None:
    stopping = stop_event()
    credentials = None if config.tls is None else server_credentials(config.tls)
    watching = keeping_free(config.services.one_store(), config.min_free_bytes)
    counters = None if config.metrics is None else CallCounters()
    async with contextlib.AsyncExitStack() as stack:
        stores = _local_stores(config)
        for store in stores.values():
            stack.callback(store.close)
        opening = open_services(
            config.services,
            is_readonly=config.is_readonly,
            stores=stores,
            may_replace_paths=config.may_replace_paths,
        )
        services = await stack.enter_async_context(opening)
        collections = await stack.enter_async_context(watching)
        # Clients verify what comes from a store of this host (see `BlobReader`). What comes from
        # another peer is verified before it is passed on.
        is_of_peer = is_peer(config.services.blobs)
        served = guarded(
            services,
            trusted_keys=config.trusted_keys,
            secret_keys=config.secret_keys,
            checks_content=config.checks_content,
        )
        if not isinstance(config.services.path_infos, GrpcAddress):
            # A peer completes its own, if it wants to.
            path_infos = CompletingPathInfoService(served.path_infos)
            served = served._replace(path_infos=path_infos)
        server = Server(
            served,
            verifies_blobs=is_of_peer,
            is_readonly=config.is_readonly,
            counters=counters,
        )
        if config.metrics is not None and counters is not None:
            one_store = next(iter(stores.values()), None)
            showing = _showing_metrics(config.metrics, counters, one_store, collections)
            await stack.enter_async_context(showing)
        listeners = _Listeners(server, config.access, credentials)
        try:
            for address in config.listen:
                listeners.add(address)
            await listeners.start()
            where = f"serving on {', '.join(listeners.labels)}"
            announce_ready(where)
            announce_status(where)
            async with feeding_watchdog():
                await stopping.wait()
        finally:
            announce_stopping()
            await listeners.stop()


def _local_stores(config: DaemonConfig) -> "dict[Path, AsyncStore]":
    """Open the one store behind all services here, if there is one, as metrics are about it."""
    path = config.services.one_store()
    if path is None or config.metrics is None:
        return {}
    is_readonly = config.is_readonly
    opened = AsyncStore.open(
        path, is_readonly=is_readonly, create=not is_readonly, or_readonly=True
    )
    return {path.resolve(): opened}


@contextlib.asynccontextmanager
async def _showing_metrics(
    listening: ListeningSocket,
    counters: CallCounters,
    store: AsyncStore | None,
    collections: Mapping[str, int] | None,
) -> AsyncIterator[None]:
    # Imported here because a daemon without metrics needs no HTTP server, which takes 14 MiB.
    from appliance.metrics.metrics_server import serving_metrics  # noqa: PLC0415 - see above

    figures = ProgramFigures(None if store is None else store.store)

    async def gather() -> dict[str, Any]:
        report = {**await figures.gather(), "calls": counters.report()}
        return report if collections is None else {**report, "collections": dict(collections)}

    try:
        async with serving_metrics(listening, gather, daemon_exposition):
            yield
    finally:
        figures.close()


class _Listeners:
    """The server and the sockets that it listens on; `labels` names them for people."""

    def __init__(
        self, server: Server, access: SocketAccess, credentials: grpc.ServerCredentials | None
    ) -> None:
        self.labels: list[str] = []
        self._server = server
        self._access = access
        self._credentials = credentials
        self._inherited: list[socket.socket] = []
        self._relays: list[Relay] = []
        self._paths: list[Path] = []

    def add(self, address: ListenAddress) -> None:
        match address:
            case TcpListen(family, host, port):
                _check_free(family, (host, port), address.target())
                bound_port = self._server.listen(address.target(), self._credentials)
                self.labels.append(f"{address.target().rpartition(':')[0]}:{bound_port}")
            case AbstractListen(name):
                _check_free(socket.AF_UNIX, f"\0{name}", f"@{name}")
                self._server.listen(f"unix-abstract:{quote(os.fsencode(name))}")
                self.labels.append(f"@{name}")
            case UnixListen(path):
                claim_socket_path(path)
                _check_free(socket.AF_UNIX, os.fspath(path), str(path))
                path.unlink()
                with socket_mode(self._access.mode):
                    self._server.listen(unix_target(path))
                self._paths.append(path)
                if self._access.gid is not None:
                    set_socket_group(path, self._access.gid)
                self.labels.append(str(path))
            case InheritedListen(fd):
                self._inherited.append(inherited_socket(fd))
                self.labels.append(f"inherited socket {fd}")

    async def start(self) -> None:
        local = [sock for sock in self._inherited if sock.family == socket.AF_UNIX]
        tcp = [sock for sock in self._inherited if sock.family != socket.AF_UNIX]
        for sockets, credentials in ((local, None), (tcp, self._credentials)):
            if sockets:
                relay = Relay(sockets)
                self._relays.append(relay)
                with socket_mode(_PRIVATE_MODE):
                    self._server.listen(relay.target(), credentials)
        await self._server.start()
        for relay in self._relays:
            relay.start()

    async def stop(self) -> None:
        for relay in self._relays:
            await relay.stop_accepting()
        # Before calls are finished, as gRPC does: another daemon may listen there meanwhile.
        for path in self._paths:
            with suppress(FileNotFoundError):
                path.unlink()
        await self._server.stop(_GRACE_S)
        for relay in self._relays:
            await relay.close()


def _check_free(family: int, address: tuple[str, int] | str, where: str) -> None:
    # gRPC does not report why it cannot listen, so an ordinary socket tries first.
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as exc:
            raise ConfigError(f"cannot listen on {where}: {exc.strerror or exc}") from exc
