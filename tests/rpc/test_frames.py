"""What a call is answered with, frame by frame, as another HTTP/2 stack than grpcio's sees it."""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import h2.connection
import h2.events
import pytest
from grpclib.client import Channel, Stream
from grpclib.const import Cardinality, Status
from grpclib.exceptions import GRPCError
from h2.config import H2Configuration
from h2.settings import SettingCodes

from appliance.castore.digest import EMPTY_DIGEST, Digest
from appliance.protos import castore_pb2, castore_rpc_pb2
from appliance.services.grpc_messages import encode_chunk
from tests.contracts.rig import fresh_bytes, fresh_leaf
from tests.fakes.daemon_process import DaemonProcess
from tests.rpc.wire import FAMILIES, run

T = TypeVar("T")

DEADLINE_S = 30
OK = 0
NOT_FOUND = 5
INVALID_ARGUMENT = 3


class Http2Client:
    """One connection that is a client's by the letter, and never waits for more than DEADLINE_S."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sock.settimeout(DEADLINE_S)
        config = H2Configuration()
        self._connection = h2.connection.H2Connection(config)
        self._connection.initiate_connection()
        self._flush()

    def take_nothing(self) -> None:
        """Let no stream send a byte."""
        self._connection.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 0})
        self._flush()

    def send(self, method: str, message: bytes) -> int:
        """Begin a call of one message; return its stream."""
        stream = self._connection.get_next_available_stream_id()
        headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", f"/{method}"),
            (":authority", "localhost"),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
        ]
        self._connection.send_headers(stream, headers)
        framed = b"\0" + len(message).to_bytes(4, "big") + message
        self._connection.send_data(stream, framed, end_stream=True)
        self._flush()
        return stream

    def ask(self, method: str, message: bytes) -> list[h2.events.Event]:
        """Return what comes on the stream of a call, up to its end."""
        stream = self.send(method, message)
        seen: list[h2.events.Event] = []
        while not any(isinstance(event, h2.events.StreamEnded) for event in seen):
            data = self._sock.recv(1 << 16)
            assert data, "the connection has ended"
            for event in self._connection.receive_data(data):
                assert not isinstance(event, h2.events.StreamReset)
                if isinstance(event, h2.events.DataReceived):
                    size = event.flow_controlled_length
                    self._connection.acknowledge_received_data(size, event.stream_id)
                if getattr(event, "stream_id", None) == stream:
                    seen.append(event)
            self._flush()
        return seen

    def _flush(self) -> None:
        self._sock.sendall(self._connection.data_to_send())


@contextmanager
def connected(daemon: DaemonProcess) -> Iterator[Http2Client]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(daemon.socket))
        yield Http2Client(sock)


def shape(events: list[h2.events.Event]) -> tuple[list[str], int]:
    """Return the kinds of frames, and the status in the last headers."""
    kinds: list[str] = []
    status = -1
    for event in events:
        match event:
            case h2.events.ResponseReceived() | h2.events.TrailersReceived():
                is_first = isinstance(event, h2.events.ResponseReceived)
                kinds.append("headers" if is_first else "trailers")
                status = int(dict(event.headers).get(b"grpc-status", b"-1"))
            case h2.events.DataReceived():
                kinds.append("data")
    return kinds, status


def by_digest(digest: Digest, *, is_recursive: bool = False) -> bytes:
    message = castore_rpc_pb2.GetDirectoryRequest(digest=digest, recursive=is_recursive)
    return message.SerializeToString()


@pytest.mark.parametrize("castore", [castore for castore, _store in FAMILIES])
def test_headers_of_a_directory_that_is_not_there_come_before_its_status(
    daemon: DaemonProcess, castore: str
) -> None:
    method = f"{castore}.DirectoryService/Get"
    with connected(daemon) as client:
        absent = shape(client.ask(method, by_digest(fresh_leaf().digest())))
        invalid = shape(client.ask(method, by_digest(Digest(bytes(32)))[:-1]))

    assert absent == (["headers", "trailers"], NOT_FOUND)
    assert invalid == (["headers", "trailers"], INVALID_ARGUMENT)


def test_stream_of_nothing_has_headers_all_the_same(daemon: DaemonProcess) -> None:
    closure = by_digest(fresh_leaf().digest(), is_recursive=True)
    empty = castore_rpc_pb2.ReadBlobRequest(digest=EMPTY_DIGEST).SerializeToString()
    with connected(daemon) as client:
        for method, request in (("DirectoryService/Get", closure), ("BlobService/Read", empty)):
            events = client.ask(f"snix.castore.v1.{method}", request)
            assert shape(events) == (["headers", "trailers"], OK)


@pytest.mark.parametrize("call", ["Stat", "Read"])
def test_headers_of_a_blob_that_is_not_there_are_its_status(
    daemon: DaemonProcess, call: str
) -> None:
    request = castore_rpc_pb2.ReadBlobRequest(digest=Digest.of(fresh_bytes()))
    with connected(daemon) as client:
        method = f"snix.castore.v1.BlobService/{call}"
        events = client.ask(method, request.SerializeToString())
    assert shape(events) == (["headers"], NOT_FOUND)


@pytest.mark.slow
def test_directory_that_is_there_has_data_between(daemon: DaemonProcess) -> None:
    leaf = fresh_leaf()
    service = "snix.castore.v1.DirectoryService"
    run(f"unix:{daemon.socket}", lambda wire: wire.send(f"{service}/Put", [leaf.to_bytes()]))
    with connected(daemon) as client:
        events = client.ask(f"{service}/Get", by_digest(leaf.digest()))
    assert shape(events) == (["headers", "data", "trailers"], OK)


# A client of another library.


def on_channel(daemon: DaemonProcess, work: Callable[[Channel], Awaitable[T]]) -> T:
    async def main() -> T:
        async with asyncio.timeout(DEADLINE_S), Channel(path=str(daemon.socket)) as channel:
            return await work(channel)

    return asyncio.run(main())


def opened(
    channel: Channel, method: str, cardinality: Cardinality, request: Any, reply: Any
) -> Stream[Any, Any]:
    return channel.request(f"/snix.castore.v1.{method}", cardinality, request, reply)


def test_missing_directory_is_told_after_the_headers(daemon: DaemonProcess) -> None:
    async def ask(channel: Channel) -> Status:
        stream = opened(
            channel,
            "DirectoryService/Get",
            Cardinality.UNARY_STREAM,
            castore_rpc_pb2.GetDirectoryRequest,
            castore_pb2.Directory,
        )
        async with stream:
            digest = fresh_leaf().digest()
            await stream.send_message(castore_rpc_pb2.GetDirectoryRequest(digest=digest), end=True)
            await stream.recv_initial_metadata()
            assert await stream.recv_message() is None
            with pytest.raises(GRPCError) as caught:
                await stream.recv_trailing_metadata()
            return caught.value.status

    assert on_channel(daemon, ask) is Status.NOT_FOUND


def test_blob_is_put_and_read_by_another_library(daemon: DaemonProcess) -> None:
    content = fresh_bytes(3 << 20)

    async def work(channel: Channel) -> bytes:
        chunk, answer = castore_rpc_pb2.BlobChunk, castore_rpc_pb2.PutBlobResponse
        put = opened(channel, "BlobService/Put", Cardinality.STREAM_UNARY, chunk, answer)
        async with put:
            for start in range(0, len(content), 1 << 20):
                await put.send_message(chunk.FromString(encode_chunk(content[start:][: 1 << 20])))
            await put.end()
            kept = await put.recv_message()
            assert kept is not None
        request = castore_rpc_pb2.ReadBlobRequest
        read = opened(channel, "BlobService/Read", Cardinality.UNARY_STREAM, request, chunk)
        async with read:
            await read.send_message(request(digest=kept.digest), end=True)
            return b"".join([message.data async for message in read])

    assert on_channel(daemon, work) == content


@pytest.mark.slow
def test_watcher_of_health_that_takes_nothing_is_its_own_affair(tmp_path: Path) -> None:
    with (
        DaemonProcess(f"lmdb://{tmp_path}/store", tmp_path) as daemon,
        connected(daemon) as stuck,
        connected(daemon) as other,
    ):
        stuck.take_nothing()
        stuck.send("grpc.health.v1.Health/Watch", b"")
        assert shape(other.ask("grpc.health.v1.Health/Check", b""))[1] == OK
        daemon.process.terminate()
        assert daemon.process.wait(DEADLINE_S) == 0
