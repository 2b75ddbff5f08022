"""Rendering NARs from the contents that blob and directory services hold."""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from typing import Final, Protocol

from blake3 import blake3

from appliance.castore.digest import Digest
from appliance.castore.directory import Directory, DirectoryNode, FileNode, Node, SymlinkNode
from appliance.errors import ContentMissingError, NarError, WrongDigestError
from appliance.nix.nar import Buffer, NarWriter
from appliance.services.contracts import BlobService, DirectoryService, NarInfo
from appliance.services.nar_extent import ENTRIES_MAX, NarTooLargeError, extent_of

# In bytes.
PIECE_SIZE: Final = 1 << 18
# The number of directories kept by `RecentDirectories`, plus that of all their entries.
_RECENT_ENTRIES_MAX: Final = 1 << 14


class _Pieces:
    """What the writer has written and `take` has not returned yet; `size` is in bytes."""

    def __init__(self) -> None:
        self._pieces: list[Buffer] = []
        self.size = 0

    def add(self, piece: Buffer) -> None:
        self._pieces.append(piece)
        self.size += len(piece)

    def take(self) -> bytes:
        pieces, self._pieces = self._pieces, []
        self.size = 0
        return b"".join(pieces)


class Contents(Protocol):
    """Gives the contents that nodes refer to.

    `render` asks in the order of the NAR, and consumes each answer before it asks for the next.
    """

    async def children(self, node: DirectoryNode) -> Iterator[Node]:
        """Return the nodes in a directory, by ascending name."""

    def content(self, node: FileNode) -> AsyncIterator[bytes]:
        """Yield the content of a file in pieces, at most as many bytes as its node says."""


class RecentDirectories:
    """Reads directories, and keeps recent ones: one may occur in many places of a tree."""

    def __init__(self, directories: DirectoryService) -> None:
        self._directories = directories
        self._recent: OrderedDict[Digest, Directory] = OrderedDict()
        self._num_entries = 0

    async def get(self, digest: Digest) -> Directory | None:
        """See `DirectoryService.get`."""
        directory = self._recent.get(digest)
        if directory is not None:
            self._recent.move_to_end(digest)
            return directory
        directory = await self._directories.get(digest)
        if directory is not None:
            self._recent[digest] = directory
            self._num_entries += 1 + len(directory)
            while self._num_entries > _RECENT_ENTRIES_MAX:
                _digest, oldest = self._recent.popitem(last=False)
                self._num_entries -= 1 + len(oldest)
        return directory


class _Stored:
    """Contents from services; any difference from what a node says is an error."""

    def __init__(self, blobs: BlobService, directories: DirectoryService) -> None:
        self._blobs = blobs
        self._directories = RecentDirectories(directories)

    async def children(self, node: DirectoryNode) -> Iterator[Node]:
        directory = await self._directories.get(node.digest)
        if directory is None:
            raise directory_not_found(node)
        return directory.nodes()

    def content(self, node: FileNode) -> AsyncIterator[bytes]:
        return file_content(node, self._blobs)


def directory_not_found(node: DirectoryNode) -> ContentMissingError:
    """Return the error for a node whose directory is not in the store."""
    return ContentMissingError(
        f"directory {node.digest}, named {node.name!r}, is not in the store",
        rule="directory-not-found",
    )


async def file_content(node: FileNode, blobs: BlobService) -> AsyncGenerator[bytes, None]:
    """Yield the content of a file in pieces, and check it at the end.

    The caller may trust the content once the generator has ended without an error.

    Raises:
        ContentMissingError: the blob is not in the store (rule `blob-not-found`).
        NarError: it is not as long as its node says (`blob-too-short`, `blob-too-long`).
        WrongDigestError: its content has another digest.
    """
    reader = await blobs.open_read(node.digest)
    if reader is None:
        raise ContentMissingError(
            f"blob {node.digest}, named {node.name!r}, is not in the store", rule="blob-not-found"
        )
    hasher = blake3()
    try:
        left = node.size
        while data := await reader.read(min(left + 1, PIECE_SIZE)):
            left -= len(data)
            if left < 0:
                raise NarError(
                    f"blob {node.digest} is longer than the {node.size} bytes that its node says",
                    rule="blob-too-long",
                )
            hasher.update(data)
            yield data
    finally:
        await reader.close()
    if left:
        raise NarError(
            f"blob {node.digest} has {node.size - left} bytes, but its node says {node.size}",
            rule="blob-too-short",
        )
    actual = Digest(hasher.digest())
    if actual != node.digest:
        raise WrongDigestError("blob", node.digest, actual)


async def render_nar(
    node: Node, blobs: BlobService, directories: DirectoryService
) -> AsyncGenerator[bytes, None]:
    """Yield the NAR of `node` in pieces; the name of `node` does not matter.

    Raises:
        ContentMissingError: a blob or directory is not in the store.
        NarError: a blob is not as long as its node says.
        WrongDigestError: a blob has another digest; some of it has been yielded by then.
        NarTooLargeError: the tree has too many entries, or the NAR too many bytes.
    """
    extent = await extent_of(node, directories)
    if extent is not None:
        extent.check("the tree")
    async with aclosing(render(node, _Stored(blobs, directories))) as pieces:
        async for piece in pieces:
            yield piece


async def render(node: Node, contents: Contents) -> AsyncGenerator[bytes, None]:
    """Yield the NAR of `node` in pieces.

    If `contents` gives less than a node says, what is yielded is not a NAR, but it does not end
    early. Errors of `contents` pass through.

    Raises:
        NarTooLargeError: the tree has too many entries.
    """
    pieces = _Pieces()
    num_entries = 0
    writer = NarWriter(pieces.add)
    parents: list[Iterator[Node]] = []
    following: Node | None = node
    while following is not None:
        match following:
            case SymlinkNode():
                writer.symlink(following.target)
            case FileNode():
                writer.regular(following.size, executable=following.executable)
                async for content in contents.content(following):
                    writer.content(content)
                    if pieces.size >= PIECE_SIZE:
                        yield pieces.take()
            case DirectoryNode():
                writer.directory()
                parents.append(await contents.children(following))
        following = _next_node(writer, parents)
        num_entries += 1
        if num_entries > ENTRIES_MAX:
            raise NarTooLargeError(f"tree has more than {ENTRIES_MAX} entries")
        if pieces.size >= PIECE_SIZE:
            yield pieces.take()
    writer.finish()
    yield pieces.take()


async def nar_info(node: Node, blobs: BlobService, directories: DirectoryService) -> NarInfo:
    """Return size and SHA-256 of the NAR of `node`; raises what `render_nar` raises."""
    loop = asyncio.get_running_loop()
    hasher = hashlib.sha256()
    size = 0
    async with aclosing(render_nar(node, blobs, directories)) as pieces:
        async for piece in pieces:
            size += len(piece)
            await loop.run_in_executor(None, hasher.update, piece)
    return NarInfo(size, hasher.digest())


def _next_node(writer: NarWriter, parents: list[Iterator[Node]]) -> Node | None:
    while parents:
        node = next(parents[-1], None)
        if node is not None:
            writer.entry(node.name)
            return node
        parents.pop()
        writer.end_directory()
    return None
