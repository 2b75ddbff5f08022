"""Calls to one gRPC server: its connections, its names for services, timeouts, errors.

The clients of the three services (`grpc_blobs`, `grpc_directories`, `grpc_path_infos`) share this.
Requests and responses are bytes.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Final, TypeAlias, TypeVar

import grpc

from appliance.castore.digest import EMPTY_DIGEST
from appliance.errors import ServiceUnavailableError
from appliance.nix.store_path import DIGEST_SIZE
from appliance.protos import castore_rpc_pb2, pathinfo_rpc_pb2
from appliance.services.addresses import GrpcAddress
from appliance.services.grpc_messages import CHANNEL_OPTIONS, SNIX, TVIX, Family
from appliance.services.grpc_status import error_of, is_status
from appliance.services.tasks import SingleFlight

T = TypeVar("T")
C = TypeVar("C", bound=grpc.aio.Call)
# Quoted, as these classes are generic in their stubs only.
UnaryCall: TypeAlias = "grpc.aio.UnaryUnaryCall[bytes, bytes]"
StreamCall: TypeAlias = "grpc.aio.UnaryStreamCall[bytes, bytes]"
SinkCall: TypeAlias = "grpc.aio.StreamUnaryCall[bytes, bytes]"
UnaryMethod: TypeAlias = "grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]"
StreamMethod: TypeAlias = "grpc.aio.UnaryStreamMultiCallable[bytes, bytes]"
SinkMethod: TypeAlias = "grpc.aio.StreamUnaryMultiCallable[bytes, bytes]"

# A server that comes back is found within this time; by default gRPC backs off to two minutes.
_RECONNECT_MAX_MS: Final = 2000
_OPTIONS: Final = (
    *CHANNEL_OPTIONS,
    # Without this, all channels to one server share a connection.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", _RECONNECT_MAX_MS),
    ("grpc.max_reconnect_backoff_ms", _RECONNECT_MAX_MS),
)
# By default gRPC makes an `:authority` from the path of the socket, and strict servers reset the
# stream for it.
_UNIX_OPTIONS: Final = (*_OPTIONS, ("grpc.default_authority", "localhost"))
# Servers limit the calls on one connection, most of them to 100 or more. Calls that only wait must
# not block others, so another connection is opened when each existing one carries this many calls.
_CALLS_OF_CONNECTION: Final = 100
_CONNECTIONS_MAX: Final = 16
# For one answer, or for the next message of a stream.
_ANSWER_TIMEOUT_S: Final = 60.0
# For the answer to a stream of messages, all of which the server makes durable first.
_KEPT_TIMEOUT_S: Final = 600.0


class _Connection:
    """A channel, and the number of calls on it."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.num_calls = 0

    def begin(self, start: Callable[[grpc.aio.Channel], C]) -> C:
        """Begin a call; it counts until it is done."""
        call = start(self.channel)
        self.num_calls += 1
        call.add_done_callback(self._end)
        return call

    def _end(self, _call: object) -> None:
        self.num_calls -= 1


