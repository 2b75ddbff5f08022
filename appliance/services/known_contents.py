"""What a service without transactions knows about contents while it decides about a PathInfo."""

from collections.abc import Mapping
from contextlib import suppress

from appliance.castore.digest import Digest
from appliance.castore.directory import Directory, DirectoryNode, Node
from appliance.errors import StoreError
from appliance.services.contracts import DirectoryService, NarInfo


class KnownContents:
    """Implements `path_info_rules.Known` with directories that `read` has loaded before.

    Args:
        nar_infos: NARs that were calculated, by their `nar_key`.
    """

    def __init__(self, nar_infos: Mapping[Digest, NarInfo]) -> None:
        self._nar_infos = nar_infos
        self._directories: dict[Digest, Directory] = {}

    async def read(self, node: Node, directories: DirectoryService) -> None:
        """Load the directories of a tree; what cannot be read is not compared."""
        if isinstance(node, DirectoryNode) and node.digest not in self._directories:
            with suppress(StoreError):
                async for directory in directories.get_recursive(node.digest):
                    self._directories[directory.digest()] = directory

    def nar_of(self, key: Digest) -> NarInfo | None:
        """See `Known.nar_of`."""
        return self._nar_infos.get(key)

    def directory_of(self, digest: Digest) -> Directory | None:
        """See `Known.directory_of`."""
        return self._directories.get(digest)
