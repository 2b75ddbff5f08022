"""The service for many objects in a message, byte by byte, on another HTTP/2 stack at either end.

The bytes are written by hand: another release of this program, or another program, sends and
expects these. `GOLDEN` is what they were when this was written.
"""

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import h2.connection
import h2.events
import pytest
from blake3 import blake3
from h2.config import H2Configuration

from appliance.castore.digest import Digest
from appliance.castore.directory import Directory, DirectoryNode, FileNode
from appliance.services.addresses import GrpcAddress, unix_target
from appliance.services.grpc_blobs import GrpcBlobService
from appliance.services.grpc_client import Peer
from appliance.services.grpc_directories import GrpcDirectoryService
from tests.contracts.rig import put_closure
from tests.fakes.daemon_process import DaemonProcess
from tests.rpc.test_chunk_frames import field, message
from tests.rpc.test_frames import (
    DEADLINE_S,
    INVALID_ARGUMENT,
    NOT_FOUND,
    OK,
    connected,
    shape,
)
from tests.rpc.wire import run

SERVICE: Final = "appliance.castore.v1.BulkService"
CONTENTS: Final = [b"one", b"", b"of two pages" * 500]
DIGESTS: Final = [blake3(content).digest() for content in CONTENTS]
UNIMPLEMENTED: Final = 12
ABSENT: Final = bytes(range(32))
# From the first 2 bytes on, 7 bytes of the last content: digest, start, size.
READ_RANGE: Final = field(1, DIGESTS[2]) + b"\x10\x02\x18\x07"
# A directory `sub` with an empty file, and the directory above it: castore.proto, by hand.
LEAF: Final = field(2, field(1, b"empty") + field(2, blake3().digest()))
TOP: Final = field(1, field(1, b"sub") + field(2, blake3(LEAF).digest()) + b"\x18\x01")
PUT_BLOBS: Final = b"".join(field(1, content) for content in CONTENTS)
HAS_BLOBS: Final = b"".join(field(1, digest) for digest in [*DIGESTS, ABSENT])
PUT_DIRECTORIES: Final = field(1, LEAF) + field(1, TOP)
GOLDEN: Final = {
    "PutBlobs": "a330e30c979d053f",
    "HasBlobs": "2fb064b91b07c5b1",
    "PutDirectories": "eeb27d6d98e92849",
    "ReadRange": "461ce8da26792821",
}


def directories() -> tuple[Directory, Directory]:
    leaf = Directory(files=[FileNode(b"empty", Digest.of(b""), 0, executable=False)])
    return leaf, Directory([DirectoryNode(b"sub", leaf.digest(), 1)])


def test_messages_are_what_they_were() -> None:
    messages = {
        "PutBlobs": PUT_BLOBS,
        "HasBlobs": HAS_BLOBS,
        "PutDirectories": PUT_DIRECTORIES,
        "ReadRange": READ_RANGE,
    }
    assert {name: blake3(one).hexdigest()[:16] for name, one in messages.items()} == GOLDEN
    assert [one.to_bytes() for one in directories()] == [LEAF, TOP]


# --- What the daemon takes, and answers ---


def test_blobs_are_put_and_found_frame_by_frame(daemon: DaemonProcess) -> None:
    with connected(daemon) as client:
        put = client.ask(f"{SERVICE}/PutBlobs", PUT_BLOBS)
        found = client.ask(f"{SERVICE}/HasBlobs", HAS_BLOBS)
    assert shape(put) == shape(found) == (["headers", "data", "trailers"], OK)
    assert message(put) == b"".join(field(1, digest) for digest in DIGESTS)
    assert message(found) == field(1, b"\x01\x01\x01\x00")


def test_a_range_of_a_blob_is_sent_frame_by_frame(daemon: DaemonProcess) -> None:
    with connected(daemon) as client:
        client.ask(f"{SERVICE}/PutBlobs", PUT_BLOBS)
        found = client.ask(f"{SERVICE}/ReadRange", READ_RANGE)
        beyond = client.ask(f"{SERVICE}/ReadRange", field(1, DIGESTS[0]) + b"\x10\x02\x18\x7f")
        past = client.ask(f"{SERVICE}/ReadRange", field(1, DIGESTS[0]) + b"\x10\x09\x18\x01")
        absent = client.ask(f"{SERVICE}/ReadRange", field(1, ABSENT) + b"\x18\x01")
        huge = client.ask(
            f"{SERVICE}/ReadRange", field(1, DIGESTS[0]) + b"\x10" + b"\xff" * 9 + b"\x01"
        )
    assert shape(found) == (["headers", "data", "trailers"], OK)
    assert message(found) == field(1, CONTENTS[2][2:9])
    assert message(beyond) == field(1, b"e")
    assert shape(past) == (["headers", "trailers"], OK)
    assert shape(absent)[1] == NOT_FOUND
    assert shape(huge)[1] == INVALID_ARGUMENT


