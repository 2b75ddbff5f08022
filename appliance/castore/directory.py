"""Nodes and directories, and their canonical encoding.

castore.proto: Directory, DirectoryNode, FileNode, SymlinkNode, Node.
"""

from collections.abc import Iterable, Iterator
from heapq import merge
from operator import attrgetter
from typing import Final, NamedTuple, TypeVar

from google.protobuf.message import DecodeError

from appliance.castore.digest import Digest
from appliance.castore.names import check_name, check_target
from appliance.castore.size_dialect import DEFAULT_DIALECT, SizeDialect
from appliance.errors import DirectoryError
from appliance.protos import castore_pb2

# Sizes are unsigned numbers of 64 bits.
SIZE_LIMIT: Final = 1 << 64


class WrongSortingError(DirectoryError):
    """A name does not come after the one before it in its list."""

    def __init__(self, name: bytes) -> None:
        super().__init__(f"name {name!r}: its list is not sorted", rule="wrong-sorting")


class DirectoryNode(NamedTuple):
    """A subdirectory; `size` counts all entries below it, as `SizeDialect` says."""

    name: bytes
    digest: Digest
    size: int


class FileNode(NamedTuple):
    """A regular file of `size` bytes."""

    name: bytes
    digest: Digest
    size: int
    executable: bool


class SymlinkNode(NamedTuple):
    """A symbolic link."""

    name: bytes
    target: bytes


Node = DirectoryNode | FileNode | SymlinkNode
_N = TypeVar("_N", DirectoryNode, FileNode, SymlinkNode)

_by_name = attrgetter("name")


class Directory:
    """A valid, immutable directory: three lists sorted by name, names unique over all of them.

    Raises:
        DirectoryError: an entry breaks a rule; `rule` says which. The lists are checked in the
            order of the arguments, and each entry for its name (`invalid-name`), its target or
            size (`invalid-symlink-target`, `size-overflow`), its place (`wrong-sorting`), and the
            uniqueness of its name (`duplicate-name`).
    """

    __slots__ = ("_digest", "_encoded", "directories", "files", "symlinks")

    # Each is computed when first asked for.
    _encoded: bytes | None
    _digest: Digest | None
    directories: tuple[DirectoryNode, ...]
    files: tuple[FileNode, ...]
    symlinks: tuple[SymlinkNode, ...]

    def __init__(
        self,
        directories: Iterable[DirectoryNode] = (),
        files: Iterable[FileNode] = (),
        symlinks: Iterable[SymlinkNode] = (),
    ) -> None:
        seen: set[bytes] = set()
        self._encoded = None
        self._digest = None
        self.directories = _checked(directories, seen)
        self.files = _checked(files, seen)
        self.symlinks = _checked(symlinks, seen)

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> "Directory":
        """Decode and validate a directory.

        Unknown fields are dropped, so `to_bytes` may differ from `data`; the digest is that of
        `to_bytes`.

        Raises:
            DirectoryError: `data` is not a Directory, or breaks a rule.
        """
        try:
            message = castore_pb2.Directory.FromString(bytes(data))
        except DecodeError as exc:
            raise DirectoryError("not a Directory message", rule="not-a-message") from exc
        directory = cls.from_message(message)
        message.DiscardUnknownFields()
        directory._encoded = message.SerializeToString(deterministic=True)  # noqa: SLF001 - its own
        return directory

    @classmethod
    def from_message(cls, message: castore_pb2.Directory) -> "Directory":
        """Validate a decoded directory.

        Raises:
            DirectoryError: `message` breaks a rule.
        """
        return cls(
            map(_directory_node, message.directories),
            map(_file_node, message.files),
            map(_symlink_node, message.symlinks),
        )

    def to_message(self) -> castore_pb2.Directory:
        """Return the directory as a message."""
        message = castore_pb2.Directory()
        for directory in self.directories:
            message.directories.add(
                name=directory.name, digest=directory.digest, size=directory.size
            )
        for file in self.files:
            message.files.add(
                name=file.name, digest=file.digest, size=file.size, executable=file.executable
            )
        for symlink in self.symlinks:
            message.symlinks.add(name=symlink.name, target=symlink.target)
        return message

    def to_bytes(self) -> bytes:
        """Return the canonical encoding."""
        if self._encoded is None:
            self._encoded = self.to_message().SerializeToString(deterministic=True)
        return self._encoded

    def digest(self) -> Digest:
        """Return the digest of the canonical encoding."""
        if self._digest is None:
            self._digest = Digest.of(self.to_bytes())
        return self._digest

    def size(self, dialect: SizeDialect = DEFAULT_DIALECT) -> int:
        """Return the `size` that a node for this directory must have.

        Raises:
            DirectoryError: it does not fit in 64 bits (rule `size-overflow`).
        """
        size = len(self) * dialect.value + sum(node.size for node in self.directories)
        if size >= SIZE_LIMIT:
            raise DirectoryError(f"directory size {size} exceeds 64 bits", rule="size-overflow")
        return size

    def nodes(self) -> Iterator[Node]:
        """Yield all nodes by ascending name."""
        return merge(self.directories, self.files, self.symlinks, key=_by_name)

    def __len__(self) -> int:
        return len(self.directories) + len(self.files) + len(self.symlinks)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Directory):
            return NotImplemented
        return self._lists() == other._lists()

    def __hash__(self) -> int:
        return hash(self._lists())

    def __repr__(self) -> str:
        return f"Directory{self._lists()!r}"

    def _lists(self) -> tuple[tuple[Node, ...], ...]:
        return (self.directories, self.files, self.symlinks)


