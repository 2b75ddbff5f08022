"""Whether two trees have the same content, though their directories count their sizes otherwise."""

from collections.abc import Callable

from appliance.castore.digest import Digest
from appliance.castore.nodes import Directory, DirectoryNode, Node


def is_same_tree(
    one: Node, other: Node, directory_of: Callable[[Digest], Directory | None]
) -> bool:
    """Whether `one` and `other` are the same but for the sizes of directories, and so for digests.

    Each directory is compared once. False, too, if some of them are not there to be compared.
    """
    if not isinstance(one, DirectoryNode) or not isinstance(other, DirectoryNode):
        return one == other
    # Each directory of one tree is one of the other, wherever it is; they cannot be more.
    found = {one.digest: other.digest}
    left = [(one.digest, other.digest)]
    while left:
        digests = left.pop()
        if digests[0] == digests[1]:
            continue
        pairs = _pairs_below(*map(directory_of, digests))
        if pairs is None:
            return False
        for digest, other_digest in pairs:
            if digest not in found:
                found[digest] = other_digest
                left.append((digest, other_digest))
            elif found[digest] != other_digest:
                return False
    return one.name == other.name


def _pairs_below(
    one: Directory | None, other: Directory | None
) -> list[tuple[Digest, Digest]] | None:
    """Return the directories that have the same name in both, or None if something is another."""
    if one is None or other is None or len(one) != len(other):
        return None
    if one.files != other.files or one.symlinks != other.symlinks:
        return None
    # Of as many entries in all, and as many files and symlinks, as many are directories.
    pairs = list(zip(one.directories, other.directories, strict=True))
    if any(node.name != other_node.name for node, other_node in pairs):
        return None
    return [(node.digest, other_node.digest) for node, other_node in pairs]
