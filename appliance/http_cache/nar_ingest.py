"""Taking the contents of a NAR into services.

The NAR is in a file and has been checked to be one. A thread reads it and hashes what is in it; the
parts that it comes to are put one after another, each when the one before is there: blobs and
Directories, the latter after all that is below them.
"""

import asyncio
import os
import tempfile
from typing import TYPE_CHECKING, BinaryIO, Final, NamedTuple, Protocol

from blake3 import blake3

from appliance.castore.chunking import UNCHUNKED_MAX, Chunker
from appliance.castore.digest import Digest
from appliance.castore.directory import Directory, DirectoryNode, FileNode, Node, SymlinkNode
from appliance.castore.directory_encoder import ENCODED_MAX, DirectoryEncoder
from appliance.castore.size_dialect import DEFAULT_DIALECT
from appliance.errors import StoreError, disk_error
from appliance.http_cache.pending_nars import PendingNar, buffered
from appliance.nix.nar import (
    ContentRead,
    DirectoryEndRead,
    DirectoryRead,
    EntryRead,
    Event,
    FileRead,
    SymlinkRead,
    read_nar,
)
from appliance.nix.path_info_rules import nar_key
from appliance.services.contracts import Services
from appliance.services.nar_extent import NarTooLargeError
from appliance.store.batch import Batch
from appliance.store.schema import INLINE_MAX
from appliance.store.writer import AsyncStore

if TYPE_CHECKING:
    from collections.abc import Iterator

# What one part has at most, but for its last object: bytes of small blobs and Directories, and
# numbers of objects.
_PART_BYTES: Final = 8 << 20
_PART_OBJECTS: Final = 4_000
# Small blobs that are sent to a service at a time.
_CONCURRENT_PUTS: Final = 32
_PIECE_SIZE: Final = 1 << 20
# What a NAR may take in a store: its own size, with what pages and tables add, and some bytes.
_ROOM_PERCENT: Final = 125
_ROOM_MIN: Final = 1 << 18


class LargeBlob(NamedTuple):
    """A blob of `size` bytes at `offset` of a NAR, and its packed chunks."""

    offset: int
    size: int
    chunks: bytes


class NarPart:
    """Contents that are put together."""

    def __init__(self) -> None:
        self.small: dict[Digest, bytes] = {}
        self.large: dict[Digest, LargeBlob] = {}
        self.directories: list[bytes] = []
        self.num_bytes = 0

    def num_objects(self) -> int:
        """Return the number of blobs and Directories."""
        return len(self.small) + len(self.large) + len(self.directories)

    def is_full(self) -> bool:
        """Whether nothing more is to be added."""
        return self.num_bytes >= _PART_BYTES or self.num_objects() >= _PART_OBJECTS


class ContentTarget(Protocol):
    """Where contents are put."""

    async def begin(self, nar: PendingNar) -> None:
        """Make sure that there is room for the contents of `nar`.

        Raises:
            StoreFullError: there is not, and nothing was put.
        """

    async def put(self, part: NarPart, file: BinaryIO) -> None:
        """Put the next part of the NAR in `file`; what its Directories refer to came before."""

    async def finish(self, root: Node, nar: PendingNar) -> None:
        """Make everything durable; `root` was the last node that came."""

    async def abort(self) -> None:
        """Give up what was not finished; does nothing after `finish`."""


async def ingest(nar: PendingNar, target: ContentTarget) -> Node:
    """Put the contents of a NAR, and return its root node, which has no name.

    Raises:
        StoreError: the target fails.
        NarTooLargeError: a directory has too many entries.
    """
    reading = _Reading(nar.file)
    try:
        await target.begin(nar)
        while part := await asyncio.to_thread(reading.next_part):
            await target.put(part, nar.file)
        await target.finish(reading.root, nar)
    finally:
        reading.close()
        await target.abort()
    return reading.root


class _OpenDirectory(NamedTuple):
    name: bytes
    encoder: DirectoryEncoder


