"""The gRPC methods for many small blobs in one call (small_blobs.proto: SmallBlobService)."""

from collections.abc import AsyncIterator, Mapping

import grpc
from blake3 import blake3

from appliance.castore.digest import Digest
from appliance.errors import InvalidRequestError
from appliance.protos import small_blobs_pb2 as pb
from appliance.rpc.calls import Edge, Handler, decode_untrusted, digest_untrusted
from appliance.services.contracts import SMALL_BLOB_MAX, TakesSmallBlobs
from appliance.services.grpc_small_blobs import DIGESTS_MAX
from appliance.services.grpc_status import StatusError


class SmallBlobHandlers:
    """Answers calls with the blobs of `service`."""

    def __init__(self, service: TakesSmallBlobs) -> None:
        self._service = service

    def methods(self, edge: Edge) -> Mapping[str, Handler]:
        """Return the handlers by the names of their methods."""
        return {"Missing": edge.unary(self.missing), "Put": edge.sink(self.put)}

    async def missing(self, request: bytes) -> bytes:
        """Return the digests of blobs that are not there."""
        message = decode_untrusted(pb.BlobDigests, request)
        if len(message.digests) > DIGESTS_MAX:
            raise InvalidRequestError(
                f"{len(message.digests)} digests in one request, the limit is {DIGESTS_MAX}"
            )
        digests = [digest_untrusted(digest) for digest in message.digests]
        absent = await self._service.missing(digests)
        if absent is None:
            raise _unimplemented()
        return pb.BlobDigests(digests=absent).SerializeToString()

    async def put(self, requests: AsyncIterator[bytes]) -> bytes:
        """Receive blobs; those of each message are committed together."""
        all_digests = blake3()
        async for request in requests:
            contents: dict[Digest, bytes] = {}
            for content in decode_untrusted(pb.BlobContents, request).contents:
                if len(content) > SMALL_BLOB_MAX:
                    raise InvalidRequestError(
                        f"blob has {len(content)} bytes, the limit here is {SMALL_BLOB_MAX}"
                    )
                digest = Digest.of(content)
                all_digests.update(digest)
                contents[digest] = content
            if not await self._service.put_small(contents):
                raise _unimplemented()
        return pb.KeptBlobs(digest=all_digests.digest()).SerializeToString()


def _unimplemented() -> StatusError:
    return StatusError(grpc.StatusCode.UNIMPLEMENTED, "the blobs are with a peer without this")
