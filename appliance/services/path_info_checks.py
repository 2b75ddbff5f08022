"""A PathInfo against contents: what is known at once, and all there is."""

from collections.abc import AsyncIterator
from typing import Protocol, runtime_checkable

from appliance.castore.digest import Digest
from appliance.castore.directory import DirectoryNode, FileNode, Node
from appliance.castore.size_dialect import SizeDialect
from appliance.errors import StoreError
from appliance.nix.path_info import PathInfo, read_path_info
from appliance.nix.path_info_rules import ContradictionError, check_size
from appliance.services.contracts import (
    BlobService,
    DirectoryService,
    NarInfo,
    PathInfoService,
    Services,
)
from appliance.services.verify import Verifier, VerifyError


@runtime_checkable
class KnowsSizes(Protocol):
    """A blob service that has the sizes of its blobs at hand."""

    async def size_of(self, digest: Digest) -> int | None:
        """Return the size of a blob in bytes, if it is there."""


async def check_stated_size(
    info: PathInfo, blobs: BlobService, directories: DirectoryService
) -> None:
    """Check the size that a root node states, if its content is there already.

    Raises:
        ContradictionError: the content has another.
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
                return  # as good as not there
            if directory is not None:
                sizes = frozenset(directory.size(dialect) for dialect in SizeDialect)
                check_size(info.path, f"directory {digest}", size, sizes)


class CheckedPathInfoService:
    """PathInfos of another service; before one is put, all that is in its path is read and checked.

    What is told is told by `verify`: contents, NAR, content address.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self._path_infos: PathInfoService = services.path_infos

    async def get(self, path_digest: bytes) -> bytes | None:
        """See `PathInfoService.get`."""
        return await self._path_infos.get(path_digest)

    async def put(self, path_info: bytes) -> bytes:
        """See `PathInfoService.put`.

        Raises:
            ContradictionError: the content is not there, or not what is said of it.
        """
        info = read_path_info(path_info)
        if await self._path_infos.get(info.path.digest) != path_info:
            problems: list[VerifyError] = []
            await Verifier(self._services, problems.append).verify_path_info(path_info)
            if problems:
                more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
                raise ContradictionError(f"{problems[0]}{more}")
        return await self._path_infos.put(path_info)

    def list(self) -> AsyncIterator[bytes]:
        """See `PathInfoService.list`."""
        return self._path_infos.list()

    async def calculate_nar(self, node: Node) -> NarInfo:
        """See `PathInfoService.calculate_nar`."""
        return await self._path_infos.calculate_nar(node)
