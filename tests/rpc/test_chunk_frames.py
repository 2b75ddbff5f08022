"""Chunks as Snix's client asks for them, and the bytes of the answers, on other HTTP/2 stacks."""

import random
import time
from typing import Final

import h2.events
import pytest
from blake3 import blake3
from grpclib.client import Channel
from grpclib.const import Cardinality, Status
from grpclib.exceptions import GRPCError

from appliance.castore.chunking import SNIX, Chunker, unpack
from appliance.castore.digest import Digest
from appliance.protos import castore_rpc_pb2 as pb
from tests.castore.test_chunking import oracle
from tests.fakes.daemon_process import DaemonProcess
from tests.rpc.test_frames import connected, on_channel, opened
from tests.rpc.wire import run

# Two mebibytes that are the same everywhere.
CONTENT: Final = random.Random(7).randbytes(2 << 20)
SERVICE: Final = "snix.castore.v1.BlobService"


def varint(number: int) -> bytes:
    encoded = b""
    while number > 127:
        encoded += bytes([number & 127 | 128])
        number >>= 7
    return encoded + bytes([number])


def field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + varint(len(content)) + content


def chunk_list(content: bytes) -> bytes:
    """Return the StatBlobResponse for `content`, encoded by hand and cut by the tests' oracle."""
    encoded = b""
    at = 0
    for size in oracle(content, SNIX):
        digest = blake3(content[at : at + size]).digest()
        encoded += field(2, field(1, digest) + b"\x10" + varint(size))
        at += size
    return encoded


def put(daemon: DaemonProcess, content: bytes) -> bytes:
    pieces = [field(1, content[at : at + (1 << 20)]) for at in range(0, len(content), 1 << 20)]
    answer = run(f"unix:{daemon.socket}", lambda wire: wire.send(f"{SERVICE}/Put", pieces))
    assert answer.messages == [field(1, blake3(content).digest())]
    return blake3(content).digest()


def message(events: list[h2.events.Event]) -> bytes:
    """Return the one message of an answer, without its prefix."""
    data = b"".join(event.data for event in events if isinstance(event, h2.events.DataReceived))
    assert data[:5] == b"\0" + (len(data) - 5).to_bytes(4, "big")
    return data[5:]


@pytest.mark.slow
def test_the_list_of_chunks_byte_by_byte(daemon: DaemonProcess) -> None:
    digest = put(daemon, CONTENT)
    with connected(daemon) as client:
        asked = message(client.ask(f"{SERVICE}/Stat", field(1, digest) + b"\x10\x01"))
        unasked = message(client.ask(f"{SERVICE}/Stat", field(1, digest)))
    assert asked == chunk_list(CONTENT)
    # As it was when this was written.
    expected = "1740fcb36176c3873c676d31345f098063fd06f3f1e21324fd934abe58e5412b"
    assert blake3(asked).hexdigest() == expected
    assert unasked == b""


@pytest.mark.slow
def test_a_chunk_byte_by_byte(daemon: DaemonProcess) -> None:
    first = oracle(CONTENT, SNIX)[0]
    digest = blake3(CONTENT[:first]).digest()
    put(daemon, CONTENT)
    with connected(daemon) as client:
        stat = message(client.ask(f"{SERVICE}/Stat", field(1, digest) + b"\x10\x01"))
        read = message(client.ask(f"{SERVICE}/Read", field(1, digest)))
    assert stat == b""
    assert read == field(1, CONTENT[:first])


class SnixReader:
    """Reads blobs as the client of Snix does: whole, or chunk by chunk after a seek.

    Attributes:
        num_received: bytes of content received.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.num_received = 0

    async def chunks(self, digest: bytes) -> list[pb.StatBlobResponse.ChunkMeta]:
        stream = opened(
            self._channel, "BlobService/Stat", Cardinality.UNARY_UNARY,
            pb.StatBlobRequest, pb.StatBlobResponse,
        )  # fmt: skip
        async with stream:
            await stream.send_message(pb.StatBlobRequest(digest=digest, send_chunks=True), end=True)
            answer = await stream.recv_message()
        assert answer is not None
        return list(answer.chunks)

    async def read_at(self, digest: bytes, offset: int, size: int) -> bytes:
        """Open a blob, seek to `offset`, and read up to `size` bytes."""
        chunks = await self.chunks(digest)
        if len(chunks) <= 1:
            return (await self._receive(digest))[offset : offset + size]
        start = 0
        content = b""
        for chunk in chunks:
            if start + chunk.size > offset and len(content) < size:
                skipped = max(offset - start, 0)
                content += await self.read_at(chunk.digest, skipped, size - len(content))
            start += chunk.size
        return content

    async def _receive(self, digest: bytes) -> bytes:
        stream = opened(
            self._channel, "BlobService/Read", Cardinality.UNARY_STREAM,
            pb.ReadBlobRequest, pb.BlobChunk,
        )  # fmt: skip
        async with stream:
            await stream.send_message(pb.ReadBlobRequest(digest=digest), end=True)
            content = b"".join([part.data async for part in stream])
        assert blake3(content).digest() == digest
        self.num_received += len(content)
        return content


@pytest.mark.slow
def test_a_client_like_that_of_snix_receives_only_the_chunks_that_it_reads(
    daemon: DaemonProcess,
) -> None:
    content = random.Random(8).randbytes(24 << 20)
    offsets = [0, 5_000_000, (24 << 20) - 100, 12_345_678]
    digest = put(daemon, content)

    async def work(channel: Channel) -> tuple[float, float]:
        reader = SnixReader(channel)
        began_s = time.perf_counter()
        for offset in offsets:
            found = await reader.read_at(digest, offset, 4096)
            assert found == content[offset : offset + 4096]
        by_chunks_s = time.perf_counter() - began_s
        assert reader.num_received <= len(offsets) * 2 * SNIX.max
        began_s = time.perf_counter()
        assert await reader._receive(digest) == content
        return by_chunks_s / len(offsets), time.perf_counter() - began_s

    by_chunk_s, whole_s = on_channel(daemon, work)
    assert by_chunk_s < whole_s / 2


def test_a_chunk_that_nobody_has_is_not_found(daemon: DaemonProcess) -> None:
    async def work(channel: Channel) -> Status:
        try:
            await SnixReader(channel).chunks(Digest.of(b"never put"))
        except GRPCError as exc:
            return exc.status
        return Status.OK

    assert on_channel(daemon, work) is Status.NOT_FOUND


def test_the_answer_has_what_the_chunker_says(daemon: DaemonProcess) -> None:
    chunker = Chunker()
    chunker.update(CONTENT)
    expected = [(bytes(chunk.digest), chunk.size) for chunk in unpack(chunker.finish())]
    digest = put(daemon, CONTENT)

    async def work(channel: Channel) -> list[tuple[bytes, int]]:
        return [(chunk.digest, chunk.size) for chunk in await SnixReader(channel).chunks(digest)]

    assert on_channel(daemon, work) == expected
