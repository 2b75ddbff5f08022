"""Repair of local stores: damaged blobs and directories are put again from another source.

A repair never trusts the source: only content with the right digest is put.
"""

import os
import stat
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from blake3 import blake3

from appliance.castore.digest import Digest
from appliance.castore.directory import Directory, DirectoryNode, FileNode, Node, SymlinkNode
from appliance.castore.size_dialect import SizeDialect
from appliance.errors import DirectoryError, WrongDigestError
from appliance.services.contracts import Services
from appliance.services.lmdb_blobs import LmdbBlobService
from appliance.store.batch import Batch
from appliance.store.damage import drop_blob, drop_directory, restore_blob
from appliance.store.writer import AsyncStore

ContentNode = FileNode | DirectoryNode

# In bytes.
_PIECE_SIZE: Final = 1 << 20


class Source(Protocol):
    """A place that may have intact contents; the caller checks what it gives."""

    def content(self, node: FileNode) -> AsyncGenerator[bytes, None]:
        """Yield the content of a file in pieces; nothing if the source does not have it."""

    async def directory(self, node: DirectoryNode) -> Directory | None:
        """Return a directory, or None if the source does not have it."""


class LocalStores(NamedTuple):
    """The stores on this machine that hold the verified contents, open for writing."""

    blobs: AsyncStore | None
    directories: AsyncStore | None


class Repairer:
    """Marks damaged contents, and puts them again from `source`, if there is one."""

    def __init__(self, local: LocalStores, source: Source | None) -> None:
        self._local = local
        self._source = source

    async def mark(self, damaged: Iterable[ContentNode]) -> None:
        """Take damaged contents off the record, so that the next put of them replaces them.

        Raises:
            StoreError: a store cannot be written.
        """
        for node in damaged:
            store = self._store_of(node)
            if store is not None and isinstance(node, FileNode):
                await store.run(lambda: drop_blob(store.store, node.digest))  # noqa: B023 - awaited at once
            elif store is not None:
                await store.run(lambda: drop_directory(store.store, node.digest))  # noqa: B023 - as above

    async def repair(self, node: ContentNode) -> bool:
        """Put content that was marked; return whether the store has it now.

        Raises:
            StoreError: a store cannot be written, or the source fails.
        """
        store = self._store_of(node)
        if store is None:
            return False
        if isinstance(node, DirectoryNode):
            return await self._repair_directory(store, node)
        if await store.run(lambda: restore_blob(store.store, node.digest, node.size)):
            return True
        return await self._repair_blob(store, node)

    def _store_of(self, node: ContentNode) -> AsyncStore | None:
        return self._local.blobs if isinstance(node, FileNode) else self._local.directories

    async def _repair_blob(self, store: AsyncStore, node: FileNode) -> bool:
        if self._source is None:
            return False
        writer = await LmdbBlobService(store).open_write_of(node.digest)
        try:
            async with aclosing(self._source.content(node)) as pieces:
                async for piece in pieces:
                    await writer.write(piece)
            await writer.close()
        except WrongDigestError:
            return False
        finally:
            await writer.abort()
        return True

    async def _repair_directory(self, store: AsyncStore, node: DirectoryNode) -> bool:
        directory = None if self._source is None else await self._source.directory(node)
        if directory is None or directory.digest() != node.digest:
            return False
        batch = Batch()
        batch.add_directory(node.digest, directory.to_bytes())
        await store.commit(batch)
        return True


class ServiceSource:
    """Gives the contents of other services."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def content(self, node: FileNode) -> AsyncGenerator[bytes, None]:
        """See `Source.content`."""
        reader = await self._services.blobs.open_read(node.digest)
        if reader is None:
            return
        try:
            while data := await reader.read(_PIECE_SIZE):
                yield data
        finally:
            await reader.close()

    async def directory(self, node: DirectoryNode) -> Directory | None:
        """See `Source.directory`."""
        return await self._services.directories.get(node.digest)


class TreeSource:
    """Gives contents from a tree of files, wherever in the tree they are.

    The tree is read when first needed, and not again. A search for a blob reads only the files of
    its size; a search for a directory reads the whole tree.
    """

    def __init__(self, root: Path) -> None:
        self._root = os.fsencode(root)
        self._by_size: dict[int, list[bytes]] = {}
        self._digests: dict[bytes, Digest] = {}
        self._directories: dict[Digest, Directory] | None = None

    async def content(self, node: FileNode) -> AsyncGenerator[bytes, None]:
        """See `Source.content`."""
        if not self._by_size:
            self._list_files()
        for path in self._by_size.get(node.size, []):
            if self._digest_of(path) == node.digest:
                for piece in _pieces(path):
                    yield piece
                return

    async def directory(self, node: DirectoryNode) -> Directory | None:
        """See `Source.directory`."""
        if self._directories is None:
            self._directories = self._read_directories()
        return self._directories.get(node.digest)

    def _list_files(self) -> None:
        for parent, _names, files in os.walk(self._root):
            for name in files:
                path = b"%b/%b" % (parent, name)
                status = os.lstat(path)
                if stat.S_ISREG(status.st_mode):
                    self._by_size.setdefault(status.st_size, []).append(path)
        if not self._by_size:
            status = os.stat(self._root)  # noqa: PTH116 - a name of bytes
            self._by_size[status.st_size] = [self._root]

    def _digest_of(self, path: bytes) -> Digest:
        if path not in self._digests:
            hasher = blake3()
            for piece in _pieces(path):
                hasher.update(piece)
            self._digests[path] = Digest(hasher.digest())
        return self._digests[path]

    def _read_directories(self) -> dict[Digest, Directory]:
        # Bottom up, once for each way of counting sizes. A directory that contains something which
        # no store keeps cannot be one of those sought, and neither can its parents.
        found: dict[Digest, Directory] = {}
        nodes: dict[tuple[bytes, SizeDialect], DirectoryNode] = {}
        for parent, names, files in os.walk(self._root, topdown=False):
            for dialect in SizeDialect:
                paths = [b"%b/%b" % (parent, name) for name in sorted([*names, *files])]
                try:
                    leaves = [nodes.get((path, dialect)) or self._leaf(path) for path in paths]
                    directory = _directory_of(leaves)
                except DirectoryError:
                    continue
                name = parent.rpartition(b"/")[2]
                digest = directory.digest()
                found[digest] = directory
                nodes[parent, dialect] = DirectoryNode(name, digest, directory.size(dialect))
        return found

    def _leaf(self, path: bytes) -> Node:
        name = path.rpartition(b"/")[2]
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            return SymlinkNode(name, os.readlink(path))  # noqa: PTH115 - a name of bytes
        if not stat.S_ISREG(status.st_mode):
            raise DirectoryError(f"{path!r}: neither a file nor a symlink")
        is_executable = bool(status.st_mode & stat.S_IXUSR)
        return FileNode(name, self._digest_of(path), status.st_size, is_executable)


def _directory_of(nodes: Sequence[Node]) -> Directory:
    return Directory(
        [node for node in nodes if isinstance(node, DirectoryNode)],
        [node for node in nodes if isinstance(node, FileNode)],
        [node for node in nodes if isinstance(node, SymlinkNode)],
    )


def _pieces(path: bytes) -> Iterator[bytes]:
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - a name of bytes
        while piece := file.read(_PIECE_SIZE):
            yield piece
