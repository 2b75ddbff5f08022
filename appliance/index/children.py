"""What the index needs to know of a castore node, and what makes two nodes the same content."""

import struct
from enum import IntEnum
from typing import Final, NamedTuple

from appliance.castore.digest import Digest
from appliance.castore.nodes import DirectoryNode, FileNode, Node

# st_size of every directory; the size in a DirectoryNode depends on who wrote it (SizeDialect).
DIRECTORY_SIZE: Final = 4096
_IDENTITY: Final = struct.Struct("<B32sQ")


class Kind(IntEnum):
    """What a content number stands for; the value is the kind byte of keys and records."""

    DIRECTORY = ord("d")
    FILE = ord("f")
    EXECUTABLE = ord("x")
    SYMLINK = ord("l")


class Child(NamedTuple):
    """A node in a directory; `digest` is BLAKE3 of `target` for a symlink, `size` is st_size."""

    name: bytes
    kind: Kind
    digest: Digest
    size: int
    target: bytes


def identity(child: Child) -> bytes:
    """Return what two nodes have in common if and only if they get one content number.

    The executable bit is part of it. The size is too: a Directory may state a wrong one, and such
    a lie must not become the size of the same file where it is stated right.
    """
    return _IDENTITY.pack(child.kind, child.digest, child.size)


def child_of(node: Node) -> Child:
    """Return `node` as a child of that name."""
    if isinstance(node, FileNode):
        kind = Kind.EXECUTABLE if node.executable else Kind.FILE
        return Child(node.name, kind, node.digest, node.size, b"")
    if isinstance(node, DirectoryNode):
        return Child(node.name, Kind.DIRECTORY, node.digest, DIRECTORY_SIZE, b"")
    return Child(node.name, Kind.SYMLINK, Digest.of(node.target), len(node.target), node.target)
