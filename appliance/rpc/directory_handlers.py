"""The gRPC methods of the directory service (castore_rpc.proto: DirectoryService)."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Final

import grpc

from appliance.castore.digest import Digest
from appliance.castore.directory import Directory
from appliance.errors import ContentMissingError, InvalidRequestError
from appliance.protos import castore_rpc_pb2 as pb
from appliance.rpc.calls import Edge, Handler, decode_untrusted, digest_untrusted
from appliance.services.contracts import DirectoryService
from appliance.services.grpc_status import StatusError, not_found

# Messages of this many bytes or more are decoded in another thread.
_THREAD_MIN: Final = 32 * 1024


class DirectoryHandlers:
    """Answers calls with the directories of `service`."""

    def __init__(self, service: DirectoryService) -> None:
        self._service = service

    def methods(self, edge: Edge) -> Mapping[str, Handler]:
        """Return the handlers by the names of their methods."""
        # To clients of Tvix and Snix, only a stream that ends with NOT_FOUND means that there is no
        # such directory.
        return {"Get": edge.stream(self.get, has_headers=True), "Put": edge.sink(self.put)}

    async def get(self, request: bytes) -> AsyncGenerator[bytes, None]:
        """Send one directory, or a closure, which is empty if its root is missing."""
        message = decode_untrusted(pb.GetDirectoryRequest, request)
        if message.WhichOneof("by_what") is None:
            raise InvalidRequestError("by_what needs to be specified")
        digest = digest_untrusted(message.digest)
        if message.recursive:
            async for encoded in self._closure(digest):
                yield encoded
            return
        directory = await self._service.get(digest)
        if directory is None:
            raise not_found(f"directory {digest} not found")
        yield directory.to_bytes()

    async def put(self, requests: AsyncIterator[bytes]) -> bytes:
        """Receive a closure."""
        digest = await self.put_all(requests)
        return pb.PutDirectoryResponse(root_digest=digest).SerializeToString()

    async def put_all(self, requests: AsyncIterator[bytes]) -> Digest:
        """Put a closure, whose directories are sent one by one; return the digest of the root."""
        putter = self._service.put_multiple_start()
        try:
            async for request in requests:
                if len(request) < _THREAD_MIN:
                    directory = _decode_untrusted(request)
                else:
                    directory = await asyncio.to_thread(_decode_untrusted, request)
                await putter.put(directory)
                # Free the message before the next one is awaited.
                del request, directory
            return await putter.close()
        finally:
            await putter.abort()

    async def _closure(self, digest: Digest) -> AsyncIterator[bytes]:
        try:
            async for directory in self._service.get_recursive(digest):
                yield directory.to_bytes()
        except ContentMissingError as exc:
            raise StatusError(grpc.StatusCode.INTERNAL, f"incomplete closure: {exc}") from exc


def _decode_untrusted(message: bytes) -> Directory:
    directory = Directory.from_bytes(message)
    # The digest is that of the canonical encoding, so what is kept would not be what was sent.
    if directory.to_bytes() != message:
        raise InvalidRequestError("Directory has unknown fields or is not in canonical encoding")
    return directory
