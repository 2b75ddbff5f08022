"""Calls to one gRPC server: its names for services, timeouts, repetitions, errors.

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
from appliance.errors import ApplianceError, ContentMissingError, ServiceUnavailableError
from appliance.nix.store_path import DIGEST_SIZE
from appliance.protos import castore_rpc_pb2, pathinfo_rpc_pb2
from appliance.services.addresses import GrpcAddress
from appliance.services.grpc_connection import C, Connections
from appliance.services.grpc_messages import BULK, SNIX, TVIX, Family
from appliance.services.grpc_status import error_of, is_status
from appliance.services.peer_presence import LOOK_TIMEOUT_S, PeerPresence
from appliance.services.retry import BUDGET_S, Patience, persevere
from appliance.services.tasks import SingleFlight
from appliance.system.tracing import begin_call

T = TypeVar("T")
# Quoted, as these classes are generic in their stubs only.
UnaryCall: TypeAlias = "grpc.aio.UnaryUnaryCall[bytes, bytes]"
StreamCall: TypeAlias = "grpc.aio.UnaryStreamCall[bytes, bytes]"
SinkCall: TypeAlias = "grpc.aio.StreamUnaryCall[bytes, bytes]"
UnaryMethod: TypeAlias = "grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]"
StreamMethod: TypeAlias = "grpc.aio.UnaryStreamMultiCallable[bytes, bytes]"
Metadata: TypeAlias = tuple[tuple[str, str], ...]
SinkMethod: TypeAlias = "grpc.aio.StreamUnaryMultiCallable[bytes, bytes]"

# For the answer to a stream of messages, all of which the server makes durable first.
_KEPT_TIMEOUT_S: Final = 600.0
_STAT_EMPTY: Final = castore_rpc_pb2.StatBlobRequest(digest=EMPTY_DIGEST).SerializeToString()


class Peer:
    """A server; used on one event loop, and connected to at the first call.

    Servers know the services under one family of names or both. The first call to a service finds
    out which, by asking for something that costs nothing.

    A request is repeated while the server is unavailable, as `retry` says. A server that has never
    answered is not waited for, unless `is_patient`: a command whose address is wrong should say so
    at once. Nor is one that is known to be away (`peer_presence`).

    Args:
        address: where it is.
        is_patient: wait for a server that has never answered, too.
        budget_s: how long one request may take.

    Raises:
        ConfigError: a certificate or key that the address names cannot be read.
    """

    def __init__(
        self, address: GrpcAddress, *, is_patient: bool = False, budget_s: float = BUDGET_S
    ) -> None:
        self.name = address.target
        self._budget_s = budget_s
        self._connections = Connections(address)
        self._may_repeat = is_patient
        self._presence = PeerPresence(self.name, self._is_there)
        # Whether the server has a method, as far as it was asked.
        self._known: dict[str, bool] = {}
        self._probes: SingleFlight[str, bool] = SingleFlight()

    async def connect(self) -> None:
        """Connect now, and not at the first call.

        Raises:
            ServiceUnavailableError: the server cannot be reached.
        """
        await self.castore_family()

    async def castore_family(self) -> Family:
        """Return the names that the server uses for blobs and directories."""
        return await self._family(f"{TVIX.blobs()}/Stat", _STAT_EMPTY)

    async def store_family(self) -> Family:
        """Return the names that the server uses for PathInfos."""
        message = pathinfo_rpc_pb2.GetPathInfoRequest(by_output_hash=bytes(DIGEST_SIZE))
        method = f"{TVIX.path_infos()}/Get"
        return await self._family(method, message.SerializeToString())

    async def knows_bulk(self) -> bool:
        """Return whether the server has the service for many objects in one message."""
        method = f"{BULK}/HasBlobs"
        if method not in self._known:
            self._known[method] = await self._probes.do(method, partial(self._probe, method, b""))
        return self._known[method]

    async def ask(
        self,
        method: str,
        request: bytes,
        *,
        timeout_s: float | None = None,
        metadata: Metadata = (),
    ) -> bytes:
        """Send one message and return the answer.

        Args:
            method: the full name of the method.
            request: the message.
            timeout_s: how long the server may work on the answer, if that is longer than usual.
            metadata: sent before the message.

        Raises:
            ApplianceError: as `grpc_status.error_of` says.
        """
        patience = await self.patience(starts_at_failure=timeout_s is not None)

        async def attempt() -> bytes:
            with self.translating():
                return await self._unary(method, request, timeout_s or patience.left_s(), metadata)

        return await persevere(attempt, patience)

    async def find(self, method: str, request: bytes) -> bytes | None:
        """Send one message and return the answer, or None for NOT_FOUND."""
        try:
            return await self.ask(method, request)
        except ContentMissingError:
            return None

    async def patience(self, *, starts_at_failure: bool = False) -> Patience:
        """Return the patience with this server for one request, for `persevere`.

        Raises:
            ServiceUnavailableError: the server is known to be away.
        """
        await self._presence.check()
        return Patience(
            self._budget_s,
            may_repeat=lambda: self._may_repeat,
            starts_at_failure=starts_at_failure,
            when_over=self._presence.suspect,
        )

    def stream(self, method: str, request: bytes) -> StreamCall:
        """Send one message and return the call, which many answer; use it inside `translating`."""

        def start(channel: grpc.aio.Channel, metadata: Metadata) -> StreamCall:
            call: StreamMethod = channel.unary_stream(f"/{method}")
            return call(request, metadata=metadata)

        return self._begin(method, start)

    def sink(self, method: str) -> SinkCall:
        """Begin a call of many messages with one answer; use it inside `translating`."""

        def start(channel: grpc.aio.Channel, metadata: Metadata) -> SinkCall:
            call: SinkMethod = channel.stream_unary(f"/{method}")
            return call(metadata=metadata)

        return self._begin(method, start)

    async def messages(self, call: StreamCall) -> AsyncIterator[bytes]:
        """Yield the messages that answer a call."""
        try:
            while (message := await self.next_message(call)) is not None:
                yield message
        finally:
            call.cancel()

    async def next_message(
        self, call: StreamCall, patience: Patience | None = None
    ) -> bytes | None:
        """Return the next message, or None at the end of the stream; use it inside `translating`.

        Args:
            call: a call of `stream`.
            patience: how long to wait; by default, as long as a request may take.
        """
        timeout_s = self._budget_s if patience is None else patience.left_s()
        message = await self.in_time(call.read(), timeout_s)
        self._heard()
        return message if isinstance(message, bytes) else None

    async def in_time(self, work: Awaitable[T], timeout_s: float | None = None) -> T:
        """Wait for `work` for `timeout_s`, or as long as a request may take.

        Raises:
            ServiceUnavailableError: the server has not answered in time.
        """
        timeout_s = self._budget_s if timeout_s is None else timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                return await work
        except TimeoutError as exc:
            raise self._timed_out(timeout_s) from exc

    @contextmanager
    def translating(self) -> Iterator[None]:
        """Raise the errors of this package instead of those of gRPC inside the block."""
        try:
            yield
        except grpc.RpcError as exc:
            error = error_of(exc, self.name)
            if not isinstance(error, ServiceUnavailableError):
                self._heard()
            raise error from exc
        except grpc.aio.BaseError as exc:
            raise ServiceUnavailableError(f"{self.name}: {exc}") from exc

    async def close(self) -> None:
        """Cancel all calls and disconnect."""
        await self._presence.close()
        await self._probes.close()
        await self._connections.close()

    async def _unary(
        self, method: str, request: bytes, timeout_s: float, metadata: Metadata = ()
    ) -> bytes:
        def start(channel: grpc.aio.Channel, carried: Metadata) -> UnaryCall:
            call: UnaryMethod = channel.unary_unary(f"/{method}")
            return call(request, timeout=timeout_s, metadata=(*metadata, *carried))

        try:
            answer = await self._begin(method, start)
        except grpc.aio.AioRpcError as exc:
            if is_status(exc, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise self._timed_out(timeout_s) from exc
            raise
        self._heard()
        return answer

    def _begin(self, method: str, start: Callable[[grpc.aio.Channel, Metadata], C]) -> C:
        """Begin a call, which is a part of the trace of whoever makes it."""
        recorded = begin_call(method, self.name)
        carried = () if recorded is None else tuple(recorded.headers.items())
        call = self._connections.begin(lambda channel: start(channel, carried))
        if recorded is not None:
            call.add_done_callback(recorded.end)
        return call

    def _heard(self) -> None:
        self._may_repeat = True
        self._presence.heard()

    async def _is_there(self) -> bool:
        # Whatever it answers, it is there.
        try:
            with self.translating():
                await self._unary(f"{TVIX.blobs()}/Stat", _STAT_EMPTY, LOOK_TIMEOUT_S)
        except ServiceUnavailableError:
            return False
        except ApplianceError:
            return True
        return True

    def _timed_out(self, timeout_s: float) -> ServiceUnavailableError:
        self._presence.suspect()
        error = ServiceUnavailableError(f"{self.name}: no answer within {timeout_s:.3g} s")
        error.is_final = True
        return error

    async def _family(self, method: str, request: bytes) -> Family:
        # `method` is the one in the names of Tvix.
        if method not in self._known:
            probe = partial(self._probe, method, request)
            self._known[method] = await self._probes.do(method, probe)
        return TVIX if self._known[method] else SNIX

    async def _probe(self, method: str, request: bytes) -> bool:
        patience = await self.patience()

        async def attempt() -> bool:
            with self.translating():
                try:
                    await self._unary(method, request, patience.left_s())
                except grpc.aio.AioRpcError as exc:
                    if is_status(exc, grpc.StatusCode.UNIMPLEMENTED):
                        return False
                    if not is_status(exc, grpc.StatusCode.NOT_FOUND):
                        raise
            return True

        return await persevere(attempt, patience)


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
