"""What a client makes of a service that has had enough: only a full disk is called one."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from appliance.castore.digest import Digest
from appliance.castore.directory import Directory, FileNode
from appliance.errors import ServiceLimitError, ServiceUnavailableError, StoreFullError
from appliance.rpc.calls import Context
from appliance.services.addresses import GrpcAddress, unix_target
from appliance.services.contracts import Services
from appliance.services.grpc_client import Peer, Sending
from appliance.services.grpc_messages import MESSAGE_MAX
from appliance.services.open_services import LoopThread
from tests.contracts.rig import Rig, put_blob
from tests.fakes.daemon_process import DaemonProcess
from tests.importer.trees import small_disk

pytestmark = pytest.mark.slow

if TYPE_CHECKING:
    from appliance.rpc.calls import Handler

REFUSAL = "the quota of this month is used up"


def directory_of_size(least_bytes: int) -> Directory:
    size = 250
    files = [
        FileNode(b"%0*d" % (size, number), Digest(bytes(32)), 1, executable=False)
        for number in range(least_bytes // size)
    ]
    return Directory(files=files)


def test_full_disk_of_a_daemon_is_a_full_disk(tmp_path: Path) -> None:
    async def put(services: Services) -> Digest:
        return await put_blob(services.blobs, os.urandom(40 << 20))

    with (
        small_disk(tmp_path / "disk", "24m") as disk,
        DaemonProcess(f"lmdb://{disk}/store", tmp_path) as daemon,
        DaemonProcess(daemon.unix_uri, tmp_path / "proxy") as proxy,
    ):
        for uri in (daemon.unix_uri, proxy.unix_uri):
            with pytest.raises(StoreFullError, match=r"daemon\.sock: storage error: "):
                Rig(uri).run(put)


def test_message_that_a_daemon_does_not_take_is_no_full_disk(tmp_path: Path) -> None:
    async def put(services: Services) -> Digest:
        return await services.directories.put(directory_of_size(MESSAGE_MAX))

    with (
        DaemonProcess(f"lmdb://{tmp_path}/store", tmp_path) as daemon,
        pytest.raises(ServiceLimitError, match=r"daemon\.sock: .*Sent message larger than max"),
    ):
        Rig(daemon.unix_uri).run(put)


async def start_other(path: Path) -> grpc.aio.Server:
    """Serve as other servers do: no message over 4 MiB, which is the default, and no put."""

    async def stat(_request: bytes, context: Context) -> bytes:
        return await context.abort(grpc.StatusCode.NOT_FOUND)

    async def put(requests: AsyncIterator[bytes], context: Context) -> bytes:
        async for _request in requests:
            pass
        return await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, REFUSAL)

    handlers: Mapping[str, Mapping[str, Handler]] = {
        "BlobService": {"Stat": grpc.unary_unary_rpc_method_handler(stat)},
        "DirectoryService": {"Put": grpc.stream_unary_rpc_method_handler(put)},
    }
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        [
            grpc.method_handlers_generic_handler(f"tvix.castore.v1.{name}", dict(methods))
            for name, methods in handlers.items()
        ]
    )
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    return server


@pytest.fixture
def other(tmp_path: Path) -> Iterator[str]:
    thread = LoopThread("other")
    server = thread.run_and_wait(start_other(tmp_path / "other.sock"))
    yield f"grpc+unix://{tmp_path}/other.sock"
    thread.run_and_wait(server.stop(0))
    thread.close()


@pytest.mark.parametrize(
    ("size", "reason"), [(6 << 20, "Received message larger than max"), (1000, REFUSAL)]
)
def test_what_another_server_says_of_its_limits_is_quoted(
    other: str, tmp_path: Path, size: int, reason: str
) -> None:
    async def put(services: Services) -> Digest:
        return await services.directories.put(directory_of_size(size))

    with DaemonProcess(other, tmp_path) as proxy:
        for uri in (other, proxy.unix_uri):
            with pytest.raises(ServiceLimitError, match=reason):
                Rig(uri).run(put)


def test_server_that_takes_all_and_never_answers_is_given_up(tmp_path: Path) -> None:
    async def take(requests: AsyncIterator[bytes], _context: Context) -> bytes:
        async for _ in requests:
            pass
        await asyncio.Event().wait()
        raise AssertionError("nobody sets that event")

    async def main() -> None:
        server = grpc.aio.server()
        handler: Handler = grpc.stream_unary_rpc_method_handler(take)
        server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler("other", {"Put": handler})]
        )
        server.add_insecure_port(unix_target(tmp_path / "other.sock"))
        await server.start()
        peer = Peer(GrpcAddress(unix_target(tmp_path / "other.sock"), is_tls=False))
        sending = Sending(peer, "other/Put", kept_timeout_s=0.2)
        await sending.send(b"all")
        with pytest.raises(ServiceUnavailableError, match=r"other\.sock: no answer within"):
            await sending.finish()
        await peer.close()
        await server.stop(0)

    asyncio.run(asyncio.wait_for(main(), 30))


async def send_without_end(sending: Sending) -> None:
    while True:
        await sending.send(bytes(1 << 16))


def test_server_that_ends_a_call_early_is_away_whatever_is_known_of_it(tmp_path: Path) -> None:
    async def leave(requests: AsyncIterator[bytes], context: Context) -> bytes:
        for _ in range(20):
            await anext(requests)
        return await context.abort(grpc.StatusCode.UNAVAILABLE, "it stops")

    async def main() -> None:
        server = grpc.aio.server()
        handler: Handler = grpc.stream_unary_rpc_method_handler(leave)
        server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler("other", {"Put": handler})]
        )
        server.add_insecure_port(unix_target(tmp_path / "other.sock"))
        await server.start()
        peer = Peer(GrpcAddress(unix_target(tmp_path / "other.sock"), is_tls=False))
        for _ in range(100):  # about one in five fails to send before it knows of the answer
            with pytest.raises(ServiceUnavailableError, match=r"it stops|ended the call early"):
                await send_without_end(Sending(peer, "other/Put"))
        await peer.close()
        await server.stop(0)

    asyncio.run(asyncio.wait_for(main(), 30))
