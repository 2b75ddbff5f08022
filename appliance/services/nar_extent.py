"""How large a tree is when it is written out, found without writing it out.

A few directories that name each other twice make a tree of more entries than can ever be counted.
What is the same wherever a directory appears is computed once for each: how many entries are below
it, and how long its part of a NAR is. What takes a step for each entry, as hashing a NAR or listing
all that is in a path, is done for trees up to a limit.
"""

from typing import Final, NamedTuple

from appliance.castore.digest import Digest
from appliance.castore.directory import Directory, DirectoryNode, FileNode, Node, SymlinkNode
from appliance.errors import NarError, StoreError
from appliance.nix import nar
from appliance.services.contracts import DirectoryService

# Minutes of work, and more files than anybody has in one store path.
ENTRIES_MAX: Final = 1 << 24
# Some hours of work.
BYTES_MAX: Final = 1 << 44

_LENGTH: Final = 8
# In place of what opens and closes the root, an entry has these.
_ENTRY: Final = len(nar.ENTRY) + len(nar.NODE) + len(nar.CLOSE_ENTRY)
_ROOT: Final = len(nar.HEADER) + len(nar.CLOSE)


class NarTooLargeError(NarError):
    """A tree has more entries than are ever worked on, or its NAR more bytes."""


class Extent(NamedTuple):
    """What there is of a tree, itself not counted."""

    num_entries: int
    nar_size: int
    """Of the whole NAR, in bytes."""

    def check(self, what: str) -> None:
        """Check that it is not too large.

        Raises:
            NarTooLargeError: it is.
        """
        if self.num_entries > ENTRIES_MAX:
            raise NarTooLargeError(
                f"{what} has {self.num_entries} entries; up to {ENTRIES_MAX} are worked on"
            )
        if self.nar_size > BYTES_MAX:
            raise NarTooLargeError(
                f"{what} has a NAR of {self.nar_size} bytes; up to {BYTES_MAX} are worked on"
            )


class _Part(NamedTuple):
    """What a directory adds to a tree: without those below it, and which those are."""

    num_entries: int
    size: int
    below: tuple[Digest, ...]


async def extent_of(node: Node, directories: DirectoryService) -> Extent | None:
    """Return the extent of a tree, each of whose directories is read once.

    None if one of them cannot be had: who walks the tree is told then.
    """
    if not isinstance(node, DirectoryNode):
        return Extent(0, _ROOT + _body(node))
    parts: dict[Digest, _Part] = {}
    try:
        async for directory in directories.get_recursive(node.digest):
            parts[directory.digest()] = _part(directory)
    except StoreError:
        return None
    if node.digest not in parts:
        return None
    # Parents came first: from the end on, what is below a directory is known.
    extents: dict[Digest, tuple[int, int]] = {}
    for digest, part in reversed(parts.items()):
        below = [extents[child] for child in part.below]
        extents[digest] = (
            part.num_entries + sum(num_entries for num_entries, _size in below),
            part.size + sum(size for _num_entries, size in below),
        )
    num_entries, size = extents[node.digest]
    return Extent(num_entries, _ROOT + size)


def _part(directory: Directory) -> _Part:
    size = len(nar.DIRECTORY)
    for node in directory.nodes():
        size += _ENTRY + _string(len(node.name))
        if not isinstance(node, DirectoryNode):
            size += _body(node)
    below = tuple(node.digest for node in directory.directories)
    return _Part(len(directory), size, below)


def _body(node: FileNode | SymlinkNode) -> int:
    if isinstance(node, SymlinkNode):
        return len(nar.SYMLINK) + _string(len(node.target))
    return len(nar.EXECUTABLE if node.executable else nar.REGULAR) + _string(node.size)


def _string(size: int) -> int:
    return _LENGTH + size + -size % _LENGTH
