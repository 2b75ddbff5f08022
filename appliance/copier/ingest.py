"""Turns the events of one tree into blobs, Directories, and the digest of the NAR.

Nothing refers to the tree before the caller commits `batch`. Of a tree with more than 16 MiB in
small files, the blobs are committed ahead, to bound memory.
"""

import hashlib
import itertools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple, Protocol, TypeAlias

from blake3 import blake3

from appliance.castore.chunking import UNCHUNKED_MAX, Chunker
from appliance.castore.digest import EMPTY_DIGEST, Digest
from appliance.castore.directory import DirectoryNode, FileNode, Node, SymlinkNode
from appliance.castore.directory_encoder import ENCODED_MAX, DirectoryEncoder
from appliance.castore.size_dialect import SizeDialect
from appliance.copier.claims import Content
from appliance.errors import ApplianceError, DirectoryError, NarError, disk_error
from appliance.nix.hashes import ContentHash
from appliance.nix.nar import (
    Buffer,
    ContentRead,
    DirectoryEndRead,
    DirectoryRead,
    EntryRead,
    Event,
    FileRead,
    NarWriter,
    SymlinkRead,
)
from appliance.store.batch import Batch
from appliance.store.schema import INLINE_MAX
from appliance.system.clones import clone_file

# Bytes of small blobs held in memory for one tree. Several trees are read at the same time.
_SPILL_BYTES: Final = 16 << 20


class CopyStoppedError(ApplianceError):
    """Reading this tree ended because the whole copy is ending."""


class CopyProgress:
    """Totals of a copy so far, for display: several threads add to them without a lock."""

    def __init__(self) -> None:
        self.num_files = 0
        self.num_bytes = 0
        self.path = ""
        self.is_stopped = False
        self.num_expected_bytes = 0
        """The NARs of all paths to copy, if it is known; 0 otherwise."""

    def fraction(self) -> float | None:
        """Return how much is done, 0 to 1, or None if that is not known.

        NARs are a little larger than the contents that are counted here, so a copy is further than
        this says, never less far.
        """
        if not self.num_expected_bytes:
            return None
        return min(self.num_bytes / self.num_expected_bytes, 1.0)


