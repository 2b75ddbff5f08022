"""The gRPC methods of the PathInfo service (pathinfo_rpc.proto: PathInfoService)."""

from collections.abc import AsyncGenerator, Mapping

import grpc

from appliance.castore.directory import node_from_message
from appliance.errors import DirectoryError, InvalidRequestError
from appliance.nix.store_path import DIGEST_SIZE
from appliance.protos import castore_pb2
from appliance.protos import pathinfo_rpc_pb2 as pb
from appliance.rpc.calls import Edge, Handler, decode_untrusted
from appliance.services.contracts import PathInfoService
from appliance.services.grpc_messages import NEEDS_REFERENCES
from appliance.services.grpc_status import StatusError, not_found


class PathInfoHandlers:
    """Answers calls with the PathInfos of `service`."""

    def __init__(self, service: PathInfoService) -> None:
        self._service = service

    def methods(self, edge: Edge) -> Mapping[str, Handler]:
        """Return the handlers by the names of their methods."""
        return {
            "Get": edge.unary(self.get),
            "Put": edge.unary(self._service.put, variant=(NEEDS_REFERENCES, self.put_closed)),
            "CalculateNAR": edge.unary(self.calculate_nar),
            "List": edge.stream(self.list),
        }

    async def get(self, request: bytes) -> bytes:
        """Return the PathInfo of a store path."""
        message = decode_untrusted(pb.GetPathInfoRequest, request)
        if message.WhichOneof("by_what") is None:
            raise StatusError(grpc.StatusCode.UNIMPLEMENTED, "by_what needs to be specified")
        if len(message.by_output_hash) != DIGEST_SIZE:
            raise StatusError(grpc.StatusCode.INVALID_ARGUMENT, "invalid output digest length")
        path_info = await self._service.get(message.by_output_hash)
        if path_info is None:
            raise not_found("PathInfo not found")
        return path_info

    async def put_closed(self, request: bytes) -> bytes:
        """Put a PathInfo if all that it refers to is there."""
        return await self._service.put(request, needs_references=True)

    async def calculate_nar(self, request: bytes) -> bytes:
        """Return size and digest of a NAR; whether its node has a name does not matter."""
        try:
            node = node_from_message(decode_untrusted(castore_pb2.Node, request))
        except DirectoryError as exc:
            raise InvalidRequestError(f"invalid root node: {exc}") from exc
        info = await self._service.calculate_nar(node)
        response = pb.CalculateNARResponse(nar_size=info.size, nar_sha256=info.sha256)
        return response.SerializeToString()

    async def list(self, request: bytes) -> AsyncGenerator[bytes, None]:
        """Send all PathInfos."""
        decode_untrusted(pb.ListPathInfoRequest, request)
        async for path_info in self._service.list():
            yield path_info
