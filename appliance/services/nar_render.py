"""NARs of what the blob and directory services hold."""

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

PIECE_SIZE: Final = 1 << 18
_RECENT_ENTRIES_MAX: Final = 1 << 14


class BlobNotFoundError(ContentMissingError):
    """A blob is not there; `name` is that of the node referring to it."""

    def __init__(self, digest: Digest, name: bytes) -> None:
        super().__init__(f"blob {digest}, of {name!r}, is not in the store")
        self.digest = digest
        self.name = name


class DirectoryNotFoundError(ContentMissingError):
    """A directory is not there; `name` is that of the node referring to it."""

    def __init__(self, digest: Digest, name: bytes) -> None:
        super().__init__(f"directory {digest}, named {name!r}, is not in the store")
        self.digest = digest
        self.name = name


class BlobTooShortError(NarError):
    """A blob is shorter than its node says."""

    def __init__(self, digest: Digest, size: int) -> None:
        super().__init__(f"blob {digest} is shorter than the {size} bytes its node says")


class BlobTooLongError(NarError):
    """A blob is longer than its node says."""

    def __init__(self, digest: Digest, size: int) -> None:
        super().__init__(f"blob {digest} is longer than the {size} bytes its node says")


class _Pieces:
    """What the writer has written and nobody has taken yet."""

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
    """Has what nodes refer to; asked in the order of the NAR, each answer used up before more."""

    async def children(self, node: DirectoryNode) -> Iterator[Node]:
        """Return what is in a directory, by ascending name."""

    def content(self, node: FileNode) -> AsyncIterator[bytes]:
        """Yield the content of a file in pieces, not more than its node says."""


class RecentDirectories:
    """Reads directories, and keeps those read last: a tree may have one in many places."""

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
    """Contents of services; what is not as its node says is an error."""

    def __init__(self, blobs: BlobService, directories: DirectoryService) -> None:
        self._blobs = blobs
        self._directories = RecentDirectories(directories)

    async def children(self, node: DirectoryNode) -> Iterator[Node]:
        directory = await self._directories.get(node.digest)
        if directory is None:
            raise DirectoryNotFoundError(node.digest, node.name)
        return directory.nodes()

    def content(self, node: FileNode) -> AsyncIterator[bytes]:
        return file_content(node, self._blobs)


async def file_content(node: FileNode, blobs: BlobService) -> AsyncGenerator[bytes, None]:
    """Yield the content of a file in pieces; it is right if this comes to its end.

    Raises:
        BlobNotFoundError: it is not there.
        BlobTooShortError, BlobTooLongError: it is not as long as its node says.
        WrongDigestError: it is something else.
    """
    reader = await blobs.open_read(node.digest)
    if reader is None:
        raise BlobNotFoundError(node.digest, node.name)
    hasher = blake3()
    try:
        left = node.size
        while data := await reader.read(min(left + 1, PIECE_SIZE)):
            left -= len(data)
            if left < 0:
                raise BlobTooLongError(node.digest, node.size)
            hasher.update(data)
            yield data
    finally:
        await reader.close()
    if left:
        raise BlobTooShortError(node.digest, node.size)
    actual = Digest(hasher.digest())
    if actual != node.digest:
        raise WrongDigestError("blob", node.digest, actual)


async def render_nar(
    node: Node, blobs: BlobService, directories: DirectoryService
) -> AsyncGenerator[bytes, None]:
    """Yield the NAR of `node` in pieces; its name does not matter.

    Raises:
        BlobNotFoundError, DirectoryNotFoundError: content is not there.
        BlobTooShortError, BlobTooLongError: a blob is not as long as its node says.
        WrongDigestError: a blob is something else; some of it was yielded by then.
        NarTooLargeError: there is too much of it.
    """
    extent = await extent_of(node, directories)
    if extent is not None:
        extent.check("the tree")
    async with aclosing(render(node, _Stored(blobs, directories))) as pieces:
        async for piece in pieces:
            yield piece


async def render(node: Node, contents: Contents) -> AsyncGenerator[bytes, None]:
    """Yield the NAR of `node` in pieces, or what it would be if `contents` are short of some.

    Raises:
        NarTooLargeError: there is too much of it.
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
            raise NarTooLargeError(f"more than {ENTRIES_MAX} entries")
        if pieces.size >= PIECE_SIZE:
            yield pieces.take()
    writer.finish()
    yield pieces.take()


async def nar_info(node: Node, blobs: BlobService, directories: DirectoryService) -> NarInfo:
    """Return size and digest of the NAR of `node`; fails as `render_nar` does."""
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
