"""Many small blobs in one call, where the peer can do that (small_blobs.proto).

A blob of its own takes a call with headers, a status and several wake-ups on either side, about a
millisecond of processor time each. Most files are small, so that is what limits an upload.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import grpc
from blake3 import blake3
from google.protobuf.message import DecodeError

from appliance.castore.digest import Digest
from appliance.errors import DirectoryError, StoreError
from appliance.protos import small_blobs_pb2 as pb
from appliance.services.grpc_client import Peer, Sending
from appliance.services.grpc_messages import CONTENT_MAX
from appliance.services.grpc_status import is_status

SERVICE: Final = "appliance.castore.v1.SmallBlobService"
# Digests in one request.
DIGESTS_MAX: Final = 4096


class GrpcSmallBlobs:
    """The small blobs of `peer`, all at once."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._is_known: bool | None = None

    async def missing(self, digests: Sequence[Digest]) -> list[Digest] | None:
        """Return those whose blobs the peer lacks; None if it cannot say so."""
        absent: list[Digest] = []
        for start in range(0, len(digests), DIGESTS_MAX):
            request = pb.BlobDigests(digests=digests[start : start + DIGESTS_MAX])
            answer = await self._ask_missing(request.SerializeToString())
            if answer is None:
                return None
            absent += answer
        return absent

    async def put(self, contents: Mapping[Digest, bytes]) -> bool:
        """Put those that the peer lacks; return False if it takes single blobs only."""
        absent = await self.missing(list(contents))
        if absent is None:
            return False
        if not absent:
            return True
        sending = Sending(self._peer, f"{SERVICE}/Put")
        try:
            for message in _messages([contents[digest] for digest in absent]):
                await sending.send(message)
            answer = await sending.finish()
        finally:
            sending.cancel()
        try:
            kept = pb.KeptBlobs.FromString(answer).digest
        except DecodeError as exc:
            raise StoreError(f"{self._peer.name}: small blobs: malformed answer") from exc
        if kept != digest_of(absent):
            raise StoreError(f"{self._peer.name}: small blobs: the peer keeps other ones")
        return True

    async def _ask_missing(self, request: bytes) -> list[Digest] | None:
        if self._is_known is False:
            return None
        try:
            answer = await self._peer.ask(f"{SERVICE}/Missing", request)
        except StoreError as exc:
            cause = exc.__cause__
            if not isinstance(cause, grpc.RpcError):
                raise
            if not is_status(cause, grpc.StatusCode.UNIMPLEMENTED):
                raise
            self._is_known = False
            return None
        self._is_known = True
        try:
            return [Digest(digest) for digest in pb.BlobDigests.FromString(answer).digests]
        except (DecodeError, DirectoryError) as exc:
            raise StoreError(f"{self._peer.name}: small blobs: malformed answer") from exc


def digest_of(digests: Sequence[bytes]) -> bytes:
    """Return the digest in the answer to blobs with these digests."""
    return blake3(b"".join(digests)).digest()


def _messages(contents: Sequence[bytes]) -> Iterator[bytes]:
    message = pb.BlobContents()
    size = 0
    for content in contents:
        if size and size + len(content) > CONTENT_MAX:
            yield message.SerializeToString()
            message = pb.BlobContents()
            size = 0
        message.contents.append(content)
        size += len(content) + 8
    yield message.SerializeToString()
