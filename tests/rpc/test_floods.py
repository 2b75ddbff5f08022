"""More calls, and larger messages, than a daemon has room for."""

import asyncio
import contextlib
from pathlib import Path

import grpc
import pytest

from appliance.castore.digest import EMPTY_DIGEST, Digest
from appliance.log import BURST
from appliance.protos import castore_rpc_pb2, pathinfo_rpc_pb2
from appliance.rpc.chunk import encode_chunk
from appliance.store import schema
from appliance.store.store import Store
from tests.contracts.rig import fresh_bytes
from tests.fakes.daemon_process import DaemonProcess
from tests.rpc.wire import StreamUnary, UnaryStream, UnaryUnary, run

BLOBS = "/tvix.castore.v1.BlobService"
STAT_EMPTY = castore_rpc_pb2.StatBlobRequest(digest=EMPTY_DIGEST).SerializeToString()
LARGE_MESSAGE_SIZE = 15 << 20
NUM_LARGE = 40
# A whole message each took twice as many MiB.
NUM_SLOW = 200
# All at once took 900 MiB.
MEMORY_LIMIT_BYTES = 550 << 20
CALLS_MAX = 1024
NUM_CALLS = CALLS_MAX + 50

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


def channel_to(daemon: DaemonProcess) -> grpc.aio.Channel:
    options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    return grpc.aio.insecure_channel(f"unix:{daemon.socket}", options=options)


@pytest.mark.slow
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
        assert daemon.memory_bytes("VmHWM") < MEMORY_LIMIT_BYTES


def test_calls_that_send_nothing_hold_up_nobody(tmp_path: Path) -> None:
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
        async with channel_to(daemon) as slow, channel_to(daemon) as other:
            pieces = [fresh_bytes(1 << 20) for _ in range(4)]
            await put(other, *map(encode_chunk, pieces))
            request = castore_rpc_pb2.ReadBlobRequest(digest=Digest.of(b"".join(pieces)))
            method: UnaryStream = slow.unary_stream(f"{BLOBS}/Read")
            before_bytes = daemon.memory_bytes()
            calls = [method(request.SerializeToString()) for _ in range(NUM_SLOW)]
            for call in calls:
                assert await call.read()
            assert await stat(other) == Code.OK
            return daemon.memory_bytes("VmHWM") - before_bytes

    with DaemonProcess(f"lmdb://{tmp_path}/store", tmp_path) as daemon:
        assert asyncio.run(ask(daemon)) < NUM_SLOW << 20


def test_more_calls_than_there_may_be_are_refused(tmp_path: Path) -> None:
    async def flood(daemon: DaemonProcess) -> list[Code]:
        async with channel_to(daemon) as channel, channel_to(daemon) as other:
            method: StreamUnary = channel.stream_unary(f"{BLOBS}/Put")
            calls = [method() for _ in range(NUM_CALLS)]
            tasks = [asyncio.create_task(call.code()) for call in calls]
            ended = asyncio.as_completed(tasks, timeout=30)
            codes = [await next(ended) for _ in range(NUM_CALLS - CALLS_MAX)]
            assert await stat(other) == Code.RESOURCE_EXHAUSTED
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


def test_calls_that_fail_are_logged_a_few_times(tmp_path: Path) -> None:
    async def flood(daemon: DaemonProcess) -> None:
        async with channel_to(daemon) as channel:
            method: UnaryUnary = channel.unary_unary("/grpc.health.v1.Health/Check")
            for _ in range(20 * BURST):
                assert await method(b"\xff", timeout=30).code() == Code.UNKNOWN

    with DaemonProcess(f"lmdb://{tmp_path}/store", tmp_path) as daemon:
        asyncio.run(flood(daemon))
        assert daemon.log().count("Unexpected [DecodeError]") == BURST


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
        asyncio.run(flood(f"unix:{daemon.socket}", 10 * BURST))
        asyncio.run(flood(daemon.tcp, 1))
        assert daemon.log().count(": unix: storage error") == BURST
        assert daemon.log().count(": ipv6:%5B::1%5D: storage error") == 1
