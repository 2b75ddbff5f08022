"""Calls as any client may make them, with whatever bytes."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple, TypeAlias, TypeVar

import grpc

T = TypeVar("T")
UnaryUnary: TypeAlias = "grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]"
UnaryStream: TypeAlias = "grpc.aio.UnaryStreamMultiCallable[bytes, bytes]"
StreamStream: TypeAlias = "grpc.aio.StreamStreamMultiCallable[bytes, bytes]"
StreamUnary: TypeAlias = "grpc.aio.StreamUnaryMultiCallable[bytes, bytes]"

FAMILIES = (("tvix.castore.v1", "tvix.store.v1"), ("snix.castore.v1", "snix.store.v1"))


class Answer(NamedTuple):
    code: grpc.StatusCode
    text: str
    messages: list[bytes]


class Wire:
    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel

    async def ask(self, method: str, request: bytes) -> Answer:
        """Send one message; take whatever number comes."""
        open_stream: UnaryStream = self._channel.unary_stream(f"/{method}")
        return await _collect(open_stream(request, timeout=30))

    async def send(
        self, method: str, requests: Iterable[bytes], *, is_left_open: bool = False
    ) -> Answer:
        """Send a stream of messages, and end it; take whatever number comes."""

        async def stream() -> AsyncIterator[bytes]:
            for request in requests:
                yield request
            if is_left_open:
                await asyncio.Event().wait()

        open_stream: StreamStream = self._channel.stream_stream(f"/{method}")
        return await _collect(open_stream(stream(), timeout=30))


async def _collect(
    call: "grpc.aio.UnaryStreamCall[bytes, bytes] | grpc.aio.StreamStreamCall[bytes, bytes]",
) -> Answer:
    messages: list[bytes] = []
    with suppress(grpc.aio.AioRpcError):
        async for message in call:
            messages.append(message)  # noqa: PERF401 - what came before an error counts
    return Answer(await call.code(), await call.details() or "", messages)


@asynccontextmanager
async def connected(target: str) -> AsyncIterator[Wire]:
    async with grpc.aio.insecure_channel(
        target, options=[("grpc.use_local_subchannel_pool", 1)]
    ) as channel:
        yield Wire(channel)


def run(target: str, work: Callable[[Wire], Awaitable[T]]) -> T:
    async def main() -> T:
        async with connected(target) as wire:
            return await work(wire)

    return asyncio.run(main())
