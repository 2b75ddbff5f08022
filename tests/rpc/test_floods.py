"""More calls, and larger messages, than a daemon has room for."""

import asyncio
import contextlib
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TypeVar

import grpc
import pytest

from appliance.bounds import LOG_LINES_MAX
from appliance.castore.digest import EMPTY_DIGEST, Digest
from appliance.castore.directory import Directory, SymlinkNode
from appliance.protos import bulk_pb2, castore_rpc_pb2, pathinfo_rpc_pb2
from appliance.rpc.calls import CALLS_MAX, WATCHES_MAX
from appliance.services.grpc_messages import BULK, encode_chunk
from appliance.store import schema
from appliance.store.store import Store
from tests.contracts.rig import fresh_bytes
from tests.fakes.daemon_process import DaemonProcess
from tests.rpc.wire import StreamUnary, UnaryStream, UnaryUnary, run

pytestmark = pytest.mark.slow

T = TypeVar("T")

BLOBS = "/tvix.castore.v1.BlobService"
STAT_EMPTY = castore_rpc_pb2.StatBlobRequest(digest=EMPTY_DIGEST).SerializeToString()
LARGE_MESSAGE_SIZE = 15 << 20
NUM_LARGE = 40
# A whole message each took twice as many MiB.
NUM_SLOW = 200
# All at once took 900 MiB.
MEMORY_LIMIT_BYTES = 200 << 20
BULK_BYTES = 400 << 20
NUM_CALLS = CALLS_MAX + 50
# Of one connection at a time: the rest would wait at the client.
NUM_STREAMS = 120

Code = grpc.StatusCode


async def put(channel: grpc.aio.Channel, *messages: bytes) -> None:
    method: StreamUnary = channel.stream_unary(f"{BLOBS}/Put")
    call = method()
    for message in messages:
        await call.write(message)
    await call.done_writing()
    await call


async def stat(channel: grpc.aio.Channel) -> Code:
    method: UnaryUnary = channel.unary_unary(f"{BLOBS}/Stat")
    return await method(STAT_EMPTY, timeout=30).code()


async def health(channel: grpc.aio.Channel) -> Code:
    method: UnaryUnary = channel.unary_unary("/grpc.health.v1.Health/Check")
    return await method(b"", timeout=30).code()


async def watching(stack: AsyncExitStack, daemon: DaemonProcess, num_watches: int) -> None:
    """Begin watches on a connection of their own; wait for as many as it may have."""
    channel = await stack.enter_async_context(channel_to(daemon))
    method: UnaryStream = channel.unary_stream("/grpc.health.v1.Health/Watch")
    calls = [method(b"") for _ in range(num_watches)]
    reads = [asyncio.create_task(call.read()) for call in calls]
    await some_of(reads, min(num_watches, NUM_STREAMS))
    stack.push_async_callback(give_up, calls, reads)


async def some_of(tasks: Sequence[asyncio.Task[T]], num_wanted: int) -> None:
    """Wait for `num_wanted` of the tasks; gRPC decides which calls wait."""
    ended = asyncio.as_completed(tasks, timeout=30)
    for _ in range(num_wanted):
        await next(ended)


async def give_up(calls: Sequence[grpc.aio.Call], tasks: Sequence[asyncio.Task[T]]) -> None:
    for task in tasks:
        task.cancel()
    for call in calls:
        call.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def channel_to(daemon: DaemonProcess) -> grpc.aio.Channel:
    options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    return grpc.aio.insecure_channel(f"unix:{daemon.socket}", options=options)


def most_memory_bytes(daemon: DaemonProcess) -> int:
    # Pages of the store that are mapped are the system's, to keep or to drop.
    return daemon.memory_bytes("VmHWM") - daemon.memory_bytes("RssFile")


def test_large_messages_of_many_calls_wait_for_room(tmp_path: Path) -> None:
    async def flood(daemon: DaemonProcess) -> None:
        message = encode_chunk(fresh_bytes(LARGE_MESSAGE_SIZE))
        async with channel_to(daemon) as flooding, channel_to(daemon) as other:
            large = [asyncio.create_task(put(flooding, message)) for _ in range(NUM_LARGE)]
            small = [
                asyncio.create_task(put(other, encode_chunk(fresh_bytes())))
                for _ in range(NUM_LARGE)
            ]
            assert await stat(other) == Code.OK
            await asyncio.gather(*large, *small)

    with DaemonProcess(f"lmdb://{tmp_path}/store", tmp_path) as daemon:
        asyncio.run(flood(daemon))
        assert most_memory_bytes(daemon) < MEMORY_LIMIT_BYTES


