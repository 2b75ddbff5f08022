"""The contents of store paths as a person sees them."""

from collections.abc import AsyncGenerator
from typing import Final, TypeAlias

from appliance.castore.directory import DirectoryNode, FileNode, Node, SymlinkNode
from appliance.errors import StoreError
from appliance.nix.path_info import read_path_info
from appliance.services.contracts import Services
from appliance.services.nar_extent import ENTRIES_MAX, NarTooLargeError, extent_of
from appliance.services.nar_render import directory_not_found, file_content, render_nar
from appliance.services.paths_in_store import display_path, parse_path, text_of

# JSON is built in memory before it is printed, and recursively.
_JSON_ENTRIES_MAX: Final = 1 << 21
_JSON_DEPTH_MAX: Final = 400

Json: TypeAlias = "dict[str, str | int | bool | Json]"


class StoreView:
    """Reads paths and their contents from services."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def find(self, path: str) -> Node:
        """Return the node at a store path, or below one; symlinks are not followed.

        Raises:
            ConfigError: `path` is not a store path.
            StoreError: there is no such path.
        """
        store_path, names = parse_path(path)
        encoded = await self._services.path_infos.get(store_path.digest)
        if encoded is None:
            raise StoreError(f"path {store_path.absolute()} is not valid")
        info = read_path_info(encoded)
        if info.path != store_path:
            raise StoreError(f"path {store_path.absolute()} is not valid")
        node: Node = info.node
        for name in names:
            child = await self._child(node, name)
            if child is None:
                raise StoreError(f"path {display_path(path)} does not exist")
            node = child
        return node

    def nar(self, node: Node) -> AsyncGenerator[bytes, None]:
        """Yield the NAR of a node."""
        return render_nar(node, self._services.blobs, self._services.directories)

    def content(self, node: Node, path: str) -> AsyncGenerator[bytes, None]:
        """Yield the content of a file in pieces, and check it at the end.

        Raises:
            StoreError: `node` is not a file, or its content is missing or wrong.
            NarError: its content is not as long as its node says.
        """
        if not isinstance(node, FileNode):
            raise StoreError(f"path {display_path(path)} is not a regular file")
        return file_content(node, self._services.blobs)

    async def walk(
        self, node: Node, *, is_recursive: bool
    ) -> AsyncGenerator[tuple[str, Node], None]:
        """Yield the entries of a directory, with paths relative to it.

        If `node` is not a directory, yield only `node` and its name.

        Raises:
            NarTooLargeError: there are too many entries.
        """
        if is_recursive:
            await self._check_extent(node)
        if not isinstance(node, DirectoryNode):
            yield text_of(node.name), node
            return
        left = [(".", child) for child in reversed(await self._children(node))]
        num_entries = 0
        while left:
            num_entries += 1
            # `_check_extent` does not count a tree in which a directory cannot be read.
            if num_entries > ENTRIES_MAX:
                raise NarTooLargeError(f"tree has more than {ENTRIES_MAX} entries")
            parent, child = left.pop()
            path = f"{parent}/{text_of(child.name)}"
            yield path, child
            if is_recursive and isinstance(child, DirectoryNode):
                left.extend((path, below) for below in reversed(await self._children(child)))

    async def tree(self, node: Node, *, is_recursive: bool) -> Json:
        """Return a node, and what is below it, as `nix store ls --json` prints it.

        Raises:
            NarTooLargeError: there are too many entries, or they are nested too deeply.
        """
        if is_recursive:
            await self._check_extent(node, _JSON_ENTRIES_MAX)
        return await self._tree(node, is_recursive=is_recursive, depth=0)

    async def _tree(self, node: Node, *, is_recursive: bool, depth: int) -> Json:
        if depth > _JSON_DEPTH_MAX:
            raise NarTooLargeError(f"tree is more than {_JSON_DEPTH_MAX} directories deep")
        match node:
            case SymlinkNode():
                return {"type": "symlink", "target": text_of(node.target)}
            case FileNode():
                shown: Json = {"type": "regular", "size": node.size}
                if node.executable:
                    shown["executable"] = True
                return shown
        entries: Json = {}
        for child in await self._children(node):
            is_shown = is_recursive or not isinstance(child, DirectoryNode)
            entries[text_of(child.name)] = (
                await self._tree(child, is_recursive=True, depth=depth + 1)
                if is_shown
                else {"type": "directory"}
            )
        return {"type": "directory", "entries": entries}

    async def _check_extent(self, node: Node, entries_max: int = ENTRIES_MAX) -> None:
        extent = await extent_of(node, self._services.directories)
        if extent is not None and extent.num_entries > entries_max:
            raise NarTooLargeError(
                f"{text_of(node.name)} has {extent.num_entries} entries, the limit is {entries_max}"
            )

    async def _child(self, node: Node, name: bytes) -> Node | None:
        if not isinstance(node, DirectoryNode):
            return None
        return next((child for child in await self._children(node) if child.name == name), None)

    async def _children(self, node: DirectoryNode) -> list[Node]:
        directory = await self._services.directories.get(node.digest)
        if directory is None:
            raise directory_not_found(node)
        return list(directory.nodes())


def describe(name: str, node: Node, *, is_long: bool) -> str:
    """Return the line that lists a node; if `is_long`, as `nix store ls -l` prints it."""
    if not is_long:
        return name
    match node:
        case DirectoryNode():
            return f"dr-xr-xr-x {0:>20} {name}"
        case SymlinkNode():
            return f"lrwxrwxrwx {0:>20} {name} -> {text_of(node.target)}"
        case FileNode():
            mode = "-r-xr-xr-x" if node.executable else "-r--r--r--"
            return f"{mode} {node.size:>20} {name}"