class Staging:
    """A directory of this process where large blobs are written before they are committed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._numbers = itertools.count()

    def new_path(self) -> Path:
        """Return the path of a file to create."""
        return self._directory / f"copied-{next(self._numbers)}"


class LocalFile:
    """An event before the `FileRead` of a local file, which whoever takes the event may clone.

    The source then reads the content from `fd`, which may be the clone by then: a clone does not
    change while it is read.

    Args:
        fd: the file; it stays the source's.
        size: its size in bytes.
    """

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.size = size


TreeEvent: TypeAlias = "Event | LocalFile"


class IngestTarget(Protocol):
    """Where trees go; see `CopyTarget`."""

    staging: Staging
    dialect: SizeDialect

    def new_batch(self) -> Batch:
        """Return an empty batch for `commit`."""

    def commit(self, batch: Batch) -> None:
        """Commit a batch; takes over its files in any case."""


class _OpenDirectory(NamedTuple):
    name: bytes
    encoder: DirectoryEncoder


class TreeIngest:
    """Takes the events of one tree.

    Args:
        target: stages large blobs, and commits blobs ahead.
        progress: counts files and bytes, and says when to stop.
        nar_limit: maximum size of the NAR in bytes; None if it is not known.
        nar_hash: is fed the NAR, to check a content address.
        flat_hash: is fed the content of the files, to check a content address.
    """

    def __init__(
        self,
        target: IngestTarget,
        progress: CopyProgress,
        *,
        nar_limit: int | None = None,
        nar_hash: ContentHash | None = None,
        flat_hash: ContentHash | None = None,
    ) -> None:
        self.batch = target.new_batch()
        self._target = target
        self._progress = progress
        self._nar_limit = nar_limit
        self._address_hash = nar_hash
        self._flat_hash = flat_hash
        self._nar_size = 0
        self._nar_sha256 = hashlib.sha256()
        self._writer = NarWriter(self._take_nar)
        self._open: list[_OpenDirectory] = []
        self._name = b""
        self._root: Node | None = None
        self._file: _FileIngest | None = None
        self._next_file: _FileIngest | None = None
        self._num_files = 0
        self._inline_bytes = 0

    def take_all(self, events: Iterable[TreeEvent]) -> Content:
        """Take a whole tree.

        Raises:
            NarError: the NAR is larger than `nar_limit`.
            DirectoryError: a directory is too large to be served.
            StoreError: a large blob cannot be staged.
            CopyStoppedError: `progress.is_stopped` was set.
        """
        for event in events:
            self._take(event)
        if self._root is None or self._open or self._file is not None:
            raise NarError("the NAR ends within a node")
        size = self._writer.finish()
        return Content(self._root, size, self._nar_sha256.digest(), self._num_files)

    def discard(self) -> None:
        """Remove staged files that were not committed."""
        for file in (self._file, self._next_file):
            if file is not None:
                file.discard()
        self.batch.discard()

    def _take(self, event: TreeEvent) -> None:
        match event:
            case ContentRead(data):
                self._content(data)
            case EntryRead(name):
                self._name = name
                self._writer.entry(name)
            case LocalFile():
                self._next_file = _FileIngest(self._target.staging, event.size)
                self._next_file.clone(event)
            case FileRead(size, executable):
                self._begin_file(size, executable=executable)
            case SymlinkRead(target):
                self._writer.symlink(target)
                if self._open:
                    self._open[-1].encoder.add_symlink(self._name, target)
                else:
                    self._root = SymlinkNode(b"", target)
            case DirectoryRead():
                self._writer.directory()
                self._open.append(_OpenDirectory(self._name, DirectoryEncoder()))
            case DirectoryEndRead():
                self._end_directory()

    def _begin_file(self, size: int, *, executable: bool) -> None:
        if self._progress.is_stopped:
            raise CopyStoppedError("the copy was stopped")
        if self._nar_limit is not None and size > self._nar_limit:
            raise self._too_long()
        self._file = self._next_file or _FileIngest(self._target.staging, size)
        self._next_file = None
        self._file.executable = executable
        if not self._file.is_small:
            self._writer.regular(size, executable=executable)
        if size == 0:
            self._end_file(self._file)

    def _content(self, data: Buffer) -> None:
        file = self._file
        if file is None:
            raise NarError("content without a file")
        file.add(data)
        self._progress.num_bytes += len(data)
        if not file.is_small:
            if self._progress.is_stopped:
                raise CopyStoppedError("the copy was stopped")
            self._writer.content(data)
        if self._flat_hash is not None:
            self._flat_hash.update(bytes(data))
        if file.num_missing == 0:
            self._end_file(file)

    def _end_file(self, file: "_FileIngest") -> None:
        if file.is_small:
            self._writer.file(file.inline, executable=file.executable)
        digest = file.put(self.batch)
        self._file = None
        self._num_files += 1
        self._progress.num_files += 1
        if self._open:
            encoder = self._open[-1].encoder
            encoder.add_file(self._name, digest, file.size, executable=file.executable)
        else:
            self._root = FileNode(b"", digest, file.size, file.executable)
        if file.is_small:
            self._inline_bytes += file.size
            if self._inline_bytes > _SPILL_BYTES:
                self._spill_blobs()

    def _spill_blobs(self) -> None:
        blobs = self._target.new_batch()
        blobs.blobs, self.batch.blobs = self.batch.blobs, {}
        blobs.files, self.batch.files = self.batch.files, {}
        blobs.size_bytes, self._inline_bytes = self._inline_bytes, 0
        self._target.commit(blobs)

    def _end_directory(self) -> None:
        self._writer.end_directory()
        name, encoder = self._open.pop()
        encoded = encoder.to_bytes()
        if len(encoded) > ENCODED_MAX:
            raise DirectoryError(
                f"{name!r}: its {len(encoder)} entries make a Directory of more than "
                f"{ENCODED_MAX >> 20} MiB, the most that can be served"
            )
        digest = Digest.of(encoded)
        if digest != EMPTY_DIGEST:
            self.batch.add_directory(digest, encoded)
        size = encoder.size(self._target.dialect)
        if self._open:
            self._open[-1].encoder.add_directory(name, digest, size)
        else:
            self._root = DirectoryNode(b"", digest, size)

    def _take_nar(self, data: Buffer) -> None:
        self._nar_size += len(data)
        if self._nar_limit is not None and self._nar_size > self._nar_limit:
            raise self._too_long()
        self._nar_sha256.update(data)
        if self._address_hash is not None:
            self._address_hash.update(bytes(data))

    def _too_long(self) -> NarError:
        return NarError(f"the NAR has more than the stated {self._nar_limit} bytes")


class _FileIngest:
    """One file: kept in memory if it is small enough to be inline, else in a staged file."""

    def __init__(self, staging: Staging, size: int) -> None:
        self.size = size
        self.executable = False
        self._is_clone = False
        self.num_missing = size
        self.is_small = size <= INLINE_MAX
        self.inline = bytearray()
        self._hasher = blake3()
        self._chunker = Chunker() if size > UNCHUNKED_MAX else None
        self._fd = -1
        if not self.is_small:
            self._path = staging.new_path()
            try:
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                self._fd = os.open(self._path, flags, 0o444)
            except OSError as exc:
                raise disk_error(exc, self._path) from exc

    def clone(self, file: LocalFile) -> None:
        """Make this a clone of a large file, and have that read, where the file system can.

        Raises:
            StoreError: the staged file cannot be written.
        """
        if self.is_small:
            return
        try:
            if not clone_file(file.fd, self._fd):
                return
            if os.fstat(self._fd).st_size == file.size:
                self._is_clone = True
                file.fd = self._fd
            else:
                os.ftruncate(self._fd, 0)
        except OSError as exc:
            raise disk_error(exc, self._path) from exc

    def add(self, data: Buffer) -> None:
        """Append `data`, which a clone has already."""
        self.num_missing -= len(data)
        if self.is_small:
            self.inline += data
            return
        self._hasher.update(data)
        if self._chunker is not None:
            self._chunker.update(data)
        if self._is_clone:
            return
        left = memoryview(data)
        try:
            while left:
                left = left[os.write(self._fd, left) :]
        except OSError as exc:
            raise disk_error(exc, self._path) from exc

    def put(self, batch: Batch) -> Digest:
        """Add the complete file to `batch`, which then owns the staged file."""
        if self.is_small:
            digest = Digest.of(self.inline)
            if digest not in batch:
                batch.add_blob(digest, self.inline)
            return digest
        os.close(self._fd)
        self._fd = -1
        digest = Digest(self._hasher.digest())
        if digest in batch:
            self._path.unlink(missing_ok=True)
        else:
            chunks = b"" if self._chunker is None else self._chunker.finish()
            batch.add_file(digest, self._path, self.size, chunks)
        return digest

    def discard(self) -> None:
        """Remove the staged file, unless a batch owns it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._path.unlink(missing_ok=True)
