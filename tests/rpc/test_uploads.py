"""Uploads that do not come to their end, and those that come together."""

import asyncio

import grpc
import pytest

from appliance.castore.digest import Digest
from appliance.protos import castore_rpc_pb2
from tests.contracts.rig import fresh_bytes, fresh_leaf
from tests.fakes.daemon_process import DaemonProcess
from tests.rpc.wire import StreamUnary, connected

NUM_UPLOADS = 100


@pytest.mark.slow
def test_cancelled_uploads_leave_nothing(target: str) -> None:
    leaves = [fresh_leaf() for _ in range(NUM_UPLOADS)]

    async def upload(channel: grpc.aio.Channel, message: bytes) -> None:
        method: StreamUnary = channel.stream_unary("/tvix.castore.v1.DirectoryService/Put")
        call = method()
        await call.write(message)
        call.cancel()

    async def main() -> None:
        async with grpc.aio.insecure_channel(target) as channel:
            await asyncio.gather(*(upload(channel, leaf.to_bytes()) for leaf in leaves))
        async with connected(target) as wire:
            for leaf in leaves:
                request = castore_rpc_pb2.GetDirectoryRequest(digest=leaf.digest())
                answer = await wire.ask(
                    "tvix.castore.v1.DirectoryService/Get", request.SerializeToString()
                )
                assert answer.code == grpc.StatusCode.NOT_FOUND

    asyncio.run(main())


def test_uploads_of_a_client_that_goes_away_leave_nothing(target: str) -> None:
    leaves = [fresh_leaf() for _ in range(NUM_UPLOADS)]

    async def main() -> None:
        for start in range(0, NUM_UPLOADS, 10):
            channel = grpc.aio.insecure_channel(
                target, options=[("grpc.use_local_subchannel_pool", 1)]
            )
            for leaf in leaves[start : start + 10]:
                method: StreamUnary = channel.stream_unary("/tvix.castore.v1.DirectoryService/Put")
                call = method()
                await call.write(leaf.to_bytes())
            await channel.close()
        async with connected(target) as wire:
            for leaf in leaves:
                request = castore_rpc_pb2.GetDirectoryRequest(digest=leaf.digest())
                answer = await wire.ask(
                    "tvix.castore.v1.DirectoryService/Get", request.SerializeToString()
                )
                assert answer.code == grpc.StatusCode.NOT_FOUND

    asyncio.run(main())


@pytest.mark.slow
@pytest.mark.parametrize("size", [100, 100_000])
def test_uploads_at_the_same_time_all_arrive(target: str, size: int) -> None:
    contents = [fresh_bytes(size) for _ in range(NUM_UPLOADS)]
    contents += contents[:20]  # some of them twice

    async def main() -> None:
        async with connected(target) as wire:

            async def put(content: bytes) -> None:
                message = castore_rpc_pb2.BlobChunk(data=content).SerializeToString()
                answer = await wire.send("tvix.castore.v1.BlobService/Put", [message])
                assert answer.code == grpc.StatusCode.OK, answer.text
                response = castore_rpc_pb2.PutBlobResponse.FromString(answer.messages[0])
                assert response.digest == Digest.of(content)
                read = await wire.ask(
                    "tvix.castore.v1.BlobService/Read", response.SerializeToString()
                )
                assert read.messages == [message], read[:2]

            await asyncio.gather(*map(put, contents))

    asyncio.run(main())


def test_nothing_temporary_is_left_by_uploads(daemon: DaemonProcess, target: str) -> None:
    async def main() -> None:
        async with grpc.aio.insecure_channel(target) as channel:
            method: StreamUnary = channel.stream_unary("/tvix.castore.v1.BlobService/Put")
            call = method()
            for _ in range(3):
                message = castore_rpc_pb2.BlobChunk(data=fresh_bytes(100_000))
                await call.write(message.SerializeToString())
            call.cancel()
        async with connected(target) as wire:  # answered after the cancellation was
            message = castore_rpc_pb2.BlobChunk(data=fresh_bytes(100_000))
            answer = await wire.send(
                "tvix.castore.v1.BlobService/Put", [message.SerializeToString()]
            )
            assert answer.code == grpc.StatusCode.OK

    asyncio.run(main())
    left = [path for path in (daemon.socket.parent / "store/tmp").rglob("*") if path.is_file()]
    assert left == []
