"""The PathInfo service of a peer, over gRPC (pathinfo_rpc.proto: PathInfoService)."""

from collections.abc import AsyncIterator
from typing import Final

from google.protobuf.message import DecodeError

from appliance.castore.directory import Node, node_to_message
from appliance.errors import CorruptBlobError, PathInfoError, StoreError
from appliance.nix.path_info import read_path_info
from appliance.protos import pathinfo_rpc_pb2 as pb
from appliance.services.contracts import NarInfo
from appliance.services.grpc_client import Peer
from appliance.services.grpc_messages import NEEDS_REFERENCES

# The peer reads all content below the node, or may do so before it keeps a path.
_READING_TIMEOUT_S: Final = 3600.0


class GrpcPathInfoService:
    """The PathInfos of `peer`."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    async def get(self, path_digest: bytes) -> bytes | None:
        """Return the PathInfo of a store path."""
        family = await self._peer.store_family()
        request = pb.GetPathInfoRequest(by_output_hash=path_digest).SerializeToString()
        path_info = await self._peer.find(f"{family.path_infos()}/Get", request)
        if path_info is not None and self._digest_of(path_info) != path_digest:
            raise CorruptBlobError(
                f"{self._peer.name}: PathInfo {path_digest.hex()}: the answer is for another path"
            )
        return path_info

    async def put(self, path_info: bytes, *, needs_references: bool = False) -> bytes:
        """Validate and put a PathInfo; return what the peer keeps."""
        read_path_info(path_info)
        family = await self._peer.store_family()
        return await self._peer.ask(
            f"{family.path_infos()}/Put",
            path_info,
            timeout_s=_READING_TIMEOUT_S,
            metadata=(NEEDS_REFERENCES,) if needs_references else (),
        )

    async def list(self) -> AsyncIterator[bytes]:
        """Yield all PathInfos, unchecked: a bad one must not hide the others."""
        family = await self._peer.store_family()
        with self._peer.translating():
            call = self._peer.stream(f"{family.path_infos()}/List", b"")
            async for path_info in self._peer.messages(call):
                yield path_info

    async def calculate_nar(self, node: Node) -> NarInfo:
        """Have the peer calculate size and digest of the NAR of `node`."""
        family = await self._peer.store_family()
        # Some servers refuse a node with a name.
        request = node_to_message(node._replace(name=b"")).SerializeToString()
        answer = await self._peer.ask(
            f"{family.path_infos()}/CalculateNAR", request, timeout_s=_READING_TIMEOUT_S
        )
        try:
            response = pb.CalculateNARResponse.FromString(answer)
        except DecodeError as exc:
            raise StoreError(f"{self._peer.name}: malformed answer") from exc
        return NarInfo(response.nar_size, response.nar_sha256)

    def _digest_of(self, path_info: bytes) -> bytes:
        try:
            return read_path_info(path_info).path.digest
        except PathInfoError as exc:
            raise CorruptBlobError(f"{self._peer.name}: {exc}") from exc
