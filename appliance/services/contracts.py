"""The three services every back end offers: blobs, directories, PathInfos.

Absence is `None`. An object that breaks a rule is refused with a `ProtocolError`; a back end that
fails raises a `StoreError`. Methods may be called concurrently from one event loop; one reader,
writer or putter belongs to one task.
"""

from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple, Protocol

from appliance.castore.digest import Digest
from appliance.castore.directory import Directory, Node

Buffer = bytes | bytearray | memoryview


class BlobChunk(NamedTuple):
    """A part of a blob that is a blob of its own."""

    digest: Digest
    size: int


class NarInfo(NamedTuple):
    """Size in bytes and SHA-256 of a NAR."""

    size: int
    sha256: bytes


class BlobReader(Protocol):
    """A blob being read; closed by its user."""

    async def read(self, size: int) -> bytes:
        """Return the next `size` bytes; fewer only at the end, none past it.

        Raises:
            CorruptBlobError: the content turned out not to have the digest asked for.
        """

    async def seek(self, offset: int) -> None:
        """Go on at `offset` bytes from the start, in either direction; may be past the end."""

    async def close(self) -> None:
        """Give up what the reader holds; may be called twice."""


class BlobWriter(Protocol):
    """A blob being written; closed or aborted by its user."""

    async def write(self, data: Buffer) -> None:
        """Append `data`; it is done with the buffer when it returns."""

    async def close(self) -> Digest:
        """Make the blob durable and visible, and return its digest."""

    async def abort(self) -> None:
        """Forget what was written; does nothing after `close`."""


class BlobService(Protocol):
    """Contents by digest. The empty blob is always there."""

    async def has(self, digest: Digest) -> bool:
        """Whether the blob is there."""

    async def stat(self, digest: Digest) -> Sequence[BlobChunk] | None:
        """Return the chunks that make up the blob; an empty list when it is kept in one piece."""

    async def open_read(self, digest: Digest) -> BlobReader | None:
        """Open the blob at its start."""

    async def open_write(self) -> BlobWriter:
        """Begin a new blob."""


class DirectoryPutter(Protocol):
    """A closure of directories being put; closed or aborted by its user."""

    async def put(self, directory: Directory) -> None:
        """Add a directory; those it refers to came before it.

        Raises:
            ProtocolError: it refers to one that did not, or states a wrong size for it. A remote
                service may say so at a later call.
        """

    async def close(self) -> Digest:
        """Make all durable and visible, and return the digest of the root, which came last.

        Raises:
            ProtocolError: a rule is broken, also when nothing was put, or when some directory is
                not reachable from the last one. Nothing becomes visible.
        """

    async def abort(self) -> None:
        """Forget what was put; does nothing after `close`."""


class DirectoryService(Protocol):
    """Directories by digest. The empty one is always there."""

    async def get(self, digest: Digest) -> Directory | None:
        """Return one directory."""

    def get_recursive(self, digest: Digest) -> AsyncIterator[Directory]:
        """Yield the directory and all below it: parents before children, each once.

        Yields nothing when the directory itself is missing.

        Raises:
            StoreError: one below it is missing.
        """

    async def put(self, directory: Directory) -> Digest:
        """Put a directory without subdirectories.

        Raises:
            ProtocolError: it has some; they have to come with it, by `put_multiple_start`.
        """

    def put_multiple_start(self) -> DirectoryPutter:
        """Begin a closure."""


class PathInfoService(Protocol):
    """PathInfos, encoded, by the digest (20 bytes) of their store path."""

    async def get(self, path_digest: bytes) -> bytes | None:
        """Return the PathInfo of a store path."""

    async def put(self, path_info: bytes) -> bytes:
        """Validate and put a PathInfo; return it as it is kept, with what was known before.

        What is known is never replaced: see `castore.path_info_rules`. References and contents
        may come later.

        Raises:
            AlreadyExistsError: the path has other content; nothing was changed.
            ProtocolError: it breaks a rule, contradicts itself or what is known.
        """

    def list(self) -> AsyncIterator[bytes]:
        """Yield all PathInfos, in no particular order."""

    async def calculate_nar(self, node: Node) -> NarInfo:
        """Return size and digest of the NAR of `node`, whose name does not matter.

        Raises:
            ContentMissingError: a blob or directory is not there.
            NarError: a blob is not as long as its node says.
        """


class Services(NamedTuple):
    """One service of each kind, to be used together."""

    blobs: BlobService
    directories: DirectoryService
    path_infos: PathInfoService