def many_blobs(size: int) -> bytes:
    contents = [fresh_bytes(60_000) for _ in range(size // 60_000)]
    return bulk_pb2.PutBlobsRequest(contents=contents).SerializeToString()


def many_directories(size: int) -> bytes:
    """Return directories that make up no closure; of few entries, so that little is computed."""
    links = [SymlinkNode(b"%03d" % number, b"x" * 4000) for number in range(200)]
    encoded = [Directory(symlinks=links[:-number]).to_bytes() for number in range(1, 9)]
    number = size // len(encoded[0]) // len(encoded)
    return bulk_pb2.PutDirectoriesRequest(directories=encoded * number).SerializeToString()


@pytest.mark.parametrize(
    ("name", "message_size", "expected"),
    [
        ("PutBlobs", 1 << 20, Code.OK),
        ("PutBlobs", 3 << 20, Code.OK),
        ("PutBlobs", 15 << 20, Code.INVALID_ARGUMENT),
        ("PutDirectories", 15 << 20, Code.INVALID_ARGUMENT),
    ],
)
def test_messages_of_many_objects_wait_for_room(
    tmp_path: Path, name: str, message_size: int, expected: Code
) -> None:
    message = (many_blobs if name == "PutBlobs" else many_directories)(message_size)
    num_messages = BULK_BYTES // NUM_LARGE // message_size or 1

    async def flood(daemon: DaemonProcess) -> None:
        async with channel_to(daemon) as flooding, channel_to(daemon) as other:
            method: StreamUnary = flooding.stream_unary(f"/{BULK}/{name}")

            async def put_many() -> Code:
                call = method()
                with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
                    for _ in range(num_messages):
                        await call.write(message)
                    await call.done_writing()
                return await call.code()

            flood = [asyncio.create_task(put_many()) for _ in range(NUM_LARGE)]
            assert await stat(other) == Code.OK
            assert set(await asyncio.gather(*flood)) == {expected}

    with DaemonProcess(f"lmdb://{tmp_path}/store", tmp_path) as daemon:
        asyncio.run(flood(daemon))
        assert most_memory_bytes(daemon) < MEMORY_LIMIT_BYTES


def test_calls_that_send_nothing_delay_no_others(tmp_path: Path) -> None:
    async def hold_up(daemon: DaemonProcess) -> None:
        async with channel_to(daemon) as idle, channel_to(daemon) as other:
            method: StreamUnary = idle.stream_unary(f"{BLOBS}/Put")
            calls = [method() for _ in range(100)]
            for call in calls:
                await call.write(encode_chunk(b"begun"))
            await asyncio.wait_for(put(other, encode_chunk(b"whole")), 30)
            assert not any(call.done() for call in calls)

    with DaemonProcess(f"lmdb://{tmp_path}/store", tmp_path) as daemon:
        asyncio.run(hold_up(daemon))


def test_clients_that_do_not_read_what_they_asked_for_share_room(tmp_path: Path) -> None:
    async def ask(daemon: DaemonProcess) -> int:
        async with AsyncExitStack() as stack, channel_to(daemon) as other:
            slow = [await stack.enter_async_context(channel_to(daemon)) for _ in range(2)]
            pieces = [fresh_bytes(1 << 20) for _ in range(4)]
            await put(other, *map(encode_chunk, pieces))
            request = castore_rpc_pb2.ReadBlobRequest(digest=Digest.of(b"".join(pieces)))
            methods: list[UnaryStream] = [channel.unary_stream(f"{BLOBS}/Read") for channel in slow]
            before_bytes = daemon.memory_bytes()
            calls = [
                method(request.SerializeToString())
                for method in methods
                for _ in range(NUM_SLOW // len(methods))
            ]
            for call in calls:
                assert await call.read()
            assert await stat(other) == Code.OK
            return daemon.memory_bytes("VmHWM") - before_bytes

    with DaemonProcess(f"lmdb://{tmp_path}/store", tmp_path) as daemon:
        assert asyncio.run(ask(daemon)) < NUM_SLOW << 20


def test_more_calls_than_there_may_be_are_refused(tmp_path: Path) -> None:
    async def flood(daemon: DaemonProcess) -> list[Code]:
        async with AsyncExitStack() as stack, channel_to(daemon) as other:
            calls: list[grpc.aio.Call] = []
            while len(calls) < NUM_CALLS:
                channel = await stack.enter_async_context(channel_to(daemon))
                method: StreamUnary = channel.stream_unary(f"{BLOBS}/Put")
                calls += [method() for _ in range(min(NUM_STREAMS, NUM_CALLS - len(calls)))]
            tasks = [asyncio.create_task(call.code()) for call in calls]
            ended = asyncio.as_completed(tasks, timeout=30)
            codes = [await next(ended) for _ in range(NUM_CALLS - CALLS_MAX)]
            assert await stat(other) == Code.RESOURCE_EXHAUSTED
            assert await health(other) == Code.OK
            assert sum(task.done() for task in tasks) == len(codes)
            for task in tasks:
                task.cancel()
            return codes

    with DaemonProcess(f"lmdb://{tmp_path}/store", tmp_path) as daemon:
        codes = asyncio.run(flood(daemon))
        # Their client has gone: there is room again.
        answer = run(
            f"unix:{daemon.socket}", lambda wire: wire.ask(f"{BLOBS[1:]}/Stat", STAT_EMPTY)
        )
    assert set(codes) == {Code.RESOURCE_EXHAUSTED}
    assert answer.code == Code.OK


def test_calls_that_cannot_be_decoded_are_the_clients_affair_and_not_logged(tmp_path: Path) -> None:
    async def flood(daemon: DaemonProcess) -> None:
        async with channel_to(daemon) as channel:
            method: UnaryUnary = channel.unary_unary("/grpc.health.v1.Health/Check")
            for _ in range(20 * LOG_LINES_MAX):
                assert await method(b"\xff", timeout=30).code() == Code.INVALID_ARGUMENT

    with DaemonProcess(f"lmdb://{tmp_path}/store", tmp_path) as daemon:
        asyncio.run(flood(daemon))
        assert "DecodeError" not in daemon.log()


def test_failures_of_one_client_hide_none_of_anothers(tmp_path: Path) -> None:
    path_digest = bytes(20)
    request = pathinfo_rpc_pb2.GetPathInfoRequest(by_output_hash=path_digest).SerializeToString()
    with contextlib.closing(Store.open(tmp_path / "store", create=True)) as store:
        path_infos = store.env.database(schema.PATH_INFOS)
        store.env.write(lambda txn: txn.put(path_digest, b"\xff", db=path_infos))

    async def flood(target: str, count: int) -> None:
        async with grpc.aio.insecure_channel(target) as channel:
            method: UnaryUnary = channel.unary_unary("/tvix.store.v1.PathInfoService/Get")
            for _ in range(count):
                assert await method(request, timeout=30).code() == Code.DATA_LOSS

    with DaemonProcess(f"lmdb://{tmp_path}/store", tmp_path) as daemon:
        asyncio.run(flood(f"unix:{daemon.socket}", 10 * LOG_LINES_MAX))
        asyncio.run(flood(daemon.tcp, 1))
        assert daemon.log().count(": unix: storage error") == LOG_LINES_MAX
        assert daemon.log().count(": ipv6:%5B::1%5D: storage error") == 1


def test_idle_watches_of_one_connection_hold_up_no_other(tmp_path: Path) -> None:
    async def watch(daemon: DaemonProcess) -> None:
        async with AsyncExitStack() as stack, channel_to(daemon) as other:
            await watching(stack, daemon, NUM_CALLS)
            assert await stat(other) == Code.OK
            await put(other, encode_chunk(fresh_bytes()))
            await watching(stack, daemon, 1)

    with DaemonProcess(f"lmdb://{tmp_path}/store", tmp_path) as daemon:
        asyncio.run(watch(daemon))


def test_idle_watches_of_many_connections_are_limited_and_are_not_work(tmp_path: Path) -> None:
    async def watch(daemon: DaemonProcess) -> None:
        async with AsyncExitStack() as stack, channel_to(daemon) as other:
            num_left = WATCHES_MAX
            while num_left:
                num_begun = min(NUM_STREAMS, num_left)
                await watching(stack, daemon, num_begun)
                num_left -= num_begun
            method: UnaryStream = other.unary_stream("/grpc.health.v1.Health/Watch")
            assert await method(b"", timeout=30).code() == Code.RESOURCE_EXHAUSTED
            assert await stat(other) == Code.OK
            assert await health(other) == Code.OK

    with DaemonProcess(f"lmdb://{tmp_path}/store", tmp_path) as daemon:
        asyncio.run(watch(daemon))
        # Their clients have gone.
        assert daemon.stop() == 0


def test_idle_uploads_of_one_connection_hold_up_no_other(tmp_path: Path) -> None:
    async def hold_up(daemon: DaemonProcess) -> None:
        async with channel_to(daemon) as idle, channel_to(daemon) as other:
            method: StreamUnary = idle.stream_unary(f"{BLOBS}/Put")
            calls = [method() for _ in range(NUM_CALLS)]
            writes = [asyncio.create_task(call.write(encode_chunk(b"begun"))) for call in calls]
            await some_of(writes, NUM_STREAMS)
            assert await stat(other) == Code.OK
            await asyncio.wait_for(put(other, encode_chunk(b"whole")), 30)
            await give_up(calls, writes)

    with DaemonProcess(f"lmdb://{tmp_path}/store", tmp_path) as daemon:
        asyncio.run(hold_up(daemon))


def test_idle_uploads_through_a_daemon_in_between_hold_up_no_other(tmp_path: Path) -> None:
    async def hold_up(daemon: DaemonProcess) -> None:
        async with channel_to(daemon) as idle, channel_to(daemon) as other:
            method: StreamUnary = idle.stream_unary(f"{BLOBS}/Put")
            calls = [method() for _ in range(NUM_CALLS)]
            writes = [asyncio.create_task(call.write(encode_chunk(b"begun"))) for call in calls]
            await some_of(writes, NUM_STREAMS)
            assert await stat(other) == Code.OK
            await give_up(calls, writes)

    with (
        DaemonProcess(f"lmdb://{tmp_path}/store", tmp_path / "far") as far,
        DaemonProcess(far.unix_uri, tmp_path) as near,
    ):
        asyncio.run(hold_up(near))
