"""The gRPC methods for many objects in one message (bulk.proto: BulkService).

A client that imports small files would spend more time on calls and messages than on their
content. Peers that serve Tvix or Snix do not have this service. A daemon in front of one answers
that blobs are UNIMPLEMENTED here, and clients make a call for each of them.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import Final

import grpc

from appliance.castore.digest import Digest
from appliance.errors import InvalidRequestError
from appliance.protos import bulk_pb2 as pb
from appliance.rpc.calls import Edge, Handler, decode_untrusted, digest_untrusted
from appliance.rpc.directory_handlers import DirectoryHandlers
from appliance.services.contracts import BlobService
from appliance.services.grpc_status import StatusError
from appliance.services.many_blobs import DIGESTS_MAX, ManyBlobs, many_of
from appliance.store.schema import INLINE_MAX

# A call may gather this many bytes and commit them together, if no more than `_GATHERING_MAX` calls
# do. Others commit each message by itself, so that memory stays bounded.
_COMMIT_BYTES: Final = 8 << 20
_GATHERING_MAX: Final = 4
# Bytes of a message with blobs. Our clients send those of little more than 1 MiB.
_MESSAGE_MAX: Final = 4 << 20


class BulkHandlers:
    """Answers calls with small blobs and directories.

    Args:
        blobs: the blobs.
        directories: takes directories.
    """

    def __init__(self, blobs: BlobService, directories: DirectoryHandlers) -> None:
        self._blobs = blobs
        self._directories = directories
        self._num_gathering = 0

    def methods(self, edge: Edge) -> Mapping[str, Handler]:
        """Return the handlers by the names of their methods."""
        return {
            "HasBlobs": edge.unary(self.has_blobs),
            "PutBlobs": edge.sink(self.put_blobs, is_bulk=True),
            "PutDirectories": edge.sink(self.put_directories, is_bulk=True),
        }

    async def has_blobs(self, request: bytes) -> bytes:
        """Return which blobs exist."""
        many = await self._many()
        digests = _digests_untrusted(decode_untrusted(pb.HasBlobsRequest, request).digests)
        return pb.HasBlobsResponse(are_there=await many.has_many(digests)).SerializeToString()

    async def put_blobs(self, requests: AsyncIterator[bytes]) -> bytes:
        """Receive blobs."""
        many = await self._many()
        response = pb.PutBlobsResponse()
        received: list[bytes] = []
        num_bytes = 0
        with self._gathering() as most_bytes:
            async for request in requests:
                contents = _contents_untrusted(request)
                response.digests.extend(Digest.of(content) for content in contents)
                if len(response.digests) > DIGESTS_MAX:
                    raise InvalidRequestError(f"more than {DIGESTS_MAX} blobs in one call")
                received += contents
                num_bytes += len(request)
                del request, contents
                if num_bytes >= most_bytes:
                    await many.put_many(received)
                    received, num_bytes = [], 0
            await many.put_many(received)
        return response.SerializeToString()

    async def put_directories(self, requests: AsyncIterator[bytes]) -> bytes:
        """Receive a closure."""

        async def unpacked() -> AsyncGenerator[bytes, None]:
            async for request in requests:
                encoded = decode_untrusted(pb.PutDirectoriesRequest, request).directories
                del request
                one = b""
                for one in encoded:
                    yield one
                # The next message may be long in coming, behind those of all other calls.
                del encoded, one

        async with aclosing(unpacked()) as directories:
            digest = await self._directories.put_all(directories)
        return pb.PutDirectoriesResponse(root_digest=digest).SerializeToString()

    @contextmanager
    def _gathering(self) -> Iterator[int]:
        # Yields how many bytes the call may gather.
        if self._num_gathering == _GATHERING_MAX:
            yield 0
            return
        self._num_gathering += 1
        try:
            yield _COMMIT_BYTES
        finally:
            self._num_gathering -= 1

    async def _many(self) -> ManyBlobs:
        many = await many_of(self._blobs)
        if many is None:
            raise StatusError(grpc.StatusCode.UNIMPLEMENTED, "the service behind this one has none")
        return many


def _contents_untrusted(request: bytes) -> Sequence[bytes]:
    if len(request) > _MESSAGE_MAX:
        raise InvalidRequestError(
            f"a message has {len(request)} bytes, at most {_MESSAGE_MAX} are taken here"
        )
    contents = decode_untrusted(pb.PutBlobsRequest, request).contents
    for content in contents:
        if len(content) > INLINE_MAX:
            raise InvalidRequestError(
                f"a blob has {len(content)} bytes, at most {INLINE_MAX} are taken here"
            )
    return contents


def _digests_untrusted(values: Sequence[bytes]) -> list[Digest]:
    if len(values) > DIGESTS_MAX:
        raise InvalidRequestError(f"{len(values)} digests, at most {DIGESTS_MAX} are taken")
    return [digest_untrusted(value) for value in values]