class _Reading:
    """How far a NAR has been read."""

    def __init__(self, file: BinaryIO) -> None:
        self._reader = buffered(file)
        self._events: Iterator[Event] = read_nar(self._reader.read)
        self._part = NarPart()
        self._open: list[_OpenDirectory] = []
        self._name = b""
        self._root: Node | None = None

    @property
    def root(self) -> Node:
        """The root node; it is there when all parts have been read."""
        if self._root is None:
            raise StoreError("NAR without a root")  # `read_nar` has checked that it has one
        return self._root

    def next_part(self) -> NarPart | None:
        """Return the next part, or None at the end."""
        part = self._part = NarPart()
        for event in self._events:
            self._take(event)
            if part.is_full():
                return part
        return part if part.num_objects() else None

    def close(self) -> None:
        """Give up the reader."""
        self._reader.close()

    def _take(self, event: Event) -> None:
        match event:
            case EntryRead(name):
                self._name = name
            case FileRead(size, executable):
                self._end(FileNode(self._name, self._file(size), size, executable))
            case SymlinkRead(target):
                self._end(SymlinkNode(self._name, target))
            case DirectoryRead():
                self._open.append(_OpenDirectory(self._name, DirectoryEncoder()))
            case DirectoryEndRead():
                self._end_directory()

    def _file(self, size: int) -> Digest:
        offset = self._reader.tell()
        hasher = blake3()
        chunker = Chunker() if size > UNCHUNKED_MAX else None
        content = bytearray()
        left = size
        while left:
            event = next(self._events)
            assert isinstance(event, ContentRead)  # noqa: S101 - for the type checker
            left -= len(event.data)
            hasher.update(event.data)
            if chunker is not None:
                chunker.update(event.data)
            if size <= INLINE_MAX:
                content += event.data
        digest = Digest(hasher.digest())
        if size > INLINE_MAX:
            chunks = b"" if chunker is None else chunker.finish()
            self._part.large[digest] = LargeBlob(offset, size, chunks)
        else:
            self._part.small[digest] = bytes(content)
            self._part.num_bytes += size
        return digest

    def _end(self, node: Node) -> None:
        if not self._open:
            self._root = node._replace(name=b"")
            return
        encoder = self._open[-1].encoder
        match node:
            case FileNode(name, digest, size, executable):
                encoder.add_file(name, digest, size, executable=executable)
            case SymlinkNode(name, target):
                encoder.add_symlink(name, target)
            case DirectoryNode(name, digest, size):
                encoder.add_directory(name, digest, size)

    def _end_directory(self) -> None:
        name, encoder = self._open.pop()
        encoded = encoder.to_bytes()
        if len(encoded) > ENCODED_MAX:
            raise NarTooLargeError(
                f"directory {name!r} has {len(encoder)} entries and takes {len(encoded)} bytes, "
                f"the limit is {ENCODED_MAX}"
            )
        self._part.directories.append(encoded)
        self._part.num_bytes += len(encoded)
        self._end(DirectoryNode(name, Digest.of(encoded), encoder.size(DEFAULT_DIALECT)))


# --- Targets ---


