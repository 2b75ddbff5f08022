"""What one commit adds to the store."""

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from appliance.castore.digest import Digest
from appliance.store import schema


class StagedFile(NamedTuple):
    """Complete content of a blob, in a file that the commit moves or removes."""

    path: str
    size: int


class Batch:
    """Objects to be committed together; what they refer to must be among them, or stored already.

    The digests are the caller's word: it has hashed what it adds.
    """

    def __init__(self) -> None:
        self.blobs: dict[bytes, bytes | memoryview] = {}
        self.files: dict[bytes, StagedFile] = {}
        self.directories: dict[bytes, bytes] = {}
        self.path_infos: dict[bytes, bytes] = {}
        self.nar_infos: dict[bytes, bytes] = {}
        self.may_replace_paths = False
        self.size_bytes = 0

    def __contains__(self, digest: bytes) -> bool:
        """Whether the blob is in it."""
        return digest in self.blobs or digest in self.files

    def add_blob(self, digest: bytes, content: bytes | bytearray | memoryview) -> None:
        """Add a blob of at most `schema.INLINE_MAX` bytes; the content is copied."""
        self.blobs[digest] = schema.pack_inline(content)
        self.size_bytes += len(content)

    def add_file(self, digest: bytes, path: Path | str, size: int) -> None:
        """Add a blob by a file on the file system of the store, which becomes the batch's."""
        self.files[digest] = StagedFile(os.fspath(path), size)
        self.size_bytes += size

    def add_directory(self, digest: Digest, encoded: bytes) -> None:
        """Add a directory in canonical encoding."""
        self.directories[digest] = encoded
        self.size_bytes += len(encoded)

    def add_path_info(self, path_digest: bytes, encoded: bytes) -> None:
        """Add a PathInfo under the digest (20 bytes) of its store path.

        What becomes of it, and of one that is there, `castore.path_info_rules` says.
        """
        self.path_infos[path_digest] = encoded
        self.size_bytes += len(encoded)

    def add_nar_info(self, node_digest: bytes, size: int, sha256: bytes) -> None:
        """Add what the NAR of a node was calculated to be."""
        self.nar_infos[node_digest] = schema.pack_nar_info(size, sha256)

    def is_empty(self) -> bool:
        """Whether there is nothing to commit."""
        objects = (self.blobs, self.files, self.directories, self.path_infos, self.nar_infos)
        return not any(objects)

    def merge(self, other: "Batch") -> None:
        """Take over all that is in `other`."""
        for digest in self.files.keys() & other.files.keys():
            _remove(other.files.pop(digest))
        self.blobs |= other.blobs
        self.files |= other.files
        self.directories |= other.directories
        self.path_infos |= other.path_infos
        self.nar_infos |= other.nar_infos
        self.may_replace_paths |= other.may_replace_paths
        self.size_bytes += other.size_bytes

    def discard(self) -> None:
        """Remove the staged files."""
        for file in self.files.values():
            _remove(file)


def _remove(file: StagedFile) -> None:
    with suppress(FileNotFoundError):
        os.unlink(file.path)  # noqa: PTH108 -- no Path is made for each of many files
