"""Checks of a PathInfo against contents: a cheap one of the size, and one of everything."""

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from appliance.castore.digest import Digest
from appliance.castore.directory import DirectoryNode, FileNode, Node
from appliance.castore.size_dialect import SizeDialect
from appliance.errors import PathInfoError, StoreError
from appliance.nix.path_info import PathInfo, read_path_info
from appliance.nix.path_info_rules import check_size
from appliance.protos import pathinfo_pb2
from appliance.services.contracts import (
    BlobService,
    DirectoryService,
    NarInfo,
    PathInfoService,
    Services,
)
from appliance.services.verify import Verifier

if TYPE_CHECKING:
    from appliance.services.verify_errors import VerifyError


@runtime_checkable
class KnowsSizes(Protocol):
    """A blob service that knows the sizes of its blobs without reading them."""

    async def size_of(self, digest: Digest) -> int | None:
        """Return the size of a blob in bytes, or None if it is not there."""


async def check_stated_size(
    info: PathInfo, blobs: BlobService, directories: DirectoryService
) -> None:
    """Check the size that a root node states, if its content is there already.

    Raises:
        PathInfoError: the content has another size (rule `contradiction`).
    """
    match info.node:
        case FileNode(_, digest, size) if isinstance(blobs, KnowsSizes):
            known = await blobs.size_of(digest)
            if known is not None:
                check_size(info.path, f"blob {digest}", size, frozenset({known}))
        case DirectoryNode(_, digest, size):
            try:
                directory = await directories.get(digest)
            except StoreError:
                return  # A directory that cannot be read is treated as absent.
            if directory is not None:
                sizes = frozenset(directory.size(dialect) for dialect in SizeDialect)
                check_size(info.path, f"directory {digest}", size, sizes)


class CheckedPathInfoService:
    """PathInfos of another service, each of which is fully verified before it is put.

    `verify` reads everything in the path, and checks contents, NAR and content address.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self._path_infos: PathInfoService = services.path_infos

    async def get(self, path_digest: bytes) -> bytes | None:
        """See `PathInfoService.get`."""
        return await self._path_infos.get(path_digest)

    async def put(self, path_info: bytes, *, needs_references: bool = False) -> bytes:
        """See `PathInfoService.put`.

        Raises:
            PathInfoError: the content is not there, or not what the PathInfo says (rule
                `contradiction`).
        """
        info = read_path_info(path_info)
        known = await self._path_infos.get(info.path.digest)
        if known is None or _unsigned(known) != _unsigned(path_info):
            problems: list[VerifyError] = []
            await Verifier(self._services, problems.append).verify_path_info(path_info)
            if problems:
                more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
                raise PathInfoError(f"{problems[0]}{more}", rule="contradiction")
        return await self._path_infos.put(path_info, needs_references=needs_references)

    def list(self) -> AsyncIterator[bytes]:
        """See `PathInfoService.list`."""
        return self._path_infos.list()

    async def calculate_nar(self, node: Node) -> NarInfo:
        """See `PathInfoService.calculate_nar`."""
        return await self._path_infos.calculate_nar(node)


def _unsigned(path_info: bytes) -> bytes:
    # Signatures say nothing about the contents.
    message = pathinfo_pb2.PathInfo.FromString(path_info)
    del message.narinfo.signatures[:]
    return message.SerializeToString(deterministic=True)
