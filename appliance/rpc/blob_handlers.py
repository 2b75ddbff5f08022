"""The gRPC methods of the blob service (castore_rpc.proto: BlobService)."""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Final

import grpc
from blake3 import blake3

from appliance.castore.digest import Digest
from appliance.errors import InvalidRequestError, WrongDigestError
from appliance.protos import bulk_pb2
from appliance.protos import castore_rpc_pb2 as pb
from appliance.rpc.calls import Edge, Handler, decode_untrusted, digest_untrusted
from appliance.services.contracts import BlobReader, BlobService
from appliance.services.grpc_messages import CONTENT_MAX, decode_chunk_untrusted, encode_chunk
from appliance.services.grpc_status import StatusError, not_found

# Bytes of content that all calls to Read together hold in messages on their way to clients, and the
# least that each call may hold, however many there are.
_SENDING_MAX: Final = 16 << 20
_SHARE_MIN: Final = 64 << 10
# No file is longer.
_OFFSET_MAX: Final = (1 << 63) - 1
# Chunks in an answer to Stat: 40 bytes each at most, and peers receive messages of up to 4 MiB.
_CHUNKS_MAX: Final = (4 << 20) // 40


class BlobHandlers:
    """Answers calls with the blobs of `service`.

    Args:
        service: the blobs.
        verifies: compare the digest of what is sent, and fail the call if it is wrong, because the
            service is another peer's. Without, clients verify (see `BlobReader`).
    """

    def __init__(self, service: BlobService, *, verifies: bool = False) -> None:
        self._service = service
        self._verifies = verifies
        self._num_reads = 0

    def methods(self, edge: Edge) -> Mapping[str, Handler]:
        """Return the handlers by the names of their methods."""
        return {
            "Stat": edge.unary(self.stat),
            "Read": edge.stream(self.read),
            "Put": edge.sink(self.put),
        }

    async def stat(self, request: bytes) -> bytes:
        """Say whether there is a blob, or send its chunks, if the client asks for them.

        A client that asks only whether a blob is there may put it if not: a chunk is no answer to
        that. One that asks for chunks wants to read: a chunk is answered as a blob that is not cut.
        """
        asked = decode_untrusted(pb.StatBlobRequest, request)
        digest = digest_untrusted(asked.digest)
        if not asked.send_chunks:
            if not await self._service.has(digest):
                raise not_found(f"blob {digest} not found")
            return b""
        chunks = await self._service.stat(digest)
        if chunks is None:
            raise not_found(f"blob {digest} not found")
        response = pb.StatBlobResponse()
        # A longer list is over what peers receive; they read such a blob whole.
        if len(chunks) <= _CHUNKS_MAX:
            for chunk in chunks:
                response.chunks.add(digest=chunk.digest, size=chunk.size)
        return response.SerializeToString()

    async def read(self, request: bytes) -> AsyncGenerator[bytes, None]:
        """Send a blob."""
        digest = digest_untrusted(decode_untrusted(pb.ReadBlobRequest, request).digest)
        hasher = blake3() if self._verifies else None
        async with self._opened(digest) as reader:
            is_last = False
            while not is_last:
                share = self._share()
                data = await reader.read(share)
                is_last = len(data) < share
                if hasher is not None:
                    hasher.update(data)
                    # Before the last message: a blob that fits one is never sent unverified.
                    if is_last and (actual := Digest(hasher.digest())) != digest:
                        raise WrongDigestError("blob", digest, actual)
                message = encode_chunk(data)
                del data  # the message has a copy
                if message:
                    yield message

    async def read_range(self, request: bytes) -> AsyncGenerator[bytes, None]:
        """Send a range of a blob, for a client that verifies it by the list of chunks."""
        asked = decode_untrusted(bulk_pb2.ReadRangeRequest, request)
        digest = digest_untrusted(asked.digest)
        if self._verifies:
            raise StatusError(grpc.StatusCode.UNIMPLEMENTED, "ranges are not verified here")
        if asked.start > _OFFSET_MAX:
            raise InvalidRequestError(f"a range starts at {asked.start}, at most {_OFFSET_MAX}")
        left = asked.size
        async with self._opened(digest) as reader:
            await reader.seek(asked.start)
            while left and (data := await reader.read(min(left, self._share()))):
                left -= len(data)
                message = encode_chunk(data)
                del data  # the message has a copy
                yield message

    @asynccontextmanager
    async def _opened(self, digest: Digest) -> AsyncIterator[BlobReader]:
        reader = await self._service.open_read(digest)
        if reader is None:
            raise not_found(f"blob {digest} not found")
        self._num_reads += 1
        try:
            yield reader
        finally:
            self._num_reads -= 1
            await reader.close()

    async def put(self, requests: AsyncIterator[bytes]) -> bytes:
        """Receive a blob."""
        writer = await self._service.open_write()
        try:
            async for request in requests:
                data = decode_chunk_untrusted(request)
                if data:
                    await writer.write(data)
                # Free the message before the next one is awaited.
                del request, data
            digest = await writer.close()
        finally:
            await writer.abort()
        return pb.PutBlobResponse(digest=digest).SerializeToString()

    def _share(self) -> int:
        # A client that does not read what it asked for keeps one message in memory.
        return max(_SHARE_MIN, min(CONTENT_MAX, _SENDING_MAX // self._num_reads))
