"""The directory service of a peer, over gRPC (castore_rpc.proto: DirectoryService).

Directories are verified here: what does not have the digest that was asked for is refused.
"""

from collections.abc import AsyncIterator
from typing import Final

from google.protobuf.message import DecodeError

from appliance.castore.digest import EMPTY_DIGEST, Digest
from appliance.castore.directory import Directory
from appliance.errors import (
    ContentMissingError,
    CorruptBlobError,
    DirectoryError,
    ServiceUnavailableError,
    StoreError,
    WrongDigestError,
)
from appliance.protos import bulk_pb2
from appliance.protos import castore_rpc_pb2 as pb
from appliance.services.contracts import DirectoryPutter
from appliance.services.grpc_client import Peer, Sending
from appliance.services.grpc_messages import BULK
from appliance.services.lmdb_directories import put_one
from appliance.services.retry import Patience, persevere

# Directories are gathered into messages of at least this many bytes, where the peer takes that.
_SEND_MIN: Final = 1 << 18


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
        patience = await self._peer.patience()

        async def attempt() -> bytes | None:
            call = self._peer.stream(f"{family.directories()}/Get", request)
            try:
                with self._peer.translating():
                    return await self._peer.next_message(call, patience)
            finally:
                call.cancel()

        try:
            message = await persevere(attempt, patience)
        except ContentMissingError:
            return None
        if message is None:
            return None
        directory = self._decode(message)
        if (actual := directory.digest()) != digest:
            raise WrongDigestError(f"{self._peer.name}: directory", digest, actual)
        return directory

    async def get_recursive(self, digest: Digest) -> AsyncIterator[Directory]:
        """Yield the directory and all below it, in the order of the peer: parents first.

        A stream that breaks is asked for anew, and what has been yielded is passed over.
        """
        expected = {digest}
        received: set[Digest] = set()
        patience = await self._peer.patience()
        while True:
            passed_over = set(received)
            try:
                async for directory in self._closure(digest, patience):
                    actual = directory.digest()
                    if actual in passed_over:
                        passed_over.remove(actual)
                        continue
                    if actual not in expected:
                        raise CorruptBlobError(
                            f"{self._peer.name}: directory {actual} was not asked for"
                        )
                    expected.remove(actual)
                    received.add(actual)
                    expected.update(
                        node.digest for node in directory.directories if node.digest not in received
                    )
                    yield directory
                    patience.restart()
                break
            except ServiceUnavailableError as exc:
                if exc.is_final or not await patience.pause():
                    exc.is_final = True
                    raise
        if received and expected:
            raise ContentMissingError(
                f"{self._peer.name}: directory {digest}: "
                f"{len(expected)} directories below it are missing from the answer"
            )

    async def _closure(self, digest: Digest, patience: Patience) -> AsyncIterator[Directory]:
        family = await self._peer.castore_family()
        request = pb.GetDirectoryRequest(digest=digest, recursive=True).SerializeToString()
        with self._peer.translating():
            call = self._peer.stream(f"{family.directories()}/Get", request)
            try:
                while (message := await self._peer.next_message(call, patience)) is not None:
                    yield self._decode(message)
            finally:
                call.cancel()

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
    """Sends a closure as one stream; the call begins with the first directory.

    Where the peer takes it, many directories make up a message.
    """

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._sending: Sending | None = None
        self._is_bulk = False
        self._unsent: list[bytes] = []
        self._unsent_bytes = 0
        self._root: Digest | None = None

    async def put(self, directory: Directory) -> None:
        sending = await self._begun()
        self._root = directory.digest()
        if not self._is_bulk:
            await sending.send(directory.to_bytes())
            return
        encoded = directory.to_bytes()
        self._unsent.append(encoded)
        self._unsent_bytes += len(encoded)
        if self._unsent_bytes >= _SEND_MIN:
            await self._flush(sending)

    async def close(self) -> Digest:
        sending = await self._begun()
        await self._flush(sending)
        answer = await sending.finish()
        kind = bulk_pb2.PutDirectoriesResponse if self._is_bulk else pb.PutDirectoryResponse
        try:
            kept = kind.FromString(answer).root_digest
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

    async def _flush(self, sending: Sending) -> None:
        if self._unsent:
            message = bulk_pb2.PutDirectoriesRequest(directories=self._unsent)
            self._unsent, self._unsent_bytes = [], 0
            await sending.send(message.SerializeToString())

    async def _begun(self) -> Sending:
        if self._sending is None:
            self._is_bulk = await self._peer.knows_bulk()
            if self._is_bulk:
                method = f"{BULK}/PutDirectories"
            else:
                family = await self._peer.castore_family()
                method = f"{family.directories()}/Put"
            self._sending = Sending(self._peer, method)
        return self._sending
