"""A bounded cache of blobs, images and PathInfos of remote services; the least recently used go.

A cache is a `Store`, so that workers read it as they read any other. It lies in a directory for one
boot (see `per_boot`): everything in it can be fetched again, so nothing is worth an fsync. Several
processes may fill one cache. Its databases, beside those of the store:

database   key                                          value
cache      digest of a blob                             CLOCK_MONOTONIC ns of the last use, charge
           "d", digest of a Directory with an image     the same
           "p", digest of a store path with a PathInfo  the same
           "charged"                                    sum of all charges as u64 LE
cache_use  CLOCK_MONOTONIC ns as u64 BE, key in `cache` (nothing)
cache_end  digest of a blob, or key of a partial one    (nothing)

The sum of charges never exceeds the bound: a blob is charged before it is fetched, after others
were evicted to make room. A process that is killed in between leaves a charge without a blob, which
ages and is evicted like any other. A blob of which a part is there (see `partial_blob`) is charged
for that part and what is being fetched of it, and evicted as a whole.

`cache_end` names blobs without records whose files may still exist. A file is removed in a second
transaction, under the write lock and only if there is still no record, as another process may have
put the blob again.
"""

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import lmdb

from appliance.castore.digest import DIGEST_SIZE, Digest
from appliance.db.environment import WriteTransaction
from appliance.db.per_boot import directory_of_boot, remove_other_boots
from appliance.errors import StoreError
from appliance.images import builder
from appliance.store.batch import Batch
from appliance.store.blob_files import BlobFile
from appliance.store.cache_ledger import ENTRIES, USES, CacheLedger
from appliance.store.damage import is_blob_right
from appliance.store.partial_blob import KEY_SIZE, partial_in
from appliance.store.schema import (
    BLOBS,
    INLINE_MAX,
    PATH_INFOS,
    pack_inline,
)
from appliance.store.store import Store
from appliance.store.temp_directory import TempDirectory

_SCHEMA: Final = 3
_END: Final = b"cache_end"

# What an object costs: LMDB gives larger values whole pages of their own, and packs smaller ones
# into shared pages with some overhead each.
_PAGE: Final = 4096
_SHARED_PAGE_MAX: Final = 2000
_OVERHEAD: Final = 128


class BlobTooLargeError(StoreError):
    """A blob is larger than the whole cache."""