class StoreTarget:
    """A local store; each part is one commit.

    A disk that gets full between two commits would leave contents behind that nothing refers to.
    So the space is reserved first, in a file without a name, and given back part by part.
    """

    def __init__(self, store: AsyncStore) -> None:
        self._store = store
        self._reserved: BinaryIO | None = None

    async def begin(self, nar: PendingNar) -> None:
        """See `ContentTarget.begin`."""
        size = nar.nar_size * _ROOM_PERCENT // 100 + _ROOM_MIN
        self._reserved = await asyncio.to_thread(self._reserve, size)

    async def put(self, part: NarPart, file: BinaryIO) -> None:
        """See `ContentTarget.put`."""
        if self._reserved is not None:
            large = sum(blob.size for blob in part.large.values())
            left = os.fstat(self._reserved.fileno()).st_size
            given = (part.num_bytes + large) * _ROOM_PERCENT // 100
            os.ftruncate(self._reserved.fileno(), max(left - given, 0))
        await self._store.commit(await asyncio.to_thread(self._batch, part, file))

    async def finish(self, root: Node, nar: PendingNar) -> None:
        """See `ContentTarget.finish`; the store is told what the NAR of `root` is."""
        batch = Batch()
        batch.add_nar_info(nar_key(root), nar.nar_size, nar.nar_hash.digest)
        await self.abort()
        await self._store.commit(batch)

    async def abort(self) -> None:
        """See `ContentTarget.abort`; what was committed stays, and other paths may have it, too."""
        if self._reserved is not None:
            self._reserved.close()
            self._reserved = None

    def _reserve(self, size: int) -> BinaryIO:
        directory = self._store.temp_directory()
        try:
            file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115 - see `abort`
        except OSError as exc:
            raise disk_error(exc, directory) from exc
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as exc:
            file.close()
            raise disk_error(exc, self._store.store.path) from exc
        return file

    def _batch(self, part: NarPart, file: BinaryIO) -> Batch:
        batch = Batch()
        try:
            for digest, content in part.small.items():
                batch.add_blob(digest, content)
            for encoded in part.directories:
                batch.add_directory(Digest.of(encoded), encoded)
            for digest, blob in part.large.items():
                path = self._store.new_temp_path()
                batch.add_file(digest, path, blob.size, blob.chunks)
                with path.open("xb", buffering=0) as staged:
                    _copy(file, blob, staged)
        except OSError as exc:
            batch.discard()
            raise disk_error(exc, self._store.store.path) from exc
        return batch


class ServicesTarget:
    """Services of any kind."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._putter = services.directories.put_multiple_start()
        self._num_directories = 0
        self._is_over = False

    async def begin(self, nar: PendingNar) -> None:
        """Do nothing: how much room services have is not known."""

    async def put(self, part: NarPart, file: BinaryIO) -> None:
        """See `ContentTarget.put`."""
        blobs = list(part.small.items())
        for start in range(0, len(blobs), _CONCURRENT_PUTS):
            puts = (self._put_small(*blob) for blob in blobs[start : start + _CONCURRENT_PUTS])
            for result in await asyncio.gather(*puts, return_exceptions=True):
                if result is not None:
                    raise result
        for blob in part.large.items():
            await self._put_large(*blob, file)
        for encoded in part.directories:
            await self._putter.put(Directory.from_bytes(encoded))
            self._num_directories += 1

    async def finish(self, root: Node, nar: PendingNar) -> None:
        """See `ContentTarget.finish`."""
        del root, nar
        if self._num_directories:
            self._is_over = True
            await self._putter.close()

    async def abort(self) -> None:
        """See `ContentTarget.abort`."""
        if not self._is_over:
            await self._putter.abort()

    async def _put_small(self, digest: Digest, content: bytes) -> None:
        if await self._services.blobs.has(digest):
            return
        writer = await self._services.blobs.open_write()
        try:
            if content:
                await writer.write(content)
            await writer.close()
        finally:
            await writer.abort()

    async def _put_large(self, digest: Digest, blob: LargeBlob, file: BinaryIO) -> None:
        if await self._services.blobs.has(digest):
            return
        writer = await self._services.blobs.open_write()
        try:
            for offset in range(0, blob.size, _PIECE_SIZE):
                size = min(_PIECE_SIZE, blob.size - offset)
                data = await asyncio.to_thread(os.pread, file.fileno(), size, blob.offset + offset)
                await writer.write(data)
            await writer.close()
        finally:
            await writer.abort()


def _copy(source: BinaryIO, blob: LargeBlob, target: BinaryIO) -> None:
    # In the kernel; where that is possible, the two files share the blocks.
    offset = blob.offset
    end = offset + blob.size
    while offset < end:
        size = os.copy_file_range(source.fileno(), target.fileno(), end - offset, offset)
        if not size:
            raise StoreError("uploaded NAR: its file is too short")
        offset += size
