"""The blob service of a peer, over gRPC (castore_rpc.proto: BlobService)."""

from collections.abc import Sequence
from typing import Final

import grpc
from blake3 import blake3
from google.protobuf.message import DecodeError

from appliance.castore.chunking import BlobChunk
from appliance.castore.digest import Digest
from appliance.errors import (
    ContentMissingError,
    DirectoryError,
    InvalidRequestError,
    ServiceUnavailableError,
    StoreError,
)
from appliance.protos import bulk_pb2
from appliance.protos import castore_rpc_pb2 as pb
from appliance.services.contracts import BlobReader, BlobWriter, Buffer
from appliance.services.grpc_client import Peer, Sending, StreamCall
from appliance.services.grpc_many_blobs import GrpcManyBlobs
from appliance.services.grpc_messages import BULK, CONTENT_MAX, decode_chunk_untrusted, encode_chunk
from appliance.services.grpc_status import is_status
from appliance.services.many_blobs import ManyBlobs
from appliance.services.retry import Patience, persevere

# Small writes are gathered into messages of at least this many bytes, as each message has a fixed
# cost.
_SEND_MIN: Final = 1 << 18


class GrpcBlobService:
    """The blobs of `peer`."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._sends_ranges = True

    async def has(self, digest: Digest) -> bool:
        """See `BlobService.has`."""
        return await self._stat(pb.StatBlobRequest(digest=digest)) is not None

    async def stat(self, digest: Digest) -> Sequence[BlobChunk] | None:
        """Return the chunks that the peer names."""
        answer = await self._stat(pb.StatBlobRequest(digest=digest, send_chunks=True))
        if answer is None:
            return None
        try:
            response = pb.StatBlobResponse.FromString(answer)
            return [BlobChunk(Digest(chunk.digest), chunk.size) for chunk in response.chunks]
        except (DecodeError, DirectoryError) as exc:
            raise StoreError(f"{self._peer.name}: blob {digest}: malformed answer") from exc

    async def _stat(self, request: pb.StatBlobRequest) -> bytes | None:
        family = await self._peer.castore_family()
        return await self._peer.find(f"{family.blobs()}/Stat", request.SerializeToString())

    async def open_read(self, digest: Digest) -> BlobReader | None:
        """Open the blob at its start; the first message has arrived when this returns."""
        family = await self._peer.castore_family()
        request = pb.ReadBlobRequest(digest=digest).SerializeToString()
        return await self._begun(f"{family.blobs()}/Read", request, digest)

    async def open_range(self, digest: Digest, start: int, size: int) -> BlobReader | None:
        """See `chunk_runs.SendsRanges`; the first message has arrived when this returns."""
        if not self._sends_ranges:
            return None
        request = bulk_pb2.ReadRangeRequest(digest=digest, start=start, size=size)
        try:
            return await self._begun(f"{BULK}/ReadRange", request.SerializeToString(), digest)
        except StoreError as exc:
            cause = exc.__cause__
            if not isinstance(cause, grpc.RpcError):
                raise
            if not is_status(cause, grpc.StatusCode.UNIMPLEMENTED):
                raise
            self._sends_ranges = False
            return None

    async def _begun(self, method: str, request: bytes, digest: Digest) -> BlobReader | None:
        reader = _GrpcBlobReader(self._peer, method, request, digest, await self._peer.patience())
        try:
            await reader.receive()
        except ContentMissingError:
            return None
        return reader

    async def many(self) -> ManyBlobs | None:
        """See `many_blobs.OffersMany`."""
        return GrpcManyBlobs(self._peer) if await self._peer.knows_bulk() else None

    async def open_write(self) -> BlobWriter:
        """Begin a new blob."""
        family = await self._peer.castore_family()
        return _GrpcBlobWriter(self._peer, f"{family.blobs()}/Put")


class _GrpcBlobReader:
    """Reads what `request` asks for as one stream of messages, and asks anew to go back.

    A seek forward receives what lies between.
    """

    def __init__(
        self, peer: Peer, method: str, request: bytes, digest: Digest, patience: Patience
    ) -> None:
        self._peer = peer
        self._method = method
        self._request = request
        self._digest = digest
        self._offset = 0
        self._call: StreamCall | None = None
        # The last message, and its offset in the blob.
        self._received = memoryview(b"")
        self._received_at = 0
        self._has_ended = False
        # Only what was never received before is progress.
        self._reached = 0
        self._patience = patience

    async def receive(self) -> None:
        """Receive the next message; after the stream broke, the first one of another stream."""
        if self._received_at + len(self._received) >= self._reached:
            self._patience.restart()
        message = await persevere(self._next, self._patience)
        if message is None:
            self._has_ended = True
            return
        try:
            data = decode_chunk_untrusted(message)
        except InvalidRequestError as exc:
            raise StoreError(f"{self._peer.name}: blob {self._digest}: {exc}") from exc
        self._received_at += len(self._received)
        self._received = memoryview(data)
        self._reached = max(self._reached, self._received_at + len(data))

    async def read(self, size: int) -> bytes:
        parts: list[Buffer] = []
        left = size
        while left and (part := await self._part(left)):
            parts.append(part)
            left -= len(part)
            self._offset += len(part)
        return b"".join(parts)

    async def seek(self, offset: int) -> None:
        self._offset = offset
        if offset < self._received_at:
            await self._begin_anew()

    async def close(self) -> None:
        if self._call is not None:
            self._call.cancel()
            self._call = None

    async def _next(self) -> bytes | None:
        try:
            with self._peer.translating():
                if self._call is None:
                    self._call = self._peer.stream(self._method, self._request)
                return await self._peer.next_message(self._call, self._patience)
        except ServiceUnavailableError:
            await self._begin_anew()
            raise

    async def _begin_anew(self) -> None:
        await self.close()
        self._received = memoryview(b"")
        self._received_at = 0
        self._has_ended = False

    async def _part(self, size: int) -> Buffer:
        while self._received_at + len(self._received) <= self._offset:
            if self._has_ended:
                return b""
            await self.receive()
        start = self._offset - self._received_at
        return self._received[start : start + size]


class _GrpcBlobWriter:
    """Sends a blob as one stream of messages, and compares the digest that the peer answers."""

    def __init__(self, peer: Peer, method: str) -> None:
        self._peer = peer
        self._sending = Sending(peer, method)
        self._hasher = blake3()
        self._unsent = bytearray()

    async def write(self, data: Buffer) -> None:
        self._hasher.update(data)
        view = memoryview(data)
        if not self._unsent and len(view) >= _SEND_MIN:
            for start in range(0, len(view), CONTENT_MAX):
                await self._sending.send(encode_chunk(view[start : start + CONTENT_MAX]))
            return
        for start in range(0, len(view), _SEND_MIN):
            self._unsent += view[start : start + _SEND_MIN]
            if len(self._unsent) >= _SEND_MIN:
                await self._flush()

    async def close(self) -> Digest:
        await self._flush()
        answer = await self._sending.finish()
        digest = Digest(self._hasher.digest())
        try:
            kept = pb.PutBlobResponse.FromString(answer).digest
        except DecodeError as exc:
            raise StoreError(f"{self._peer.name}: blob {digest}: malformed answer") from exc
        if kept != digest:
            raise StoreError(f"{self._peer.name}: blob {digest}: the peer keeps it as {kept.hex()}")
        return digest

    async def abort(self) -> None:
        self._sending.cancel()

    async def _flush(self) -> None:
        if self._unsent:
            message = encode_chunk(self._unsent)
            self._unsent.clear()
            await self._sending.send(message)
