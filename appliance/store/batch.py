"""The objects that one commit adds to a store."""

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from appliance.castore.digest import Digest
from appliance.store import schema


class StagedFile(NamedTuple):
    """A file with the complete content of a blob; the commit moves or removes it."""

    path: str
    size: int


class Batch:
    """Objects to be committed together; all that they refer to must be in the batch or the store.

    Digests are not checked: the caller has computed them from the content that it adds.

    Attributes:
        closed_paths: digests of the store paths among `path_infos` that are refused unless all that
            they refer to is in the store by then. Other paths may be put before those.
        num_sweeps: `RecentPuts.num_sweeps` before whoever makes the batch looked for what is in the
            store; None if that is not known.
    """

    def __init__(self) -> None:
        self.blobs: dict[bytes, bytes | memoryview] = {}
        self.files: dict[bytes, StagedFile] = {}
        self.chunks: dict[bytes, bytes] = {}
        self.directories: dict[bytes, bytes] = {}
        self.path_infos: dict[bytes, bytes] = {}
        self.nar_infos: dict[bytes, bytes] = {}
        self.closed_paths: set[bytes] = set()
        self.may_replace_paths = False
        self.num_sweeps: int | None = None
        self.size_bytes = 0

    def __contains__(self, digest: bytes) -> bool:
        """Whether the batch has a blob with this digest."""
        return digest in self.blobs or digest in self.files

    def add_blob(self, digest: bytes, content: bytes | bytearray | memoryview) -> None:
        """Add a blob of at most `schema.INLINE_MAX` bytes; the content is copied."""
        self.blobs[digest] = schema.pack_inline(content)
        self.size_bytes += len(content)

    def add_file(self, digest: bytes, path: Path | str, size: int, chunks: bytes = b"") -> None:
        """Add a blob by a file on the file system of the store; the batch takes the file over.

        Args:
            digest: digest of the blob.
            path: of the file.
            size: of the file, in bytes.
            chunks: those of the blob, packed as `castore.chunking` does; empty if it is not cut.
        """
        self.files[digest] = StagedFile(os.fspath(path), size)
        self.size_bytes += size
        if chunks:
            self.chunks[digest] = chunks

    def add_directory(self, digest: Digest, encoded: bytes) -> None:
        """Add a Directory in canonical encoding."""
        self.directories[digest] = encoded
        self.size_bytes += len(encoded)

    def add_path_info(
        self, path_digest: bytes, encoded: bytes, *, needs_references: bool = False
    ) -> None:
        """Add a PathInfo under the digest (20 bytes) of its store path.

        `nix.path_info_rules.accepted` decides whether it is stored, and in place of what.

        Args:
            path_digest: digest of the store path.
            encoded: the PathInfo.
            needs_references: see `closed_paths`.
        """
        self.path_infos[path_digest] = encoded
        if needs_references:
            self.closed_paths.add(path_digest)
        self.size_bytes += len(encoded)

    def add_nar_info(self, node_digest: bytes, size: int, sha256: bytes) -> None:
        """Add the calculated size and SHA-256 of the NAR of a node."""
        self.nar_infos[node_digest] = schema.pack_nar_info(size, sha256)

    def is_empty(self) -> bool:
        """Whether there is nothing to commit."""
        objects = (self.blobs, self.files, self.directories, self.path_infos, self.nar_infos)
        return not any(objects)

    def merge(self, other: "Batch") -> None:
        """Move everything from `other` into this batch; a second file of one blob is removed."""
        for digest in self.files.keys() & other.files.keys():
            _remove(other.files.pop(digest))
        self.blobs |= other.blobs
        self.files |= other.files
        self.chunks |= other.chunks
        self.directories |= other.directories
        self.path_infos |= other.path_infos
        self.closed_paths |= other.closed_paths
        self.nar_infos |= other.nar_infos
        self.may_replace_paths |= other.may_replace_paths
        self.size_bytes += other.size_bytes

    def discard(self) -> None:
        """Remove the staged files."""
        for file in self.files.values():
            _remove(file)


def _remove(file: StagedFile) -> None:
    with suppress(FileNotFoundError):
        os.unlink(file.path)  # noqa: PTH108 -- a Path per file would be slow
