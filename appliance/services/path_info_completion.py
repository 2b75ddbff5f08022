"""PathInfos of a node alone, completed: with size and digest of the NAR, and names of references.

The format allows a PathInfo of nothing but a node, and early peers made such. Current ones refuse
it. So a daemon adds what can be calculated from the content that it has.
"""

from collections.abc import AsyncIterator

from appliance.castore.directory import Node
from appliance.errors import NarError, PathInfoError, StoreError
from appliance.nix.path_info import read_path_info
from appliance.protos import pathinfo_pb2
from appliance.services.contracts import NarInfo, PathInfoService


class CompletingPathInfoService:
    """Completes PathInfos on their way into `path_infos`, and out of it.

    A PathInfo stays as it is while its content, or a path that it refers to, is not there.
    """

    def __init__(self, path_infos: PathInfoService) -> None:
        self._path_infos = path_infos

    async def get(self, path_digest: bytes) -> bytes | None:
        """See `PathInfoService.get`."""
        path_info = await self._path_infos.get(path_digest)
        return None if path_info is None else await self._completed(path_info)

    async def put(self, path_info: bytes, *, needs_references: bool = False) -> bytes:
        """See `PathInfoService.put`."""
        completed = await self._completed(path_info)
        return await self._path_infos.put(completed, needs_references=needs_references)

    def list(self) -> AsyncIterator[bytes]:
        """See `PathInfoService.list`; these are as they are kept."""
        return self._path_infos.list()

    async def calculate_nar(self, node: Node) -> NarInfo:
        """See `PathInfoService.calculate_nar`."""
        return await self._path_infos.calculate_nar(node)

    async def _completed(self, path_info: bytes) -> bytes:
        try:
            info = read_path_info(path_info)
            if info.nar_sha256:
                return path_info
            message = pathinfo_pb2.PathInfo.FromString(path_info)
            names = [await self._name_of(digest) for digest in message.references]
            nar = await self._path_infos.calculate_nar(info.node)
        except (PathInfoError, StoreError, NarError):
            return path_info  # the service itself says what is wrong, if anything is
        if None in names:
            return path_info
        message.narinfo.nar_size = nar.size
        message.narinfo.nar_sha256 = nar.sha256
        message.narinfo.reference_names[:] = [name for name in names if name is not None]
        return message.SerializeToString(deterministic=True)

    async def _name_of(self, path_digest: bytes) -> str | None:
        path_info = await self._path_infos.get(path_digest)
        return None if path_info is None else read_path_info(path_info).path.basename()
