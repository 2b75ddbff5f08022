"""Many small blobs of a peer in one call, over gRPC (bulk.proto: BulkService)."""

from collections.abc import Iterator, Sequence

from google.protobuf.message import DecodeError

from appliance.castore.digest import Digest
from appliance.errors import StoreError
from appliance.protos import bulk_pb2 as pb
from appliance.services.contracts import Buffer
from appliance.services.grpc_client import Peer, Sending
from appliance.services.grpc_messages import BULK, CONTENT_MAX
from appliance.services.retry import persevere


class GrpcManyBlobs:
    """The small blobs of `peer`, which has the service; see `ManyBlobs`."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    async def has_many(self, digests: Sequence[Digest]) -> Sequence[bool]:
        """See `ManyBlobs.has_many`."""
        request = pb.HasBlobsRequest(digests=digests).SerializeToString()
        answer = await self._peer.ask(f"{BULK}/HasBlobs", request)
        try:
            are_there = pb.HasBlobsResponse.FromString(answer).are_there
        except DecodeError as exc:
            raise StoreError(f"{self._peer.name}: malformed answer") from exc
        if len(are_there) != len(digests):
            raise StoreError(
                f"{self._peer.name}: answered for {len(are_there)} blobs, expected {len(digests)}"
            )
        return are_there

    async def put_many(self, contents: Sequence[Buffer]) -> None:
        """See `ManyBlobs.put_many`."""
        if contents:
            await persevere(lambda: self._put(contents), await self._peer.patience())

    async def _put(self, contents: Sequence[Buffer]) -> None:
        sending = Sending(self._peer, f"{BULK}/PutBlobs")
        try:
            for part in _parts(contents):
                message = pb.PutBlobsRequest(contents=(bytes(content) for content in part))
                await sending.send(message.SerializeToString())
            answer = await sending.finish()
        finally:
            sending.cancel()
        try:
            kept = pb.PutBlobsResponse.FromString(answer).digests
        except DecodeError as exc:
            raise StoreError(f"{self._peer.name}: malformed answer") from exc
        if len(kept) != len(contents):
            raise StoreError(
                f"{self._peer.name}: keeps {len(kept)} blobs, expected {len(contents)}"
            )
        for content, digest in zip(contents, kept, strict=True):
            if Digest.of(content) != digest:
                raise StoreError(
                    f"{self._peer.name}: blob {Digest.of(content)}: "
                    f"the peer keeps it as {digest.hex()}"
                )


def _parts(contents: Sequence[Buffer]) -> Iterator[list[Buffer]]:
    # Parts of about the size of one message, and none empty.
    part: list[Buffer] = []
    size = 0
    for content in contents:
        part.append(content)
        size += len(content)
        if size >= CONTENT_MAX:
            yield part
            part, size = [], 0
    if part:
        yield part
