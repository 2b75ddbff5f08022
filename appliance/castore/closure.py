"""Closures: a root directory and all directories below it.

This module checks a stream of directories that makes up a closure, puts the directories of one in
order, and compares two trees that may count their sizes in different ways.

castore.proto: DirectoryService.
"""

from collections.abc import Callable

from appliance.castore.digest import Digest
from appliance.castore.directory import SIZE_LIMIT, Directory, DirectoryNode, Node
from appliance.castore.size_dialect import SizeDialect
from appliance.errors import DirectoryError

# --- Checking a stream: children before parents ---
#
# castore.proto: DirectoryService.Put. Leaves come first; the last directory is the root, and all
# others are below it. Repetition is allowed.


class ClosureChecker:
    """Checks a stream of directories, and keeps only their digests and sizes."""

    def __init__(self) -> None:
        # For each directory: its number of entries, and the sum of the sizes in its nodes.
        self._seen: dict[Digest, tuple[int, int]] = {}
        self._unreferenced: set[Digest] = set()
        # The ways of counting that fit all directories so far: one closure has one way.
        self._dialects = set(SizeDialect)
        self._root: Digest | None = None

    def add(self, directory: Directory) -> bool:
        """Check the next directory; return whether it is new.

        Raises:
            DirectoryError: a child did not come before it (rule `unknown-child`), or it states a
                wrong size for a child, or its own size exceeds 64 bits (`wrong-size`).
        """
        digest = directory.digest()
        self._root = digest
        if digest in self._seen:
            return False
        dialects = set(self._dialects)
        stated_size = 0
        for node in directory.directories:
            dialects &= self._dialects_of(node)
            if not dialects:
                raise DirectoryError(
                    f"directory {node.name!r}: its size is not {node.size}, "
                    "or is counted differently than in the directories before it",
                    rule="wrong-size",
                )
            stated_size += node.size
        dialects = {
            dialect
            for dialect in dialects
            if len(directory) * dialect.value + stated_size < SIZE_LIMIT
        }
        if not dialects:
            raise DirectoryError(f"directory {digest}: its size exceeds 64 bits", rule="wrong-size")
        self._dialects = dialects
        self._seen[digest] = (len(directory), stated_size)
        self._unreferenced.difference_update(node.digest for node in directory.directories)
        self._unreferenced.add(digest)
        return True

    def finish(self) -> Digest:
        """Return the digest of the root.

        Raises:
            DirectoryError: there were no directories (rule `empty-closure`), or some are not below
                the root (`disconnected`).
        """
        if self._root is None:
            raise DirectoryError("no directories received", rule="empty-closure")
        if self._unreferenced != {self._root}:
            num_others = len(self._unreferenced - {self._root})
            raise DirectoryError(
                f"{num_others} directories are not below the last one", rule="disconnected"
            )
        return self._root

    def _dialects_of(self, node: DirectoryNode) -> set[SizeDialect]:
        known = self._seen.get(node.digest)
        if known is None:
            raise DirectoryError(
                f"directory {node.name!r}: {node.digest} did not come before its parent",
                rule="unknown-child",
            )
        num_entries, stated_size = known
        return {
            dialect
            for dialect in SizeDialect
            if node.size == num_entries * dialect.value + stated_size
        }


# --- Ordering: parents before children ---


class TopologicalOrder:
    """Orders a closure so that every parent comes before its children; keeps only digests.

    The caller reads the directories, twice. First it calls `next_undiscovered` and `discover` in
    turns until all are known, then `next_ready` and `release` in turns until all have come out.
    """

    def __init__(self, root: Digest) -> None:
        self._num_parents: dict[Digest, int] = {root: 0}
        self._undiscovered = [root]
        self._ready = [root]

    def next_undiscovered(self) -> Digest | None:
        """Return the digest of the directory to pass to `discover`; None when all are known."""
        return self._undiscovered.pop() if self._undiscovered else None

    def discover(self, directory: Directory) -> None:
        """Count the references from `directory` to its children."""
        for digest in _children(directory):
            if digest not in self._num_parents:
                self._num_parents[digest] = 0
                self._undiscovered.append(digest)
            self._num_parents[digest] += 1

    def next_ready(self) -> Digest | None:
        """Return the next digest, whose directory goes to `release`; None at the end."""
        return self._ready.pop() if self._ready else None

    def release(self, directory: Directory) -> None:
        """Make those children ready whose last remaining parent was `directory`."""
        for digest in _children(directory):
            self._num_parents[digest] -= 1
            if self._num_parents[digest] == 0:
                del self._num_parents[digest]
                self._ready.append(digest)


def _children(directory: Directory) -> set[Digest]:
    return {node.digest for node in directory.directories}


# --- Comparing: trees that are equal except for the sizes in their directories ---


def is_same_tree(
    one: Node, other: Node, directory_of: Callable[[Digest], Directory | None]
) -> bool:
    """Whether two trees differ only in the sizes, and so in the digests, of their directories.

    Each directory is compared once.

    Args:
        one: a root node.
        other: another root node.
        directory_of: returns a directory by its digest. If it returns None for one that has to be
            compared, the trees count as different.
    """
    if not isinstance(one, DirectoryNode) or not isinstance(other, DirectoryNode):
        return one == other
    # Wherever a directory of one tree occurs, the same directory of the other must be in its place:
    # one pair per directory of `one` is enough, however often the directory occurs.
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
    """Return the pairs of subdirectories; None if the directories differ in anything else."""
    if one is None or other is None or len(one) != len(other):
        return None
    if one.files != other.files or one.symlinks != other.symlinks:
        return None
    # The numbers of entries, files and symlinks are equal, and so is the number of directories.
    pairs = list(zip(one.directories, other.directories, strict=True))
    if any(node.name != other_node.name for node, other_node in pairs):
        return None
    return [(node.digest, other_node.digest) for node, other_node in pairs]
