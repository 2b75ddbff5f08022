"""Rules for a stream of directories that makes up one closure.

castore.proto: DirectoryService.Put. Leaves come first; the last directory is the root, and all
others are below it. Repetition is allowed.
"""

from collections.abc import Callable

from appliance.castore.digest import Digest
from appliance.castore.directory import SIZE_LIMIT, Directory, DirectoryNode, Node
from appliance.castore.size_dialect import SizeDialect
from appliance.errors import DirectoryError


class ClosureError(DirectoryError):
    """A stream of directories is not one closure, leaves first."""


class UnknownChildError(ClosureError):
    """A directory refers to one that did not come before it."""


class WrongSizeError(ClosureError):
    """A directory states a size for another that is not its size."""


class DisconnectedError(ClosureError):
    """Some directories are not below the last one."""


class EmptyClosureError(ClosureError):
    """There are no directories."""


class ClosureChecker:
    """Checks a stream of directories, keeping only digests and sizes."""

    def __init__(self) -> None:
        # Per digest: number of entries, and sum of the sizes that the directory states.
        self._seen: dict[Digest, tuple[int, int]] = {}
        self._unreferenced: set[Digest] = set()
        self._dialects = set(SizeDialect)
        self._root: Digest | None = None

    def add(self, directory: Directory) -> bool:
        """Check the next directory; return whether it is new.

        Raises:
            ClosureError: it cannot stand here.
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
                raise WrongSizeError(
                    f"directory {node.name!r}: its size is not {node.size}, "
                    "or is counted otherwise than in the directories before"
                )
            stated_size += node.size
        dialects = {
            dialect
            for dialect in dialects
            if len(directory) * dialect.value + stated_size < SIZE_LIMIT
        }
        if not dialects:
            raise WrongSizeError(f"directory {digest}: its size exceeds 64 bits")
        self._dialects = dialects
        self._seen[digest] = (len(directory), stated_size)
        self._unreferenced.difference_update(node.digest for node in directory.directories)
        self._unreferenced.add(digest)
        return True

    def finish(self) -> Digest:
        """Return the digest of the root.

        Raises:
            ClosureError: there is none, or not everything is below it.
        """
        if self._root is None:
            raise EmptyClosureError("no directories received")
        if self._unreferenced != {self._root}:
            num_others = len(self._unreferenced - {self._root})
            raise DisconnectedError(f"{num_others} directories are not below the last one")
        return self._root

    def _dialects_of(self, node: DirectoryNode) -> set[SizeDialect]:
        known = self._seen.get(node.digest)
        if known is None:
            raise UnknownChildError(
                f"directory {node.name!r}: {node.digest} did not come before it"
            )
        num_entries, stated_size = known
        return {
            dialect
            for dialect in SizeDialect
            if node.size == num_entries * dialect.value + stated_size
        }


class TopologicalOrder:
    """Puts a closure in an order that has every parent before its children; keeps digests only.

    First `next_undiscovered` and `discover` take turns until all are known; then `next_ready` and
    `release` until all have been yielded.
    """

    def __init__(self, root: Digest) -> None:
        self._num_parents: dict[Digest, int] = {root: 0}
        self._undiscovered = [root]
        self._ready = [root]

    def next_undiscovered(self) -> Digest | None:
        """Return a digest whose directory `discover` wants, or None when all are known."""
        return self._undiscovered.pop() if self._undiscovered else None

    def discover(self, directory: Directory) -> None:
        """Take note of the children of a directory asked for."""
        for digest in _children(directory):
            if digest not in self._num_parents:
                self._num_parents[digest] = 0
                self._undiscovered.append(digest)
            self._num_parents[digest] += 1

    def next_ready(self) -> Digest | None:
        """Return the digest that comes next; `release` wants its directory. None at the end."""
        return self._ready.pop() if self._ready else None

    def release(self, directory: Directory) -> None:
        """Let the children of a directory follow, once it was the last of their parents."""
        for digest in _children(directory):
            self._num_parents[digest] -= 1
            if self._num_parents[digest] == 0:
                del self._num_parents[digest]
                self._ready.append(digest)


def _children(directory: Directory) -> set[Digest]:
    return {node.digest for node in directory.directories}


# --- Trees that are equal but for the sizes in their directories ---


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
