"""Damaged objects are taken off the record, so that the next put of the same content replaces them.

An object is looked at again before it goes, as what was read may have been replaced since; and a
file is looked at outside of the write transaction, which must not take as long as reading it does.
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

_PIECE_SIZE: Final = 1 << 20
_CHUNK: Final = 256


class _Seen(NamedTuple):
    """A file as it was when it was hashed; None for what could not be found out."""

    digest: bytes | None
    identity: tuple[int, ...] | None


def drop_blob(store: Store, digest: Digest) -> bool:
    """Take a blob off the record if its content is not there or has another digest.

    Returns whether it was taken off. A file stays where it is until the blob is put again.

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
    """Take a directory off the record if its encoding has another digest.

    Returns whether it was taken off.

    Raises:
        StoreError: the store cannot be written.
    """
    directories = store.env.database(schema.DIRECTORIES)

    def work(txn: WriteTransaction) -> bool:
        encoded = txn.get(digest, db=directories)
        if encoded is None or Digest.of(encoded) == digest:
            return False
        # As the image may have been made of that.
        store.images.remove(txn, digest)
        return txn.delete(digest, db=directories)

    return store.env.write(work)


def wrong_images(store: Store) -> Iterator[Digest]:
    """Yield the digests of directories whose images are not those that are made of them.

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
    """Forget the image of a directory; it is made again when it is needed.

    Raises:
        StoreError: the store cannot be written.
    """
    store.env.write(lambda txn: store.images.remove(txn, digest))


def restore_blob(store: Store, digest: Digest, size: int) -> bool:
    """Put a blob on the record that is not, and whose file is in its place and right.

    Returns whether it was put.

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
    """Whether a blob on record has its digest; True for one that is not on record any more.

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
        return True  # none, or that of something else: the directory is reported
    try:
        pieces = list(builder.pieces(encoded))
    except DirectoryError:
        return True
    return all(bytes(snapshot.image(digest, number) or b"") == piece for number, piece in pieces)


def _look(store: Store, digest: Digest) -> _Seen:
    # What cannot be read, as on a bad sector, is as good as wrong.
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
