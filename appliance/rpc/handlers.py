"""What all handlers have in common: bytes in, bytes out, errors to statuses."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from typing import Final, NoReturn, TypeAlias, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from appliance.castore.digest import DIGEST_SIZE, Digest
from appliance.errors import InvalidRequestError
from appliance.rpc.status import StatusError, status_of

M = TypeVar("M", bound=Message)

# How long the rest of a stream that is refused is taken, in all and while nothing comes.
_DRAIN_S: Final = 30.0
_DRAIN_IDLE_S: Final = 0.5

# Quoted: these classes are generic in their stubs only.
Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"
Handler: TypeAlias = "grpc.RpcMethodHandler[bytes, bytes]"
UnaryHandler = Callable[[bytes], Awaitable[bytes]]
StreamHandler = Callable[[bytes], AsyncGenerator[bytes, None]]
SinkHandler = Callable[[AsyncIterator[bytes]], Awaitable[bytes]]


class Edge:
    """Makes gRPC handlers of functions on bytes, and knows of the calls under way."""

    def __init__(self) -> None:
        self._num_calls = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def wait_idle(self) -> None:
        """Wait until no call is under way."""
        await self._idle.wait()

    def unary(self, handler: UnaryHandler) -> Handler:
        """Serve one message with one."""

        async def call(request: bytes, context: Context) -> bytes:
            with self._call():
                try:
                    return await handler(request)
                except Exception as exc:  # noqa: BLE001 - each becomes a status, bugs are logged
                    status = status_of(exc)
                request = b""
                return await _abort(context, status)

        return grpc.unary_unary_rpc_method_handler(call)

    def stream(self, handler: StreamHandler) -> Handler:
        """Serve one message with many."""

        async def call(request: bytes, context: Context) -> AsyncIterator[bytes]:
            with self._call():
                try:
                    async with aclosing(handler(request)) as responses:
                        async for response in responses:
                            yield response
                except Exception as exc:  # noqa: BLE001 - as above
                    status = status_of(exc)
                else:
                    return
                request = b""
                await _abort(context, status)

        return grpc.unary_stream_rpc_method_handler(call)

    def sink(self, handler: SinkHandler) -> Handler:
        """Serve many messages with one."""

        async def call(requests: AsyncIterator[bytes], context: Context) -> bytes:
            with self._call():
                try:
                    return await handler(_whole(requests, context))
                except Exception as exc:  # noqa: BLE001 - as above
                    status = status_of(exc)
                await _drain(requests)
                return await _abort(context, status)

        return grpc.stream_unary_rpc_method_handler(call)

    @contextmanager
    def _call(self) -> Iterator[None]:
        self._num_calls += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_calls -= 1
            if self._num_calls == 0:
                self._idle.set()


def decode_untrusted(kind: type[M], data: bytes) -> M:
    """Read a message.

    Raises:
        InvalidRequestError: it is not of this kind.
    """
    try:
        return kind.FromString(data)
    except DecodeError as exc:
        raise InvalidRequestError(f"not a {kind.DESCRIPTOR.name} message") from exc


def digest_untrusted(value: bytes) -> Digest:
    """Read a digest.

    Raises:
        StatusError: it has another length.
    """
    if len(value) != DIGEST_SIZE:
        raise StatusError(grpc.StatusCode.INVALID_ARGUMENT, "invalid digest length")
    return Digest(value)


async def _whole(requests: AsyncIterator[bytes], context: Context) -> AsyncGenerator[bytes, None]:
    # The stream of a client that has gone away, or given up, ends like one that is complete, and
    # that it is cancelled may be heard only later. But nothing can be sent to such a client.
    async for request in requests:
        yield request
    try:
        await context.send_initial_metadata(())
    except grpc.aio.BaseError as exc:
        raise StatusError(grpc.StatusCode.CANCELLED, "the client has gone away") from exc


async def _drain(requests: AsyncIterator[bytes]) -> None:
    # Some clients that are still sending when the answer comes see that they could not send, and
    # not the answer: so they get the chance to finish.
    with suppress(TimeoutError, StopAsyncIteration, grpc.aio.BaseError):
        async with asyncio.timeout(_DRAIN_S):
            while True:
                async with asyncio.timeout(_DRAIN_IDLE_S):
                    await anext(requests)


async def _abort(context: Context, status: tuple[grpc.StatusCode, str]) -> NoReturn:
    # gRPC keeps the exception that this raises, and it keeps all that its frames, and those of an
    # exception under way, refer to, in a cycle: so it is called outside of any `except`, by frames
    # that refer to no message.
    await context.abort(*status)
