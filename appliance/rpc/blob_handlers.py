"""The gRPC methods of the blob service (castore_rpc.proto: BlobService)."""

from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from blake3 import blake3

from appliance.castore.digest import Digest
from appliance.errors import WrongDigestError
from appliance.protos import castore_rpc_pb2 as pb
from appliance.rpc.calls import Edge, Handler, decode_untrusted, digest_untrusted
from appliance.services.contracts import BlobReader, BlobService
from appliance.services.grpc_messages import CONTENT_MAX, decode_chunk_untrusted, encode_chunk
from appliance.services.grpc_status import not_found

# Bytes of content that all calls to Read together hold in messages on their way to clients, and the
# least that each call may hold, however many there are.
_SENDING_MAX: Final = 16 << 20
_SHARE_MIN: Final = 64 << 10


class SendingShare:
    """Divides the memory for content on its way to clients among the calls that send."""

    def __init__(self) -> None:
        self._num_calls = 0

    @contextmanager
    def held(self) -> Iterator[None]:
        """Count a call in the block."""
        self._num_calls += 1
        try:
            yield
        finally:
            self._num_calls -= 1

    def share(self) -> int:
        """Return how many bytes one call may put into its next message."""
        # A client that does not read what it asked for keeps one message in memory.
        return max(_SHARE_MIN, min(CONTENT_MAX, _SENDING_MAX // self._num_calls))


class BlobHandlers:
    """Answers calls with the blobs of `service`.

    Args:
        service: the blobs.
        sending: limits what is held in memory on its way to clients.
        verifies: compare the digest of what is sent, and fail the call if it is wrong, because the
            service is another peer's. Without, clients verify (see `BlobReader`).
    """

    def __init__(
        self, service: BlobService, sending: SendingShare, *, verifies: bool = False
    ) -> None:
        self._service = service
        self._sending = sending
        self._verifies = verifies

    def methods(self, edge: Edge) -> Mapping[str, Handler]:
        """Return the handlers by the names of their methods."""
        return {
            "Stat": edge.unary(self.stat),
            "Read": edge.stream(self.read),
            "Put": edge.sink(self.put),
        }

    async def stat(self, request: bytes) -> bytes:
        """Return the chunks of a blob."""
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
        hasher = blake3() if self._verifies else None
        try:
            with self._sending.held():
                async for message in self._messages(reader, digest, hasher):
                    yield message
        finally:
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

    async def _messages(
        self, reader: BlobReader, digest: Digest, hasher: "blake3 | None"
    ) -> AsyncIterator[bytes]:
        is_last = False
        while not is_last:
            share = self._sending.share()
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
