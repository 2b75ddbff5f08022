"""The Directories and blobs of a local store, as those who render NARs from it need them.

All content is checked against its digest before it is returned, except that of blobs in files.
"""

import os
import stat
from typing import Final, NamedTuple

from blake3 import blake3

from appliance.castore.digest import Digest
from appliance.castore.directory import DirectoryNode, Node
from appliance.errors import (
    ContentMissingError,
    CorruptBlobError,
    DirectoryError,
    NarError,
    StoreError,
    WrongDigestError,
)
from appliance.nix.nar_frames import NarFrames, frames_of
from appliance.services.nar_extent import ROOT_SIZE, Extent, Part, body_size
from appliance.store.blob_files import BlobFile
from appliance.store.snapshot import Snapshot
from appliance.store.store import Store

# The number of Directories whose frames are kept from measuring to rendering, plus that of their
# entries.
KEPT_ENTRIES: Final = 1 << 16


class Measured(NamedTuple):
    """How large a tree is, and how many bytes each of its directories takes in a NAR."""

    extent: Extent
    sizes: dict[Digest, int]


class StoredTrees:
    """Directories and blobs of a store, checked; the frames of some Directories are kept.

    Args:
        kept_entries: how many entries, of Directories read by `measure`, are kept for `frames`.
    """

    def __init__(self, kept_entries: int = KEPT_ENTRIES) -> None:
        self._kept: dict[bytes, NarFrames] = {}
        self._num_to_keep = kept_entries

    def frames(self, snapshot: Snapshot, digest: bytes) -> NarFrames:
        """Return what a Directory comes to in a NAR.

        Raises:
            ContentMissingError: it is not in the store.
            WrongDigestError, CorruptBlobError: its content is wrong.
        """
        kept = self._kept.get(digest)
        if kept is not None:
            return kept
        try:
            return frames_of(read_encoded(snapshot, Digest(digest)))
        except DirectoryError as exc:
            raise CorruptBlobError(f"directory {digest.hex()}: {exc}") from exc

    def content(self, snapshot: Snapshot, digest: Digest, size: int) -> memoryview | BlobFile:
        """Return a blob, checked; or the file that has it, of which only the size is checked.

        Args:
            snapshot: where it is.
            digest: its digest.
            size: what its node says about its size in bytes.

        Raises:
            ContentMissingError: it is not in the store.
            WrongDigestError: it has another digest.
            NarError: it has another size.
        """
        content = snapshot.blob(digest)
        if isinstance(content, memoryview):
            actual_size = len(content)
            if actual_size == size:
                check_digest("blob", digest, blake3(content).digest())
        elif content is None:
            raise blob_not_found(digest)
        else:
            actual_size = content.size
        if actual_size != size:
            raise NarError(
                f"blob {digest} has {actual_size} bytes, but its node says {size}",
                rule="blob-too-long" if actual_size > size else "blob-too-short",
            )
        return content

    def measure(self, snapshot: Snapshot, root: Node) -> Measured:
        """Return how large a tree is.

        Raises:
            StoreError: see `frames`.
        """
        if not isinstance(root, DirectoryNode):
            return Measured(Extent(0, ROOT_SIZE + body_size(root)), {})
        parts: dict[Digest, Part] = {}
        extents: dict[Digest, tuple[int, int]] = {}
        left = [root.digest]
        while left:
            digest = left[-1]
            part = parts.get(digest)
            if part is None:
                part = parts[digest] = self._part(snapshot, digest)
                left.extend(below for below in part.below if below not in parts)
                continue
            left.pop()
            if digest not in extents:
                below = [extents[child] for child in part.below]
                extents[digest] = (
                    part.num_entries + sum(num_entries for num_entries, _size in below),
                    part.size + sum(size for _num_entries, size in below),
                )
        num_entries, size = extents[root.digest]
        sizes = {digest: size for digest, (_num_entries, size) in extents.items()}
        return Measured(Extent(num_entries, ROOT_SIZE + size), sizes)

    def _part(self, snapshot: Snapshot, digest: Digest) -> Part:
        frames = self.frames(snapshot, digest)
        self._num_to_keep -= 1 + frames.num_entries
        if self._num_to_keep >= 0:
            self._kept[digest] = frames
        return Part(frames.num_entries, frames.size, tuple(frames.directories()))


def read_encoded(snapshot: Snapshot, digest: Digest) -> bytes:
    """Return the encoding of a Directory, compared with its digest.

    Raises:
        ContentMissingError: it is not in the store.
        WrongDigestError: its content is wrong.
    """
    encoded = snapshot.directory(digest)
    if encoded is None:
        raise ContentMissingError(
            f"directory {digest} is not in the store", rule="directory-not-found"
        )
    check_digest("directory", digest, blake3(encoded).digest())
    return encoded


def open_whole(store: Store, blob: BlobFile) -> int:
    """Open the file of a blob and return a descriptor, which the caller owns.

    Raises:
        ContentMissingError: there is no such file, or it has another size.
        StoreError: it cannot be opened.
    """
    digest = Digest(blob.digest)
    try:
        fd = store.open_blob(blob)
    except FileNotFoundError as exc:
        raise blob_not_found(digest) from exc
    except OSError as exc:
        raise StoreError(f"blob {digest}: {exc.filename}: {exc.strerror}") from exc
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_size != blob.size:
        os.close(fd)
        raise blob_not_found(digest)
    return fd


def check_digest(what: str, expected: Digest, actual: bytes) -> None:
    """Check the digest of an object, which the error calls `what`.

    Raises:
        WrongDigestError: `actual` is another digest.
    """
    if actual != expected:
        raise WrongDigestError(what, expected, Digest(actual))


def blob_not_found(digest: Digest) -> ContentMissingError:
    """Return the error for a blob that is not in the store."""
    return ContentMissingError(f"blob {digest} is not in the store", rule="blob-not-found")
