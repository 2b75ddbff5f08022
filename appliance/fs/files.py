"""Contents of files: bytes of the store's map, or blob files that are held open.

A blob is found by its digest in a snapshot of the store. The content of a small one is a view of
the LMDB map, valid as long as the snapshot. A large one is a file. Opening it for every READ would
be slow, so the files used last are held open. A file that gives way to another is closed only at
the end of the batch, as replies that have not been delivered yet refer to its descriptor.

`Blobs` reads a store that has everything, where a missing blob is an error. `CachedBlobs` reads a
cache (see `blob_cache`): what is missing there is wanted from the supervisor, and what is used is
reported, so that it is not evicted. Eviction removes the name of a file, and its space is free once
no worker has it open any more. A large blob may be there in part (see `partial_blob`): a READ is
answered if the record, in the same snapshot, has all of its bytes.
"""

import logging
import os
import resource
import time
from collections import OrderedDict
from collections.abc import Callable
from errno import EIO
from typing import Final, NamedTuple

from appliance.bounds import OPEN_FILES_MAX
from appliance.castore.digest import DIGEST_SIZE, Digest
from appliance.fuse_proto.operations import NotReady
from appliance.session.wants import BlobWanted
from appliance.store.blob_files import BlobFile
from appliance.store.snapshot import Snapshot
from appliance.store.store_reader import ReadableStore

_LOG: Final = logging.getLogger(__name__)

# Other descriptors of a worker. The rest is halved: until the end of a batch, files that gave way
# are open beside those that replaced them.
_OTHERS_OPEN: Final = 32
# Which cache entries were used, but not how often or exactly when, is reported to the supervisor
# after this time, or after this number of entries.
_REPORT_EVERY_S: Final = 1.0
_REPORT_MAX: Final = 512


class RemoteParts(NamedTuple):
    """Which objects a handler's store lacks and the supervisor can fetch from services.

    Attributes:
        has_blobs: blobs; the store is a cache.
        has_directories: directories.
        has_root: the paths in the root.
        used: called with the keys of cache entries (see `blob_cache`) that were read.
    """

    has_blobs: bool
    has_directories: bool
    has_root: bool
    used: Callable[[list[bytes]], None]


ALL_LOCAL: Final = RemoteParts(
    has_blobs=False, has_directories=False, has_root=False, used=lambda _keys: None
)


# --- A complete store ---


class ByteRange(NamedTuple):
    """`length` bytes, at least one, of a content from `offset` on."""

    offset: int
    length: int


class OpenBlob(NamedTuple):
    """An open blob file of `size` bytes; `Blobs` owns `fd`, valid until `close_evicted`.

    The key is the digest of the blob, or that of a partial blob.
    """

    fd: int
    size: int
    key: bytes


