"""Finding damaged objects and deleting their records, so that the next put replaces them.

An object may have been replaced since it was found to be damaged, so each function checks it again
before it deletes the record. Hashing a large file takes too long for a write transaction: the file
is hashed before, and inside the transaction only its identity (inode, size, mtime) is compared.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import Final, NamedTuple

from blake3 import blake3

from appliance.castore.digest import EMPTY_DIGEST, Digest
from appliance.db.environment import WriteTransaction
from appliance.errors import DirectoryError
from appliance.images import builder
from appliance.store import schema
from appliance.store.blob_files import BlobFile
from appliance.store.snapshot import Snapshot
from appliance.store.store import Store

# Bytes that are read from a file at a time.
_PIECE_SIZE: Final = 1 << 20
# Directories whose images are checked in one snapshot.
_CHUNK: Final = 256


class _Seen(NamedTuple):
    """A blob file as it was when it was hashed; both are None if the file could not be read."""

    digest: bytes | None
    identity: tuple[int, ...] | None


def drop_blob(store: Store, digest: Digest) -> bool:
    """Delete the record of a blob if its content is missing or has another digest.

    A damaged file stays where it is until the blob is put again.

    Returns:
        Whether the record was deleted.

    Raises:
        StoreError: the store cannot be written.
    """
    with store.snapshot() as snapshot:
        blob = snapshot.blob(digest)
        is_file = isinstance(blob, BlobFile)
    seen = _look(store, digest) if is_file else _Seen(None, None)
    if blob is None or digest == EMPTY_DIGEST or (is_file and seen.digest == digest):
        return False
    blobs = store.env.database(schema.BLOBS)

    def work(txn: WriteTransaction) -> bool:
        record = txn.get(digest, db=blobs)
        if record is None:
            return False
        if is_file != (record[0] == schema.IN_FILE):
            return False
        if is_file and _identity(store, digest) != seen.identity:
            return False
        if not is_file and Digest.of(schema.inline_content(record)) == digest:
            return False
        return store.remove_blob(txn, digest)

    return store.env.write(work)


def drop_directory(store: Store, digest: Digest) -> bool:
    """Delete a Directory, and its image, if the encoding has another digest.

    Returns:
        Whether the Directory was deleted.

    Raises:
        StoreError: the store cannot be written.
    """
    directories = store.env.database(schema.DIRECTORIES)

    def work(txn: WriteTransaction) -> bool:
        encoded = txn.get(digest, db=directories)
        if encoded is None or Digest.of(encoded) == digest:
            return False
        # The image may have been made from the damaged encoding.
        store.images.remove(txn, digest)
        return txn.delete(digest, db=directories)

    return store.env.write(work)


def wrong_images(store: Store) -> Iterator[Digest]:
    """Yield the digests of Directories whose stored images differ from newly made ones.

    Raises:
        StoreError: LMDB failed.
    """
    after = b""
    while True:
        with store.snapshot() as snapshot:
            chunk = list(islice(snapshot.directories(after), _CHUNK))
            wrong = [
                Digest(digest)
                for digest, encoded in chunk
                if not _is_image_right(snapshot, digest, encoded)
            ]
        yield from wrong
        if not chunk:
            return
        after = chunk[-1][0]


def drop_image(store: Store, digest: Digest) -> None:
    """Delete the image of a Directory; it is made again when it is needed.

    Raises:
        StoreError: the store cannot be written.
    """
    store.env.write(lambda txn: store.images.remove(txn, digest))


def restore_blob(store: Store, digest: Digest, size: int) -> bool:
    """Put back the record of a blob that has none, if its file is in place and has the digest.

    Returns:
        Whether the record was put.

    Raises:
        StoreError: the store cannot be written.
    """
    seen = _look(store, digest)
    if seen.digest != digest or size <= schema.INLINE_MAX:
        return False
    blobs = store.env.database(schema.BLOBS)

    def work(txn: WriteTransaction) -> bool:
        if _identity(store, digest) != seen.identity:
            return False
        return txn.put(digest, schema.pack_file_record(size), db=blobs, overwrite=False)

    return store.env.write(work)


def is_blob_right(store: Store, digest: Digest) -> bool:
    """Whether the content of a blob has its digest; True if the blob has no record any more.

    Raises:
        StoreError: LMDB failed.
    """
    with store.snapshot() as snapshot:
        blob = snapshot.blob(digest)
        if not isinstance(blob, BlobFile):
            return blob is None or Digest.of(blob) == digest
    return _look(store, digest).digest == digest


def _is_image_right(snapshot: Snapshot, digest: bytes, encoded: bytes) -> bool:
    if snapshot.image(digest) is None or Digest.of(encoded) != digest:
        return True  # no image, or a damaged Directory, which is reported as such
    try:
        pieces = list(builder.pieces(encoded))
    except DirectoryError:
        return True
    return all(bytes(snapshot.image(digest, number) or b"") == piece for number, piece in pieces)


def _look(store: Store, digest: Digest) -> _Seen:
    # A file that cannot be read, for example on a bad sector, counts as damaged.
    identity = _identity(store, digest)
    with suppress(OSError):
        fd = store.files.open(digest)
        try:
            hasher = blake3()
            while piece := os.read(fd, _PIECE_SIZE):
                hasher.update(piece)
        finally:
            os.close(fd)
        return _Seen(hasher.digest(), identity)
    return _Seen(None, identity)


def _identity(store: Store, digest: Digest) -> tuple[int, ...] | None:
    try:
        status = store.files.status(digest)
    except OSError:
        return None
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
