"""The contracts of the three services: blobs, directories, PathInfos.

Absence is `None`, not an error. A `ProtocolError` refuses an object that breaks a rule; a
`StoreError` means that the back end failed. The methods of a service may be called concurrently on
one event loop; a single reader, writer or putter belongs to one task at a time.
"""

from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple, Protocol

from appliance.castore.chunking import BlobChunk
from appliance.castore.digest import Digest
from appliance.castore.directory import Directory, Node

Buffer = bytes | bytearray | memoryview


class NarInfo(NamedTuple):
    """Size in bytes and SHA-256 of a NAR."""

    size: int
    sha256: bytes


class BlobReader(Protocol):
    """A blob being read; its user closes it.

    A reader carries bytes and verifies nothing: neither a file of a store nor a peer is trusted.
    Whoever reads verifies, exactly once, where the bytes are used: it computes the BLAKE3 of what
    `read` returned from the start to the end and compares that with the digest that it opened.
    Content that is kept (by the cache, by a repair) becomes visible only after that comparison.
    Content that is passed on as it comes (a NAR, `cat`, a daemon in front of another one) ends with
    an error if the comparison fails. A daemon that serves its own store leaves the comparison to
    its clients.
    """

    async def read(self, size: int) -> bytes:
        """Return the next `size` bytes: fewer only at the end of the blob, none past it.

        Raises:
            StoreError: the content cannot be read, or has ended early.
        """

    async def seek(self, offset: int) -> None:
        """Continue at `offset` bytes from the start, which may be past the end."""

    async def close(self) -> None:
        """Release the file or the call; may be called twice."""


class BlobWriter(Protocol):
    """A blob being written; its user calls `close` or `abort`."""

    async def write(self, data: Buffer) -> None:
        """Append `data`; the caller may reuse the buffer afterwards."""

    async def close(self) -> Digest:
        """Make the blob durable and visible, and return its digest."""

    async def abort(self) -> None:
        """Discard what was written; does nothing after `close`."""


class BlobService(Protocol):
    """Blobs by digest. The empty blob always exists."""

    async def has(self, digest: Digest) -> bool:
        """Return whether the blob exists, so that it need not be put.

        A chunk of another blob does not count: it can be read here, but a file that consists of it
        could not be served from a store.
        """

    async def stat(self, digest: Digest) -> Sequence[BlobChunk] | None:
        """Return the chunks that make up the blob, in order: none if it is not cut.

        A chunk is a blob that is not cut. Nobody has compared the list with the blob's digest, so
        a caller that reads the chunks compares each with its digest, and all of them with the
        blob's.
        """

    async def open_read(self, digest: Digest) -> BlobReader | None:
        """Open a blob, or a chunk, at its start; the caller verifies it (see `BlobReader`)."""

    async def open_write(self) -> BlobWriter:
        """Begin a new blob."""


class DirectoryPutter(Protocol):
    """A closure of directories being put; its user calls `close` or `abort`."""

    async def put(self, directory: Directory) -> None:
        """Add a directory, after all directories that it refers to.

        Raises:
            ProtocolError: it refers to a directory that was not put before, or states a wrong size
                for one. A remote service may raise this at a later call.
        """

    async def close(self) -> Digest:
        """Make all directories durable and visible, and return the digest of the root.

        The root is the directory that was put last.

        Raises:
            ProtocolError: a rule is broken, nothing was put, or a directory cannot be reached from
                the root. Nothing becomes visible.
        """

    async def abort(self) -> None:
        """Discard what was put; does nothing after `close`."""


class DirectoryService(Protocol):
    """Directories by digest. The empty directory always exists.

    Unlike a blob, a directory is verified by the service that returns it.
    """

    async def get(self, digest: Digest) -> Directory | None:
        """Return one directory.

        Raises:
            CorruptBlobError: what is stored is not a directory, or has another digest.
        """

    def get_recursive(self, digest: Digest) -> AsyncIterator[Directory]:
        """Yield the directory and all below it: parents before children, each once.

        Yields nothing if the directory itself is missing.

        Raises:
            StoreError: a directory below it is missing.
        """

    async def put(self, directory: Directory) -> Digest:
        """Put a directory without subdirectories.

        Raises:
            ProtocolError: it has subdirectories; put those with it, by `put_multiple_start`.
        """

    def put_multiple_start(self) -> DirectoryPutter:
        """Begin a closure."""


class PathInfoService(Protocol):
    """PathInfos, encoded, by the digest (20 bytes) of their store path."""

    async def get(self, path_digest: bytes) -> bytes | None:
        """Return the PathInfo of a store path."""

    async def put(self, path_info: bytes, *, needs_references: bool = False) -> bytes:
        """Validate and put a PathInfo; return it as it is kept, merged with what was known before.

        Known facts are never replaced: see `nix.path_info_rules`. Contents may be put later.

        Args:
            path_info: the PathInfo.
            needs_references: refuse it if a path that it refers to is not there when it becomes
                visible, because it was removed meanwhile, say. Otherwise those may be put later. A
                peer that is no daemon of ours does not look.

        Raises:
            AlreadyExistsError: the path has other content; nothing was changed.
            ContentMissingError: see `needs_references`; nothing was changed.
            ProtocolError: it breaks a rule, contradicts itself or contradicts what is known.
        """

    def list(self) -> AsyncIterator[bytes]:
        """Yield all PathInfos, in no particular order."""

    async def calculate_nar(self, node: Node) -> NarInfo:
        """Return size and digest of the NAR of `node`, whose name does not matter.

        Raises:
            ContentMissingError: a blob or directory is missing.
            NarError: a blob is not as long as its node says.
        """


class Services(NamedTuple):
    """One service of each kind, to be used together."""

    blobs: BlobService
    directories: DirectoryService
    path_infos: PathInfoService
