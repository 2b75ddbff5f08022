"""The blob service, served.

castore_rpc.proto: BlobService.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Final

from appliance.protos import castore_rpc_pb2 as pb
from appliance.rpc.calls import Edge, Handler, decode_untrusted, digest_untrusted
from appliance.services.contracts import BlobService
from appliance.services.grpc_messages import CONTENT_MAX, decode_chunk_untrusted, encode_chunk
from appliance.services.grpc_status import not_found

# What the calls to Read may send at a time, shared among them, and the least for each.
_SENDING_MAX: Final = 16 << 20
_SHARE_MIN: Final = 64 << 10


class BlobHandlers:
    """Answers calls from a blob service."""

    def __init__(self, service: BlobService) -> None:
        self._service = service
        self._num_reads = 0

    def methods(self, edge: Edge) -> Mapping[str, Handler]:
        """Return the handlers by name of method."""
        return {
            "Stat": edge.unary(self.stat),
            "Read": edge.stream(self.read),
            "Put": edge.sink(self.put),
        }

    async def stat(self, request: bytes) -> bytes:
        """Say whether a blob is there, and of which chunks."""
        digest = digest_untrusted(decode_untrusted(pb.StatBlobRequest, request).digest)
        chunks = await self._service.stat(digest)
        if chunks is None:
            raise not_found(f"blob {digest} not found")
        response = pb.StatBlobResponse()
        for chunk in chunks:
            response.chunks.add(digest=chunk.digest, size=chunk.size)
        return response.SerializeToString()

    async def read(self, request: bytes) -> AsyncGenerator[bytes, None]:
        """Send a blob."""
        digest = digest_untrusted(decode_untrusted(pb.ReadBlobRequest, request).digest)
        reader = await self._service.open_read(digest)
        if reader is None:
            raise not_found(f"blob {digest} not found")
        self._num_reads += 1
        try:
            while message := encode_chunk(await reader.read(self._share())):
                yield message
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
                # Not to be held while the next is awaited.
                del request, data
            digest = await writer.close()
        finally:
            await writer.abort()
        return pb.PutBlobResponse(digest=digest).SerializeToString()

    def _share(self) -> int:
        # A client that does not read what it asked for has a message kept for it.
        return max(_SHARE_MIN, min(CONTENT_MAX, _SENDING_MAX // self._num_reads))
