"""The number of entries and the size of the NAR of a tree, computed without walking the tree.

A few directories that each refer twice to the next one make a tree with more entries than can ever
be counted one by one. Therefore the number of entries below a directory, and the size of its part
of a NAR, are computed once for each directory, however often it occurs. Work that takes a step for
each entry, like hashing a NAR or listing a path, is done only for trees within a limit.
"""

from typing import Final, NamedTuple

from appliance.castore.digest import Digest
from appliance.castore.directory import Directory, DirectoryNode, FileNode, Node, SymlinkNode
from appliance.errors import NarError, StoreError
from appliance.nix import nar
from appliance.services.contracts import DirectoryService

# Minutes of work, and more files than any real store path has.
ENTRIES_MAX: Final = 1 << 24
# In bytes: some hours of work.
BYTES_MAX: Final = 1 << 44

_LENGTH: Final = 8
# What an entry has in place of `ROOT_SIZE`, which opens and closes the root.
ENTRY_SIZE: Final = len(nar.ENTRY) + len(nar.NODE) + len(nar.CLOSE_ENTRY)
ROOT_SIZE: Final = len(nar.HEADER) + len(nar.CLOSE)


class NarTooLargeError(NarError):
    """A tree has too many entries, is nested too deeply, or its NAR has too many bytes."""


class Extent(NamedTuple):
    """How large a tree is.

    `num_entries` does not count the root; `nar_size` is that of the whole NAR, in bytes.
    """

    num_entries: int
    nar_size: int

    def check(self, what: str) -> None:
        """Check that the tree is within both limits.

        Args:
            what: what the tree is called in the error message.

        Raises:
            NarTooLargeError: the tree exceeds a limit.
        """
        if self.num_entries > ENTRIES_MAX:
            raise NarTooLargeError(
                f"{what} has {self.num_entries} entries, the limit is {ENTRIES_MAX}"
            )
        if self.nar_size > BYTES_MAX:
            raise NarTooLargeError(
                f"{what} has a NAR of {self.nar_size} bytes, the limit is {BYTES_MAX}"
            )


class Part(NamedTuple):
    """What a directory adds to a tree without its subdirectories, and the digests of those.

    `size` is in bytes of the NAR.
    """

    num_entries: int
    size: int
    below: tuple[Digest, ...]


async def extent_of(node: Node, directories: DirectoryService) -> Extent | None:
    """Return the extent of a tree; each of its directories is read once.

    Return None if a directory cannot be read. The caller meets the error when it walks the tree.
    """
    if not isinstance(node, DirectoryNode):
        return Extent(0, ROOT_SIZE + body_size(node))
    parts: dict[Digest, Part] = {}
    try:
        async for directory in directories.get_recursive(node.digest):
            parts[directory.digest()] = part_of(directory)
    except StoreError:
        return None
    if node.digest not in parts:
        return None
    # Parents come before their children, so from the end on everything below is known.
    extents: dict[Digest, tuple[int, int]] = {}
    for digest, part in reversed(parts.items()):
        below = [extents[child] for child in part.below]
        extents[digest] = (
            part.num_entries + sum(num_entries for num_entries, _size in below),
            part.size + sum(size for _num_entries, size in below),
        )
    num_entries, size = extents[node.digest]
    return Extent(num_entries, ROOT_SIZE + size)


def part_of(directory: Directory) -> Part:
    """Return what a directory adds to a tree, without its subdirectories."""
    size = len(nar.DIRECTORY)
    for node in directory.nodes():
        size += ENTRY_SIZE + string_size(len(node.name))
        if not isinstance(node, DirectoryNode):
            size += body_size(node)
    below = tuple(node.digest for node in directory.directories)
    return Part(len(directory), size, below)


def body_size(node: FileNode | SymlinkNode) -> int:
    """Return the size in bytes of a node in a NAR, without what opens and closes it."""
    if isinstance(node, SymlinkNode):
        return len(nar.SYMLINK) + string_size(len(node.target))
    return len(nar.EXECUTABLE if node.executable else nar.REGULAR) + string_size(node.size)


def string_size(size: int) -> int:
    """Return the size in bytes of a string of `size` bytes in a NAR."""
    return _LENGTH + size + -size % _LENGTH