class Peer:
    """A server; used on one event loop, and connected to at the first call.

    Servers know the services under one family of names or both. The first call to a service finds
    out which, by asking for something that costs nothing.
    """

    def __init__(self, address: GrpcAddress) -> None:
        self.name = address.target
        self._address = address
        self._connections: list[_Connection] = []
        self._families: dict[str, Family] = {}
        self._probes: SingleFlight[str, Family] = SingleFlight()

    async def castore_family(self) -> Family:
        """Return the names that the server uses for blobs and directories."""
        request = castore_rpc_pb2.StatBlobRequest(digest=EMPTY_DIGEST).SerializeToString()
        return await self._family(f"{TVIX.blobs()}/Stat", request)

    async def store_family(self) -> Family:
        """Return the names that the server uses for PathInfos."""
        message = pathinfo_rpc_pb2.GetPathInfoRequest(by_output_hash=bytes(DIGEST_SIZE))
        method = f"{TVIX.path_infos()}/Get"
        return await self._family(method, message.SerializeToString())

    async def ask(self, method: str, request: bytes, *, timeout_s: float | None = None) -> bytes:
        """Send one message and return the answer.

        Raises:
            ApplianceError: as `grpc_status.error_of` says.
        """
        with self.translating():
            return await self._unary(method, request, timeout_s or _ANSWER_TIMEOUT_S)

    async def find(self, method: str, request: bytes) -> bytes | None:
        """Send one message and return the answer, or None for NOT_FOUND."""
        with self.translating():
            try:
                return await self._unary(method, request, _ANSWER_TIMEOUT_S)
            except grpc.aio.AioRpcError as exc:
                if is_status(exc, grpc.StatusCode.NOT_FOUND):
                    return None
                raise

    def stream(self, method: str, request: bytes) -> StreamCall:
        """Send one message and return the call, which many answer; use it inside `translating`."""

        def start(channel: grpc.aio.Channel) -> StreamCall:
            call: StreamMethod = channel.unary_stream(f"/{method}")
            return call(request)

        return self._connection().begin(start)

    def sink(self, method: str) -> SinkCall:
        """Begin a call of many messages with one answer; use it inside `translating`."""

        def start(channel: grpc.aio.Channel) -> SinkCall:
            call: SinkMethod = channel.stream_unary(f"/{method}")
            return call()

        return self._connection().begin(start)

    async def messages(self, call: StreamCall) -> AsyncIterator[bytes]:
        """Yield the messages that answer a call."""
        try:
            while (message := await self.next_message(call)) is not None:
                yield message
        finally:
            call.cancel()

    async def next_message(self, call: StreamCall) -> bytes | None:
        """Return the next message, or None at the end of the stream."""
        message = await self.in_time(call.read())
        return message if isinstance(message, bytes) else None

    async def in_time(self, work: Awaitable[T], timeout_s: float = _ANSWER_TIMEOUT_S) -> T:
        """Wait for `work`, for a limited time.

        Raises:
            ServiceUnavailableError: the server has not answered in time.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await work
        except TimeoutError as exc:
            raise ServiceUnavailableError(
                f"{self.name}: no answer within {timeout_s:.0f} s"
            ) from exc

    @contextmanager
    def translating(self) -> Iterator[None]:
        """Raise the errors of this package instead of those of gRPC inside the block."""
        try:
            yield
        except grpc.RpcError as exc:
            raise error_of(exc, self.name) from exc
        except grpc.aio.BaseError as exc:
            raise ServiceUnavailableError(f"{self.name}: {exc}") from exc

    async def close(self) -> None:
        """Cancel all calls and disconnect."""
        await self._probes.close()
        for connection in self._connections:
            await connection.channel.close()

    def _unary(self, method: str, request: bytes, timeout_s: float) -> UnaryCall:
        def start(channel: grpc.aio.Channel) -> UnaryCall:
            call: UnaryMethod = channel.unary_unary(f"/{method}")
            return call(request, timeout=timeout_s)

        return self._connection().begin(start)

    def _connection(self) -> _Connection:
        for connection in self._connections:
            if connection.num_calls < _CALLS_OF_CONNECTION:
                return connection
        if len(self._connections) < _CONNECTIONS_MAX:
            self._connections.append(_Connection(self._connect()))
            return self._connections[-1]
        return min(self._connections, key=lambda connection: connection.num_calls)

    def _connect(self) -> grpc.aio.Channel:
        target = self._address.target
        if self._address.is_tls:
            credentials = grpc.ssl_channel_credentials()
            return grpc.aio.secure_channel(target, credentials, options=_OPTIONS)
        options = _UNIX_OPTIONS if self._address.is_unix() else _OPTIONS
        return grpc.aio.insecure_channel(target, options=options)

    async def _family(self, method: str, request: bytes) -> Family:
        # `method` is the one in the names of Tvix.
        if method not in self._families:
            probe = partial(self._probe, method, request)
            self._families[method] = await self._probes.do(method, probe)
        return self._families[method]

    async def _probe(self, method: str, request: bytes) -> Family:
        with self.translating():
            try:
                await self._unary(method, request, _ANSWER_TIMEOUT_S)
            except grpc.aio.AioRpcError as exc:
                if is_status(exc, grpc.StatusCode.UNIMPLEMENTED):
                    return SNIX
                if not is_status(exc, grpc.StatusCode.NOT_FOUND):
                    raise
        return TVIX


class Sending:
    """A stream of messages to a server that answers once, at the end.

    Args:
        peer: the server.
        method: the full name of the method.
        kept_timeout_s: how long the answer may take after the last message.
    """

    def __init__(self, peer: Peer, method: str, *, kept_timeout_s: float = _KEPT_TIMEOUT_S) -> None:
        self._peer = peer
        self._call = peer.sink(method)
        self._kept_timeout_s = kept_timeout_s

    async def send(self, message: bytes) -> None:
        """Send a message; wait while the server is slower.

        Raises:
            ApplianceError: the server has ended the call; the error is that of its answer.
        """
        with self._peer.translating():
            try:
                await self._peer.in_time(self._call.write(message))
            except (asyncio.InvalidStateError, grpc.RpcError, grpc.aio.BaseError):
                # The server has ended the call. The reason is in its answer; the status of the
                # failed write says nothing.
                await self._call
                raise ServiceUnavailableError(f"{self._peer.name}: ended the call early") from None

    async def finish(self) -> bytes:
        """End the stream and return the answer.

        Raises:
            ApplianceError: the server refuses, or has not answered in time.
        """
        with self._peer.translating():
            with suppress(grpc.aio.BaseError):  # the call has ended; its answer says why
                await self._call.done_writing()
            return await self._peer.in_time(self._call, self._kept_timeout_s)

    def cancel(self) -> None:
        """Cancel the call; does nothing after `finish`."""
        self._call.cancel()