def charge_of(size: int) -> int:
    """Return how many bytes of a cache's bound a blob of `size` bytes takes up."""
    if size <= _SHARED_PAGE_MAX:
        return size + _OVERHEAD
    return -(-size // _PAGE) * _PAGE


def has_cache(path: Path) -> bool:
    """Whether there is a cache of this boot at `path`; False if this process may not look."""
    try:
        return directory_of_boot(path, _SCHEMA).is_dir()
    except PermissionError:
        return False


def directory_key(digest: bytes) -> bytes:
    """Return the key in `cache` for the image of a Directory (a blob may have the same digest)."""
    return b"d" + digest


def _path_key(path_digest: bytes) -> bytes:
    return b"p" + path_digest


class BlobCache:
    """An open cache; threads may share it, and every call opens transactions of its own.

    Args:
        path: the directory that holds caches, one for each boot; those of other boots are removed.
        max_bytes: the bound; if it is lower than before, the excess is evicted at once.

    Raises:
        StoreError: the cache cannot be opened.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        remove_other_boots(path)
        self.max_bytes = max_bytes
        self.store = Store.open(
            directory_of_boot(path, _SCHEMA),
            create=True,
            is_durable=False,
            more_databases=(ENTRIES, USES, _END),
        )
        env = self.store.env
        self._ledger = CacheLedger(env)
        self._ends = env.database(_END)
        self._blobs = env.database(BLOBS)
        self._path_infos = env.database(PATH_INFOS)
        self._temp = TempDirectory(self.store.path)
        env.write(lambda txn: self._evict(txn, 0, ()))
        self.remove_files()

    @property
    def temp_path(self) -> Path:
        """The directory for files that are to become blobs."""
        return self._temp.path

    def has(self, digest: Digest) -> bool:
        """Whether a blob has a record. This is quick, but does not look for the file."""
        with self.store.snapshot() as snapshot:
            return snapshot.blob(digest) is not None

    def has_part(self, digest: Digest) -> bool:
        """Whether a part of a blob is there, but not all of it (see `blob_parts`)."""
        with self.store.snapshot() as snapshot:
            return snapshot.partial_blob(digest) is not None

    def has_range(self, digest: Digest, start: int, end: int) -> bool:
        """Whether a blob has a record, or that of its parts has the bytes from `start` to `end`."""
        with self.store.snapshot() as snapshot:
            if snapshot.blob(digest) is not None:
                return True
            part = snapshot.partial_blob(digest)
            return part is not None and part.has(start, end)

    def find(self, digest: Digest) -> int | None:
        """Return the size of a blob, or None; a blob without a whole file is dropped."""
        with self.store.snapshot() as snapshot:
            blob = snapshot.blob(digest)
            if blob is None:
                return None
            if not isinstance(blob, BlobFile):
                return len(blob)
        with suppress(OSError):
            if self.store.files.status(digest).st_size == blob.size:
                return blob.size
        self.drop(digest)
        return None

    def drop_damaged(self) -> Iterator[Digest]:
        """Drop the blobs whose contents have other digests, and yield their digests.

        A dropped blob is fetched again when it is needed.

        Raises:
            StoreError: LMDB failed.
        """
        with self.store.snapshot() as snapshot:
            digests = [Digest(digest) for digest in snapshot.blob_digests()]
        for digest in digests:
            if not is_blob_right(self.store, digest):
                self.drop(digest)
                yield digest

    def check_size(self, digest: Digest, size: int) -> None:
        """Check that a blob of `size` bytes fits an otherwise empty cache.

        Raises:
            BlobTooLargeError: it does not.
        """
        if charge_of(size) > self.max_bytes:
            raise BlobTooLargeError(
                f"blob {digest}: has {size} bytes, more than the whole cache may hold "
                f"({self.max_bytes})"
            )

    def reserve(self, digest: Digest, size: int, keep: Collection[bytes]) -> bool:
        """Charge for a blob that is about to be fetched, and evict others to make room.

        If a part of it is there, that is given up.

        Args:
            digest: digest of the blob.
            size: its size in bytes.
            keep: keys in `cache` that must not be evicted.

        Returns:
            False if there is no room without evicting one of `keep`; then nothing was changed.

        Raises:
            BlobTooLargeError: the blob does not fit an empty cache.
            StoreError: LMDB failed.
        """
        self.check_size(digest, size)
        charge = charge_of(size)

        def work(txn: WriteTransaction) -> bool:
            is_charged = self.charge(txn, digest, charge, keep)
            if is_charged:
                self._end_part(txn, digest)
            return is_charged

        is_reserved = self.store.env.write(work)
        self.remove_files()
        return is_reserved

    def put_inline(
        self, blobs: Sequence[tuple[Digest, bytes]], keep: Collection[bytes]
    ) -> list[bool]:
        """Put blobs of at most `schema.INLINE_MAX` bytes, which need no reservation.

        Returns:
            For each blob whether it was put: False where `reserve` would return False.

        Raises:
            StoreError: LMDB failed; none of the blobs was put.
        """

        def put(txn: WriteTransaction, digest: Digest, content: bytes) -> bool:
            is_charged = self.charge(txn, digest, charge_of(len(content)), keep)
            if is_charged:
                txn.put(digest, pack_inline(content), db=self._blobs)
            return is_charged

        def work(txn: WriteTransaction) -> tuple[list[bool], int]:
            are_put = [put(txn, digest, content) for digest, content in blobs]
            return are_put, _count(txn, self._ends)

        are_put, num_ended = self.store.env.write(work)
        if num_ended:
            self.remove_files()
        return are_put

    def put_directories(self, directories: Mapping[bytes, bytes]) -> None:
        """Make the images of Directories and put them.

        Args:
            directories: canonical encodings, by digest.

        Raises:
            DirectoryError: one breaks a rule of Directories; none is put.
            BlobTooLargeError: an image does not fit an empty cache; none is put.
            StoreError: LMDB failed.
        """
        images = {digest: dict(builder.pieces(encoded)) for digest, encoded in directories.items()}
        charges = {
            digest: sum(charge_of(len(piece)) for piece in pieces.values())
            for digest, pieces in images.items()
        }
        for digest, charge in charges.items():
            if charge > self.max_bytes:
                raise BlobTooLargeError(
                    f"directory {Digest(digest)}: its image takes {charge} bytes, more than the "
                    f"whole cache may hold ({self.max_bytes})"
                )

        def work(txn: WriteTransaction) -> None:
            for digest, pieces in images.items():
                if self.charge(txn, directory_key(digest), charges[digest], ()):
                    self.store.images.put_pieces(txn, digest, pieces)

        self.store.env.write(work)
        self.remove_files()

    def path_info(self, path_digest: bytes) -> bytes | None:
        """Return the PathInfo of a store path, given the path's digest (20 bytes), or None."""
        with self.store.snapshot() as snapshot:
            return snapshot.path_info(path_digest)

    def put_path_info(self, path_digest: bytes, encoded: bytes) -> None:
        """Put a PathInfo, which the caller has checked; it replaces one of the same path.

        Raises:
            StoreError: LMDB failed.
        """

        def work(txn: WriteTransaction) -> None:
            if self.charge(txn, _path_key(path_digest), charge_of(len(encoded)), ()):
                txn.put(path_digest, encoded, db=self._path_infos)

        self.store.env.write(work)
        self.remove_files()

    def commit(self, digest: Digest, size: int, batch: Batch) -> None:
        """Commit the batch of a blob that was reserved; takes over its file in any case.

        Raises:
            StoreError: the blob was not put; the disk may be full.
        """
        if self.has_part(digest):  # another process has begun to fetch parts of it
            self.store.env.write(lambda txn: self._end_part(txn, digest))
        self.store.commit(batch)
        charge = charge_of(size)

        def work(txn: WriteTransaction) -> None:
            # Another process may have evicted the reservation in the meantime.
            is_charged = self._ledger.charge(txn, digest) is not None
            if not is_charged and not self.charge(txn, digest, charge, ()):
                self.remove_blob(txn, digest)

        self.store.env.write(work)
        self.remove_files()

    def drop(self, digest: Digest) -> None:
        """Remove a blob, or the reservation for one."""

        def work(txn: WriteTransaction) -> None:
            self._ledger.remove(txn, digest)
            self.remove_blob(txn, digest)

        self.store.env.write(work)
        self.remove_files()

    def touch(self, keys: Iterable[bytes]) -> None:
        """Note that the entries with these keys in `cache` were used just now."""
        now_ns = time.monotonic_ns()

        def work(txn: WriteTransaction) -> None:
            for key in keys:
                self._ledger.touch(txn, key, now_ns)

        self.store.env.write(work)

    def charged_bytes(self) -> int:
        """Return the sum of all charges in bytes, which never exceeds `max_bytes`."""
        with self.store.env.read() as txn:
            return self._ledger.total(txn)

    def close(self) -> None:
        """Close the cache; no transaction may be open."""
        self._temp.close()
        self.store.close()

    # --- In a write transaction; for this package ---

    def charge(
        self, txn: WriteTransaction, key: bytes, charge: int, keep: Collection[bytes]
    ) -> bool:
        """Charge an entry, and evict others for it; False if there is no room (see `reserve`)."""
        had_charge = self._ledger.charge(txn, key) or 0
        if not self._evict(txn, charge - had_charge, {*keep, key}):
            return False
        self._ledger.put(txn, key, charge)
        return True

    def charged(self, txn: WriteTransaction, key: bytes) -> int:
        """Return what an entry is charged, 0 if there is none."""
        return self._ledger.charge(txn, key) or 0

    def _end_part(self, txn: WriteTransaction, digest: bytes) -> None:
        if partial_in(txn, self._blobs, digest) is not None:
            self.remove_blob(txn, digest)

    def _evict(self, txn: WriteTransaction, wanted: int, keep: Collection[bytes]) -> bool:
        excess = self._ledger.total(txn) + wanted - self.max_bytes
        victims = self._ledger.least_used(txn, excess, keep)
        if victims is None:
            return False
        for key, charge in victims:
            self._ledger.remove(txn, key)
            # The length tells the kinds of keys apart; see the top of this module.
            if len(key) > DIGEST_SIZE:
                self.store.images.remove(txn, key[1:])
            elif len(key) < DIGEST_SIZE:
                txn.delete(key[1:], db=self._path_infos)
            elif charge > INLINE_MAX or partial_in(txn, self._blobs, key) is not None:
                self.remove_blob(txn, key)
            else:
                self.store.remove_blob(txn, key)
        return True

    def remove_blob(self, txn: WriteTransaction, digest: bytes) -> None:
        """Remove the record of a blob; `remove_files` then removes its file."""
        # Also without a record: a process killed before it put the record may have left a file.
        partial = partial_in(txn, self._blobs, digest)
        self.store.remove_blob(txn, digest)
        txn.put(digest if partial is None else partial.key, b"", db=self._ends)

    # --- Files of removed blobs ---

    def remove_files(self) -> None:
        """Remove the files of blobs that were removed, in a transaction of its own."""
        with self.store.env.read() as txn:
            if not _count(txn, self._ends):
                return

        def work(txn: WriteTransaction) -> None:
            ended = list(txn.cursor(self._ends).iternext(keys=True, values=False))
            for digest in ended:
                if len(digest) == KEY_SIZE:
                    self.store.files.remove(digest)
                else:
                    self.store.remove_stray_file(txn, digest)
                txn.delete(digest, db=self._ends)

        self.store.env.write(work)


def _count(txn: "lmdb.Transaction[Any]", database: lmdb._Database) -> int:
    return int(txn.stat(database)["entries"])
