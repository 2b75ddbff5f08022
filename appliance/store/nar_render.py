"""Rendering the NAR of stored content."""

from collections.abc import Callable, Iterable, Iterator

from appliance.castore.digest import Digest
from appliance.castore.nodes import Directory, DirectoryNode, FileNode, Node, SymlinkNode
from appliance.errors import NarError
from appliance.nar.writer import Buffer, NarWriter


class DirectoryNotFoundError(NarError):
    """A directory is absent."""

    def __init__(self, digest: Digest, name: bytes) -> None:
        super().__init__(f"directory {digest}, named {name!r}, is not there")
        self.digest = digest
        self.name = name


class BlobNotFoundError(NarError):
    """A blob is absent."""

    def __init__(self, digest: Digest, name: bytes) -> None:
        super().__init__(f"blob {digest}, of {name!r}, is not there")
        self.digest = digest
        self.name = name


class BlobTooShortError(NarError):
    """A blob has less than the size of its node."""


class BlobTooLongError(NarError):
    """A blob has more than the size of its node."""


def render_nar(
    root: Node,
    *,
    directory: Callable[[Digest], Directory | None],
    blob: Callable[[Digest], Iterable[Buffer] | None],
    sink: Callable[[Buffer], object],
) -> int:
    """Hand the NAR of `root` to `sink`, and return its size in bytes.

    The name of `root` does not matter. `blob` gives the content in pieces.

    Raises:
        NarError: content is absent or not as its node says; `sink` has got a part of the NAR.
    """
    writer = NarWriter(sink)
    stack: list[Iterator[Node]] = []
    _render_node(writer, root, stack, directory, blob)
    while stack:
        node = next(stack[-1], None)
        if node is None:
            stack.pop()
            writer.end_directory()
        else:
            writer.entry(node.name)
            _render_node(writer, node, stack, directory, blob)
    return writer.finish()


def _render_node(
    writer: NarWriter,
    node: Node,
    stack: list[Iterator[Node]],
    directory: Callable[[Digest], Directory | None],
    blob: Callable[[Digest], Iterable[Buffer] | None],
) -> None:
    if isinstance(node, SymlinkNode):
        writer.symlink(node.target)
    elif isinstance(node, FileNode):
        _render_file(writer, node, blob)
    else:
        writer.directory()
        stack.append(_entries(node, directory))


def _render_file(
    writer: NarWriter, node: FileNode, blob: Callable[[Digest], Iterable[Buffer] | None]
) -> None:
    pieces = blob(node.digest)
    if pieces is None:
        raise BlobNotFoundError(node.digest, node.name)
    writer.regular(node.size, executable=node.executable)
    missing_bytes = node.size
    for piece in pieces:
        if len(piece) > missing_bytes:
            raise BlobTooLongError(f"blob {node.digest} has more than {node.size} bytes")
        if piece:
            writer.content(piece)
            missing_bytes -= len(piece)
    if missing_bytes:
        raise BlobTooShortError(f"blob {node.digest} has {missing_bytes} of {node.size} bytes less")


def _entries(
    node: DirectoryNode, directory: Callable[[Digest], Directory | None]
) -> Iterator[Node]:
    found = directory(node.digest)
    if found is None:
        raise DirectoryNotFoundError(node.digest, node.name)
    return found.nodes()
