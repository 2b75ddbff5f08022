"""The directory service of a peer, over gRPC (castore_rpc.proto: DirectoryService).

Directories are verified here: what does not have the digest that was asked for is refused.
"""

from collections.abc import AsyncIterator

from google.protobuf.message import DecodeError

from appliance.castore.digest import EMPTY_DIGEST, Digest
from appliance.castore.directory import Directory
from appliance.errors import (
    ContentMissingError,
    CorruptBlobError,
    DirectoryError,
    StoreError,
    WrongDigestError,
)
from appliance.protos import castore_rpc_pb2 as pb
from appliance.services.contracts import DirectoryPutter
from appliance.services.grpc_client import Peer, Sending
from appliance.services.lmdb_directories import put_one


class GrpcDirectoryService:
    """The directories of `peer`."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    async def get(self, digest: Digest) -> Directory | None:
        """Return one directory."""
        if digest == EMPTY_DIGEST:
            return Directory()
        family = await self._peer.castore_family()
        request = pb.GetDirectoryRequest(digest=digest).SerializeToString()
        call = self._peer.stream(f"{family.directories()}/Get", request)
        try:
            with self._peer.translating():
                message = await self._peer.next_message(call)
        except ContentMissingError:
            return None
        finally:
            call.cancel()
        if message is None:
            return None
        directory = self._decode(message)
        if (actual := directory.digest()) != digest:
            raise WrongDigestError(f"{self._peer.name}: directory", digest, actual)
        return directory

    async def get_recursive(self, digest: Digest) -> AsyncIterator[Directory]:
        """Yield the directory and all below it, in the order of the peer: parents first."""
        family = await self._peer.castore_family()
        request = pb.GetDirectoryRequest(digest=digest, recursive=True).SerializeToString()
        expected = {digest}
        received: set[Digest] = set()
        with self._peer.translating():
            call = self._peer.stream(f"{family.directories()}/Get", request)
            async for message in self._peer.messages(call):
                directory = self._decode(message)
                if directory.digest() not in expected:
                    raise CorruptBlobError(
                        f"{self._peer.name}: directory {directory.digest()} was not asked for"
                    )
                received.add(directory.digest())
                expected.discard(directory.digest())
                expected.update(
                    node.digest for node in directory.directories if node.digest not in received
                )
                yield directory
        if received and expected:
            raise ContentMissingError(
                f"{self._peer.name}: directory {digest}: "
                f"{len(expected)} directories below it are missing from the answer"
            )

    async def put(self, directory: Directory) -> Digest:
        """Put a directory without subdirectories."""
        return await put_one(self, directory)

    def put_multiple_start(self) -> DirectoryPutter:
        """Begin a closure."""
        return _GrpcDirectoryPutter(self._peer)

    def _decode(self, message: bytes) -> Directory:
        try:
            return Directory.from_bytes(message)
        except DirectoryError as exc:
            raise CorruptBlobError(f"{self._peer.name}: {exc}") from exc


class _GrpcDirectoryPutter:
    """Sends a closure as one stream; the call begins with the first directory."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._sending: Sending | None = None
        self._root: Digest | None = None

    async def put(self, directory: Directory) -> None:
        sending = await self._begun()
        self._root = directory.digest()
        await sending.send(directory.to_bytes())

    async def close(self) -> Digest:
        answer = await (await self._begun()).finish()
        try:
            kept = pb.PutDirectoryResponse.FromString(answer).root_digest
        except DecodeError as exc:
            raise StoreError(f"{self._peer.name}: malformed answer") from exc
        if self._root is None or kept != self._root:
            raise StoreError(
                f"{self._peer.name}: directory {self._root}: the peer keeps it as {kept.hex()}"
            )
        return self._root

    async def abort(self) -> None:
        if self._sending is not None:
            self._sending.cancel()

    async def _begun(self) -> Sending:
        if self._sending is None:
            family = await self._peer.castore_family()
            self._sending = Sending(self._peer, f"{family.directories()}/Put")
        return self._sending
