"""Services that keep everything in the memory of this process."""

from collections.abc import AsyncIterator, Sequence

from appliance.castore.chunking import UNCHUNKED_MAX, BlobChunk, Chunker, unpack
from appliance.castore.closure import ClosureChecker, TopologicalOrder
from appliance.castore.digest import EMPTY_DIGEST, Digest
from appliance.castore.directory import Directory, Node
from appliance.errors import ContentMissingError
from appliance.nix.path_info import read_path_info
from appliance.nix.path_info_rules import accepted, check_claims, nar_key
from appliance.services.contracts import (
    BlobReader,
    BlobService,
    BlobWriter,
    Buffer,
    DirectoryPutter,
    DirectoryService,
    NarInfo,
)
from appliance.services.known_contents import KnownContents
from appliance.services.lmdb_blobs import ContentReader
from appliance.services.lmdb_directories import put_one
from appliance.services.nar_render import nar_info
from appliance.services.path_info_checks import check_stated_size


class _Chunked:
    """The lists of chunks of large blobs, and the chunks by digest."""

    def __init__(self) -> None:
        self.lists: dict[Digest, tuple[BlobChunk, ...]] = {}
        self.chunks: dict[Digest, memoryview] = {}

    def put(self, digest: Digest, content: bytes) -> None:
        if len(content) > UNCHUNKED_MAX:
            chunker = Chunker()
            chunker.update(content)
            chunks = self.lists[digest] = tuple(unpack(chunker.finish()))
            left = memoryview(content)
            for chunk in chunks:
                self.chunks[chunk.digest] = left[: chunk.size]
                left = left[chunk.size :]


class MemoryBlobService:
    """Blobs in a dictionary."""

    def __init__(self) -> None:
        self._blobs = {EMPTY_DIGEST: b""}
        self._chunked = _Chunked()

    async def has(self, digest: Digest) -> bool:
        """See `BlobService.has`."""
        return digest in self._blobs

    async def stat(self, digest: Digest) -> Sequence[BlobChunk] | None:
        """See `BlobService.stat`."""
        is_there = digest in self._blobs or digest in self._chunked.chunks
        return self._chunked.lists.get(digest, ()) if is_there else None

    async def size_of(self, digest: Digest) -> int | None:
        """See `path_info_checks.KnowsSizes`."""
        content = self._blobs.get(digest)
        return None if content is None else len(content)

    async def open_read(self, digest: Digest) -> BlobReader | None:
        """See `BlobService.open_read`."""
        content = self._blobs.get(digest)
        if content is None and digest in self._chunked.chunks:
            content = bytes(self._chunked.chunks[digest])
        return None if content is None else ContentReader(content)

    async def open_write(self) -> BlobWriter:
        """Begin a new blob."""
        return _MemoryBlobWriter(self._blobs, self._chunked)


class _MemoryBlobWriter:
    def __init__(self, blobs: dict[Digest, bytes], chunked: _Chunked) -> None:
        self._blobs = blobs
        self._chunked = chunked
        self._content = bytearray()

    async def write(self, data: Buffer) -> None:
        self._content += data

    async def close(self) -> Digest:
        content = bytes(self._content)
        digest = Digest.of(content)
        self._blobs[digest] = content
        self._chunked.put(digest, content)
        return digest

    async def abort(self) -> None:
        self._content.clear()


class MemoryDirectoryService:
    """Directories in a dictionary."""

    def __init__(self) -> None:
        self._directories = {EMPTY_DIGEST: Directory()}

    async def get(self, digest: Digest) -> Directory | None:
        """Return one directory."""
        return self._directories.get(digest)

    async def get_recursive(self, digest: Digest) -> AsyncIterator[Directory]:
        """Yield the directory and all below it, parents first; nothing if it is missing."""
        if digest not in self._directories:
            return
        order = TopologicalOrder(digest)
        while (undiscovered := order.next_undiscovered()) is not None:
            order.discover(self._present(undiscovered))
        while (ready := order.next_ready()) is not None:
            directory = self._present(ready)
            order.release(directory)
            yield directory

    async def put(self, directory: Directory) -> Digest:
        """Put a directory without subdirectories."""
        return await put_one(self, directory)

    def put_multiple_start(self) -> DirectoryPutter:
        """Begin a closure."""
        return _MemoryDirectoryPutter(self._directories)

    def _present(self, digest: Digest) -> Directory:
        directory = self._directories.get(digest)
        if directory is None:
            raise ContentMissingError(f"directory {digest} is not in the store")
        return directory


class _MemoryDirectoryPutter:
    def __init__(self, directories: dict[Digest, Directory]) -> None:
        self._directories = directories
        self._checker = ClosureChecker()
        self._new: dict[Digest, Directory] = {}

    async def put(self, directory: Directory) -> None:
        if self._checker.add(directory):
            self._new[directory.digest()] = directory

    async def close(self) -> Digest:
        root = self._checker.finish()
        self._directories.update(self._new)
        return root

    async def abort(self) -> None:
        self._new.clear()


class MemoryPathInfoService:
    """PathInfos in a dictionary.

    Args:
        blobs: where the contents of files are.
        directories: where the directories are.
        may_replace: a PathInfo that is put replaces one that it contradicts.
    """

    def __init__(
        self, blobs: BlobService, directories: DirectoryService, *, may_replace: bool = False
    ) -> None:
        self._may_replace = may_replace
        self._blobs = blobs
        self._directories = directories
        self._path_infos: dict[bytes, bytes] = {}
        self._nar_infos: dict[Digest, NarInfo] = {}

    async def get(self, path_digest: bytes) -> bytes | None:
        """Return the PathInfo of a store path."""
        return self._path_infos.get(path_digest)

    async def put(self, path_info: bytes, *, needs_references: bool = False) -> bytes:
        """See `PathInfoService.put`."""
        info = check_claims(path_info)
        await check_stated_size(info, self._blobs, self._directories)
        digest = info.path.digest
        known = KnownContents(self._nar_infos)
        if digest in self._path_infos:
            for node in (read_path_info(self._path_infos[digest]).node, info.node):
                await known.read(node, self._directories)
        # No await from here on: what is compared must still be there when it is replaced.
        if needs_references:
            for reference in info.references:
                if reference != digest and reference not in self._path_infos:
                    raise ContentMissingError(
                        f"{info.path.absolute()}: refers to {reference.hex()}, which is not there"
                    )
        kept = accepted(
            self._path_infos.get(digest), path_info, known, may_replace=self._may_replace
        )
        self._path_infos[digest] = kept
        return kept

    async def list(self) -> AsyncIterator[bytes]:
        """Yield all PathInfos that exist when the iteration begins."""
        for path_info in [*self._path_infos.values()]:
            yield path_info

    async def calculate_nar(self, node: Node) -> NarInfo:
        """Return size and digest of the NAR of `node`; they are kept once calculated."""
        key = nar_key(node)
        info = self._nar_infos.get(key)
        if info is None:
            info = await nar_info(node, self._blobs, self._directories)
            self._nar_infos[key] = info
        return info
