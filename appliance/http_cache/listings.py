"""Listings of store paths, DIGEST.ls: what is in a NAR and where, as JSON.

    {"version":1,"root":NODE}
    NODE = {"type":"directory","entries":{NAME:NODE, ...}}
         | {"type":"regular","size":BYTES,["executable":true,]"narOffset":OFFSET}
         | {"type":"symlink","target":TARGET}

`narOffset` is where the content of the file begins in the NAR. Nix writes these files with
`write-nar-listing`.
"""

import json
from collections.abc import AsyncGenerator, Iterator
from typing import Final

from appliance.castore.directory import DirectoryNode, FileNode, Node, SymlinkNode
from appliance.nix import nar
from appliance.services.contracts import DirectoryService
from appliance.services.nar_extent import ENTRIES_MAX, NarTooLargeError, body_size, string_size
from appliance.services.nar_render import directory_not_found
from appliance.services.paths_in_store import text_of

# In characters.
_PIECE_SIZE: Final = 1 << 16
_LENGTH: Final = len(nar.length(0))


async def listing(root: Node, directories: DirectoryService) -> AsyncGenerator[bytes, None]:
    """Yield the listing of a tree in pieces.

    Names and targets that are not UTF-8 have lone surrogates, as in `appliance ls --json`.

    Raises:
        ContentMissingError: a Directory is not there.
        NarTooLargeError: the tree has too many entries.
    """
    offset = len(nar.HEADER)
    parts = ['{"version":1,"root":']
    size = 0
    num_entries = 0
    # For each open directory, the entries that follow, and whether one came before.
    open_directories: list[Iterator[Node]] = []
    node: Node | None = root
    while node is not None:
        if isinstance(node, DirectoryNode):
            directory = await directories.get(node.digest)
            if directory is None:
                raise directory_not_found(node)
            open_directories.append(directory.nodes())
            offset += len(nar.DIRECTORY)
            parts.append('{"type":"directory","entries":{')
        else:
            parts.append(_described(node, offset))
            offset += body_size(node)
            if open_directories:
                offset += len(nar.CLOSE_ENTRY)
        is_first = isinstance(node, DirectoryNode)
        node, num_closed = _next_node(open_directories)
        offset += num_closed * len(nar.CLOSE_ENTRY)
        parts.append("}}" * num_closed)
        if node is not None:
            separator = "" if is_first and not num_closed else ","
            parts.append(f"{separator}{json.dumps(text_of(node.name))}:")
            offset += len(nar.ENTRY) + string_size(len(node.name)) + len(nar.NODE)
        num_entries += 1
        if num_entries > ENTRIES_MAX:
            raise NarTooLargeError(f"tree has more than {ENTRIES_MAX} entries")
        size += sum(map(len, parts[-3:]))
        if size >= _PIECE_SIZE:
            yield "".join(parts).encode()
            parts.clear()
            size = 0
    parts.append("}\n")
    yield "".join(parts).encode()


def _next_node(open_directories: list[Iterator[Node]]) -> tuple[Node | None, int]:
    """Return the next node, and how many directories ended before it."""
    num_closed = 0
    while open_directories:
        node = next(open_directories[-1], None)
        if node is not None:
            return node, num_closed
        open_directories.pop()
        num_closed += 1
    return None, num_closed


def _described(node: FileNode | SymlinkNode, offset: int) -> str:
    if isinstance(node, SymlinkNode):
        return f'{{"type":"symlink","target":{json.dumps(text_of(node.target))}}}'
    kind = nar.EXECUTABLE if node.executable else nar.REGULAR
    executable = '"executable":true,' if node.executable else ""
    content_at = offset + len(kind) + _LENGTH
    return f'{{"type":"regular","size":{node.size},{executable}"narOffset":{content_at}}}'