def node_to_message(node: Node) -> castore_pb2.Node:
    """Return a root node as a message."""
    if isinstance(node, DirectoryNode):
        return castore_pb2.Node(directory=castore_pb2.DirectoryNode(**node._asdict()))
    if isinstance(node, FileNode):
        return castore_pb2.Node(file=castore_pb2.FileNode(**node._asdict()))
    return castore_pb2.Node(symlink=castore_pb2.SymlinkNode(**node._asdict()))


def node_from_message(message: castore_pb2.Node) -> Node:
    """Return the root node in `message`, without checking its name.

    Raises:
        DirectoryError: there is none (rule `no-node-present`), its digest does not have 32 bytes
            (`invalid-digest-len`), or its target is not valid (`invalid-symlink-target`).
    """
    match message.WhichOneof("node"):
        case "directory":
            return _root_directory(message.directory)
        case "file":
            return _root_file(message.file)
        case "symlink":
            return SymlinkNode(message.symlink.name, check_target(message.symlink.target))
        case _:
            raise DirectoryError(
                "none of directory, file and symlink is set", rule="no-node-present"
            )


def _root_directory(message: castore_pb2.DirectoryNode) -> DirectoryNode:
    return DirectoryNode(message.name, Digest(message.digest), message.size)


def _root_file(message: castore_pb2.FileNode) -> FileNode:
    return FileNode(message.name, Digest(message.digest), message.size, message.executable)


def _directory_node(message: castore_pb2.DirectoryNode) -> DirectoryNode:
    check_name(message.name)
    return _root_directory(message)


def _file_node(message: castore_pb2.FileNode) -> FileNode:
    check_name(message.name)
    return _root_file(message)


def _symlink_node(message: castore_pb2.SymlinkNode) -> SymlinkNode:
    return SymlinkNode(message.name, message.target)


def _checked(nodes: Iterable[_N], seen: set[bytes]) -> tuple[_N, ...]:
    checked = []
    last = b""
    for node in nodes:
        name = check_name(node.name)
        if isinstance(node, SymlinkNode):
            check_target(node.target)
        elif node.size >= SIZE_LIMIT:
            raise DirectoryError(
                f"name {name!r}: size {node.size} exceeds 64 bits", rule="size-overflow"
            )
        if name < last:
            raise WrongSortingError(name)
        if name in seen:
            raise DirectoryError(
                f"name {name!r}: occurs twice in the directory", rule="duplicate-name"
            )
        seen.add(name)
        last = name
        checked.append(node)
    return tuple(checked)