def test_a_daemon_in_front_of_another_sends_no_ranges(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    with DaemonProcess(daemon.unix_uri, tmp_path / "near") as near, connected(near) as client:
        assert shape(client.ask(f"{SERVICE}/ReadRange", READ_RANGE))[1] == UNIMPLEMENTED


def test_many_messages_of_blobs_have_one_answer(daemon: DaemonProcess) -> None:
    sent = [field(1, content) for content in CONTENTS]
    answer = run(f"unix:{daemon.socket}", lambda wire: wire.send(f"{SERVICE}/PutBlobs", sent))
    assert answer.messages == [b"".join(field(1, digest) for digest in DIGESTS)]


def test_directories_are_put_frame_by_frame(daemon: DaemonProcess) -> None:
    with connected(daemon) as client:
        put = client.ask(f"{SERVICE}/PutDirectories", PUT_DIRECTORIES)
        again = client.ask(f"{SERVICE}/PutDirectories", PUT_DIRECTORIES)
        top_first = client.ask(f"{SERVICE}/PutDirectories", field(1, TOP) + field(1, LEAF))
    assert shape(put) == (["headers", "data", "trailers"], OK)
    assert message(put) == message(again) == field(1, blake3(TOP).digest())
    assert shape(top_first)[1] == INVALID_ARGUMENT


@pytest.mark.parametrize("method", ["HasBlobs", "PutBlobs", "PutDirectories"])
def test_what_is_no_message_is_refused(daemon: DaemonProcess, method: str) -> None:
    with connected(daemon) as client:
        assert shape(client.ask(f"{SERVICE}/{method}", b"\xff"))[1] == INVALID_ARGUMENT


# --- What the client sends, and takes ---


class Recorder:
    """Serves one connection with written answers, and records what was asked.

    Attributes:
        asked: for each call, the method, and the messages with their prefixes.
    """

    def __init__(self, path: Path, answers: dict[str, bytes]) -> None:
        self.asked: list[tuple[str, bytes]] = []
        self._answers = answers
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen()
        self._calls: dict[int, tuple[str, bytearray]] = {}

    def serve(self) -> None:
        """Serve until the client hangs up."""
        with self._listening, self._listening.accept()[0] as sock:
            sock.settimeout(DEADLINE_S)
            connection = h2.connection.H2Connection(H2Configuration(client_side=False))
            connection.initiate_connection()
            sock.sendall(connection.data_to_send())
            while data := sock.recv(1 << 16):
                for event in connection.receive_data(data):
                    self._take(connection, event)
                sock.sendall(connection.data_to_send())

    def _take(self, connection: h2.connection.H2Connection, event: h2.events.Event) -> None:
        match event:
            case h2.events.RequestReceived():
                headers = dict(event.headers)
                assert headers[b"content-type"] == b"application/grpc"
                assert headers[b"te"] == b"trailers"
                assert headers[b":authority"] == b"localhost"
                method = headers[b":path"].decode().removeprefix("/")
                self._calls[event.stream_id] = method, bytearray()
            case h2.events.DataReceived():
                self._calls[event.stream_id][1].extend(event.data)
                size = event.flow_controlled_length
                connection.acknowledge_received_data(size, event.stream_id)
            case h2.events.StreamEnded():
                method, sent = self._calls.pop(event.stream_id)
                self.asked.append((method, bytes(sent)))
                self._answer(connection, event.stream_id, self._answers[method])

    def _answer(self, connection: h2.connection.H2Connection, stream: int, answer: bytes) -> None:
        headers = [(":status", "200"), ("content-type", "application/grpc")]
        connection.send_headers(stream, headers)
        connection.send_data(stream, framed(answer))
        connection.send_headers(stream, [("grpc-status", "0")], end_stream=True)


def framed(content: bytes) -> bytes:
    return b"\0" + len(content).to_bytes(4, "big") + content


@contextmanager
def recorder(directory: Path, answers: dict[str, bytes]) -> Iterator[Recorder]:
    made = Recorder(directory / "recorder.sock", answers)
    thread = threading.Thread(target=made.serve)
    thread.start()
    yield made
    thread.join(DEADLINE_S)
    assert not thread.is_alive()


def with_peer(directory: Path, work: Callable[[Peer], Awaitable[None]]) -> None:
    async def main() -> None:
        peer = Peer(GrpcAddress(unix_target(directory / "recorder.sock"), is_tls=False))
        try:
            await work(peer)
        finally:
            await peer.close()

    asyncio.run(main())


def test_the_client_sends_these_bytes_and_takes_those(tmp_path: Path) -> None:
    leaf, top = directories()
    answers = {
        f"{SERVICE}/HasBlobs": field(1, b"\x01\x01\x01\x00"),
        f"{SERVICE}/PutBlobs": b"".join(field(1, digest) for digest in DIGESTS),
        f"{SERVICE}/PutDirectories": field(1, blake3(TOP).digest()),
    }

    async def work(peer: Peer) -> None:
        many = await GrpcBlobService(peer).many()
        assert many is not None
        await many.put_many(CONTENTS)
        digests = [Digest(digest) for digest in [*DIGESTS, ABSENT]]
        assert list(await many.has_many(digests)) == [True, True, True, False]
        assert await put_closure(GrpcDirectoryService(peer), leaf, top) == top.digest()

    with recorder(tmp_path, answers) as recorded:
        with_peer(tmp_path, work)
    assert recorded.asked == [
        (f"{SERVICE}/HasBlobs", framed(b"")),
        (f"{SERVICE}/PutBlobs", framed(PUT_BLOBS)),
        (f"{SERVICE}/HasBlobs", framed(HAS_BLOBS)),
        (f"{SERVICE}/PutDirectories", framed(PUT_DIRECTORIES)),
    ]