class Blobs:
    """The blobs of one store, with up to `OPEN_FILES_MAX` of the files used last held open."""

    def __init__(self, store: ReadableStore) -> None:
        self._store = store
        self._open: OrderedDict[bytes, OpenBlob] = OrderedDict()
        limit, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._open_max = min(OPEN_FILES_MAX, max(1, (limit - _OTHERS_OPEN) // 2))
        self._evicted: list[int] = []

    def content(
        self, snapshot: Snapshot, digest: bytes, size: int, part: ByteRange
    ) -> memoryview | OpenBlob:
        """Return the content of a blob.

        Args:
            snapshot: where the blob is looked for; a memoryview is valid as long as this.
            digest: digest of the blob.
            size: the bytes that it has according to a Directory.
            part: what will be read of the content; the rest need not be right.

        Raises:
            OSError: EIO, the store does not have the blob, or fewer bytes of it.
        """
        del part  # a store has whole blobs
        opened = self._opened(digest, size)
        if opened is not None:
            return opened
        blob = snapshot.blob(digest)
        if blob is None:
            raise self._broken(digest, "is not in the store")
        if isinstance(blob, BlobFile):
            return self._open_file(digest, blob, size)
        if len(blob) < size:
            raise self._broken(digest, f"has {len(blob)} bytes, expected {size}")
        return blob

    def close_evicted(self) -> None:
        """Close the files that gave way to others since the last call."""
        for fd in self._evicted:
            os.close(fd)
        self._evicted.clear()

    def close(self) -> None:
        """Close all files."""
        self._evicted += [blob.fd for blob in self._open.values()]
        self._open.clear()
        self.close_evicted()

    def _opened(self, key: bytes, size: int) -> OpenBlob | None:
        # Directories may state different sizes for one blob.
        blob = self._open.get(key)
        if blob is None or blob.size < size:
            return None
        self._open.move_to_end(key)
        return blob

    def _open_file(self, digest: bytes, blob: BlobFile, size: int) -> OpenBlob:
        try:
            fd = self._store.open_blob(blob)
        except OSError as exc:
            raise self._broken(digest, f"cannot be opened: {exc.strerror}") from exc
        found_size = os.fstat(fd).st_size
        if found_size < size:
            os.close(fd)
            raise self._broken(digest, f"has a file of {found_size} bytes, expected {size}")
        return self._hold(OpenBlob(fd, found_size, digest))

    def _hold(self, opened: OpenBlob) -> OpenBlob:
        replaced = self._open.pop(opened.key, None)
        if replaced is not None:
            self._evicted.append(replaced.fd)
        self._open[opened.key] = opened
        if len(self._open) > self._open_max:
            _digest, oldest = self._open.popitem(last=False)
            self._evicted.append(oldest.fd)
        return opened

    def _broken(self, digest: bytes, reason: str) -> OSError:
        _LOG.error("blob %s %s", Digest(digest), reason)
        return OSError(EIO, f"blob {Digest(digest)} {reason}")


# --- A cache ---


class Usage:
    """Collects the keys of cache entries that were used, and passes many at a time to `report`."""

    def __init__(self, report: Callable[[list[bytes]], None]) -> None:
        self._report = report
        self._used: set[bytes] = set()
        self._reported_s = 0.0

    def note(self, key: bytes) -> None:
        """Note that an entry was used."""
        self._used.add(key)
        now_s = time.monotonic()
        if len(self._used) >= _REPORT_MAX or now_s - self._reported_s >= _REPORT_EVERY_S:
            self._reported_s = now_s
            self._report(list(self._used))
            self._used.clear()


class CachedBlobs(Blobs):
    """The blobs of a cache.

    A file that is held open can still be read after it was evicted. Others are evicted while a
    missing blob is fetched, so whenever a blob is missing, evicted files are closed here, to free
    their space.
    """

    def __init__(self, store: ReadableStore, usage: Usage) -> None:
        super().__init__(store)
        self._usage = usage

    def content(
        self, snapshot: Snapshot, digest: bytes, size: int, part: ByteRange
    ) -> memoryview | OpenBlob:
        """Return the content of a blob, of which at least `part` is right; see `Blobs.content`.

        Raises:
            NotReady: the cache does not have that part of the blob, or the blob is shorter.
            OSError: EIO, the cache cannot be read.
        """
        found: memoryview | OpenBlob | None = self._opened(digest, size)
        if found is None:
            blob = snapshot.blob(digest)
            if isinstance(blob, BlobFile):
                found = self._try_open(blob, size)
            else:
                found = blob or self._try_part(snapshot, digest, size, part)
        if found is None or (isinstance(found, memoryview) and len(found) < size):
            self._close_unlinked()
            raise NotReady(BlobWanted(digest, size, *part))
        self._usage.note(digest)
        return found

    def _try_part(
        self, snapshot: Snapshot, digest: bytes, size: int, part: ByteRange
    ) -> OpenBlob | None:
        partial = snapshot.partial_blob(digest)
        if partial is None or not partial.has(part.offset, part.offset + part.length):
            return None
        key = partial.key
        return self._opened(key, size) or self._try_open(BlobFile(key, partial.size), size)

    def _try_open(self, blob: BlobFile, size: int) -> OpenBlob | None:
        try:
            fd = self._store.open_blob(blob)
        except FileNotFoundError:
            return None  # evicted, or complete, since the snapshot was taken
        except OSError as exc:
            digest = blob.digest[:DIGEST_SIZE]
            raise self._broken(digest, f"cannot be opened: {exc.strerror}") from exc
        if os.fstat(fd).st_size == blob.size >= size:
            return self._hold(OpenBlob(fd, blob.size, blob.digest))
        os.close(fd)
        return None

    def _close_unlinked(self) -> None:
        for key, blob in list(self._open.items()):
            if os.fstat(blob.fd).st_nlink == 0:
                del self._open[key]
                self._evicted.append(blob.fd)
