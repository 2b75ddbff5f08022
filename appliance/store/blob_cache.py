"""A bounded store of what can be had again: blobs, images, PathInfos; the least used go first.

It is a `Store`, so whoever reads stores reads this, in a directory of this boot (see `per_boot`):
nothing in it is worth an fsync. Several processes may fill one cache. Beside the store's own:

database   key                                          value
cache      digest of a blob; "d" and digest of a        CLOCK_MONOTONIC ns of the last use, charge
           Directory, of which it has the image;
           "p" and digest of a store path, of
           which it has the PathInfo
           "charged"                                    sum of all charges as u64 LE
cache_use  CLOCK_MONOTONIC ns as u64 BE, key in `cache` (nothing)
cache_end  digest of a blob                             (nothing)

A blob is charged before it is fetched and evicted before another takes its place, so that the sum
never passes the bound; a process killed in between leaves a charge for nothing, which ages and
goes. `cache_end` names blobs that have no records now and whose files may still be there: a file is
removed under the write lock and only without a record, as another process may have put it back.
"""

import struct
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
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
from appliance.store.damage import is_blob_right
from appliance.store.schema import (
    BLOBS,
    INLINE_MAX,
    PATH_INFOS,
    pack_inline,
    pack_number,
    unpack_number,
)
from appliance.store.store import Store
from appliance.store.temp_directory import TempDirectory

_SCHEMA: Final = 2
_CACHE: Final = b"cache"
_USE: Final = b"cache_use"
_END: Final = b"cache_end"
_CHARGED_KEY: Final = b"charged"
_ENTRY: Final = struct.Struct("<QQ")
_TIME: Final = struct.Struct(">Q")

# What LMDB gives a page of its own costs whole pages, and each blob something.
_PAGE: Final = 4096
_SHARED_PAGE_MAX: Final = 2000
_OVERHEAD: Final = 128


class BlobTooLargeError(StoreError):
    """A blob is larger than the whole cache."""


def charge_of(size: int) -> int:
    """Return what a blob of `size` bytes counts in the bound of a cache."""
    if size <= _SHARED_PAGE_MAX:
        return size + _OVERHEAD
    return -(-size // _PAGE) * _PAGE


def has_cache(path: Path) -> bool:
    """Whether there is a cache of this boot at `path`, as far as this process may see."""
    try:
        return directory_of_boot(path, _SCHEMA).is_dir()
    except PermissionError:
        return False


def directory_key(digest: bytes) -> bytes:
    """Return the key in `cache` of the image of a Directory; a blob may have the same digest."""
    return b"d" + digest


def _path_key(path_digest: bytes) -> bytes:
    return b"p" + path_digest


class BlobCache:
    """An open cache of at most `max_bytes`; for threads, each call a transaction or two.

    Raises:
        StoreError: it cannot be opened.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        remove_other_boots(path)
        self.max_bytes = max_bytes
        self.store = Store.open(
            directory_of_boot(path, _SCHEMA),
            create=True,
            is_durable=False,
            more_databases=(_CACHE, _USE, _END),
        )
        env = self.store.env
        self._entries = env.database(_CACHE)
        self._uses = env.database(_USE)
        self._ends = env.database(_END)
        self._blobs = env.database(BLOBS)
        self._path_infos = env.database(PATH_INFOS)
        self._temp = TempDirectory(self.store.path)
        # The bound may be lower than it was.
        env.write(lambda txn: self._evict(txn, 0, ()))
        self._remove_files()

    @property
    def temp_path(self) -> Path:
        """Where to put files that are to become blobs."""
        return self._temp.path

    def has(self, digest: Digest) -> bool:
        """Whether there is a record of the blob; quick, but the file may be gone."""
        with self.store.snapshot() as snapshot:
            return snapshot.blob(digest) is not None

    def find(self, digest: Digest) -> int | None:
        """Return the size of a blob that is there as it should be; one that is not is dropped."""
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
        """Yield the digests of blobs that are something else, each dropped: they are fetched again.

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
        """Raise BlobTooLargeError if a blob would take more than the whole cache."""
        if charge_of(size) > self.max_bytes:
            raise BlobTooLargeError(
                f"blob {digest}: {size} bytes are more than the whole cache may take, "
                f"{self.max_bytes}"
            )

    def reserve(self, digest: Digest, size: int, keep: Collection[bytes]) -> bool:
        """Charge for a blob that is to be fetched, and evict others for it.

        Returns False, and does nothing, if that takes one of those in `keep`.

        Raises:
            BlobTooLargeError: it would take more than all.
            StoreError: LMDB failed.
        """
        self.check_size(digest, size)
        charge = charge_of(size)

        def work(txn: WriteTransaction) -> bool:
            return self._charge(txn, digest, charge, keep)

        is_reserved = self.store.env.write(work)
        self._remove_files()
        return is_reserved

    def put_inline(
        self, blobs: Sequence[tuple[Digest, bytes]], keep: Collection[bytes]
    ) -> list[bool]:
        """Put blobs of at most `schema.INLINE_MAX` bytes, which need no reservation.

        Returns of each what `reserve` would.

        Raises:
            StoreError: LMDB failed; none of them is there.
        """

        def put(txn: WriteTransaction, digest: Digest, content: bytes) -> bool:
            is_charged = self._charge(txn, digest, charge_of(len(content)), keep)
            if is_charged:
                txn.put(digest, pack_inline(content), db=self._blobs)
            return is_charged

        def work(txn: WriteTransaction) -> tuple[list[bool], int]:
            are_put = [put(txn, digest, content) for digest, content in blobs]
            return are_put, _count(txn, self._ends)

        are_put, num_ended = self.store.env.write(work)
        if num_ended:
            self._remove_files()
        return are_put

    def put_directory(self, digest: Digest, encoded: bytes) -> None:
        """Put the image of a Directory, in canonical encoding.

        Raises:
            DirectoryError: it is none.
            BlobTooLargeError: the image would take more than the whole cache.
            StoreError: LMDB failed.
        """
        pieces = dict(builder.pieces(encoded))
        charge = sum(charge_of(len(piece)) for piece in pieces.values())
        if charge > self.max_bytes:
            raise BlobTooLargeError(
                f"directory {digest}: its image of {charge} bytes is more than the whole cache may "
                f"take, {self.max_bytes}"
            )

        def work(txn: WriteTransaction) -> None:
            if self._charge(txn, directory_key(digest), charge, ()):
                self.store.images.put_pieces(txn, digest, pieces)

        self.store.env.write(work)
        self._remove_files()

    def path_info(self, path_digest: bytes) -> bytes | None:
        """Return the PathInfo of a store path by its digest (20 bytes)."""
        with self.store.snapshot() as snapshot:
            return snapshot.path_info(path_digest)

    def put_path_info(self, path_digest: bytes, encoded: bytes) -> None:
        """Put a PathInfo, valid as the caller knows, in place of one for the same path.

        Raises:
            StoreError: LMDB failed.
        """

        def work(txn: WriteTransaction) -> None:
            if self._charge(txn, _path_key(path_digest), charge_of(len(encoded)), ()):
                txn.put(path_digest, encoded, db=self._path_infos)

        self.store.env.write(work)
        self._remove_files()

    def commit(self, digest: Digest, size: int, batch: Batch) -> None:
        """Put a blob that was reserved; takes over its file in any case."""
        self.store.commit(batch)
        charge = charge_of(size)

        def work(txn: WriteTransaction) -> None:
            # Another process may have taken the reservation for a blob long unused.
            is_charged = txn.get(digest, None, self._entries) is not None
            if not is_charged and not self._charge(txn, digest, charge, ()):
                self._remove_blob(txn, digest)

        self.store.env.write(work)
        self._remove_files()

    def drop(self, digest: Digest) -> None:
        """Forget a blob, or the reservation of one."""

        def work(txn: WriteTransaction) -> None:
            self._remove_entry(txn, digest)
            self._remove_blob(txn, digest)

        self.store.env.write(work)
        self._remove_files()

    def touch(self, keys: Iterable[bytes]) -> None:
        """Note that entries, by their keys in `cache`, were used just now."""
        now_ns = time.monotonic_ns()

        def work(txn: WriteTransaction) -> None:
            for digest in keys:
                value = txn.get(digest, db=self._entries)
                if value is not None and digest != _CHARGED_KEY:
                    used_ns, charge = _ENTRY.unpack(value)
                    txn.delete(_TIME.pack(used_ns) + digest, db=self._uses)
                    self._put_entry(txn, digest, now_ns, charge)

        self.store.env.write(work)

    def charged_bytes(self) -> int:
        """Return the sum of what all blobs count; never more than `max_bytes`."""
        with self.store.env.read() as txn:
            return unpack_number(txn.get(_CHARGED_KEY, db=self._entries))

    def close(self) -> None:
        """Close; no transaction may be open."""
        self._temp.close()
        self.store.close()

    # --- In a write transaction ---

    def _charge(
        self, txn: WriteTransaction, digest: bytes, charge: int, keep: Collection[bytes]
    ) -> bool:
        value = txn.get(digest, None, self._entries)
        had_charge = 0 if value is None else _ENTRY.unpack(value)[1]
        if not self._evict(txn, charge - had_charge, {*keep, digest}):
            return False
        self._remove_entry(txn, digest)
        self._put_entry(txn, digest, time.monotonic_ns(), charge)
        self._add_charge(txn, charge)
        return True

    def _evict(self, txn: WriteTransaction, wanted: int, keep: Collection[bytes]) -> bool:
        excess = self._charged(txn) + wanted - self.max_bytes
        victims: list[tuple[bytes, int]] = []
        if excess > 0:
            for key in txn.cursor(self._uses).iternext(keys=True, values=False):
                digest = key[_TIME.size :]
                if digest in keep:
                    continue
                _used_ns, charge = _ENTRY.unpack(txn.get(digest, b"", self._entries))
                victims.append((digest, charge))
                excess -= charge
                if excess <= 0:
                    break
        if excess > 0:
            return False
        for digest, charge in victims:
            self._remove_entry(txn, digest)
            if len(digest) > DIGEST_SIZE:
                self.store.images.remove(txn, digest[1:])
            elif len(digest) < DIGEST_SIZE:
                txn.delete(digest[1:], db=self._path_infos)
            elif charge > INLINE_MAX:
                self._remove_blob(txn, digest)
            else:
                self.store.remove_blob(txn, digest)
        return True

    def _put_entry(self, txn: WriteTransaction, digest: bytes, time_ns: int, charge: int) -> None:
        txn.put(digest, _ENTRY.pack(time_ns, charge), db=self._entries)
        txn.put(_TIME.pack(time_ns) + digest, b"", db=self._uses)

    def _remove_entry(self, txn: WriteTransaction, digest: bytes) -> None:
        value = txn.get(digest, None, self._entries)
        if value is not None:
            used_ns, charge = _ENTRY.unpack(value)
            txn.delete(digest, db=self._entries)
            txn.delete(_TIME.pack(used_ns) + digest, db=self._uses)
            self._add_charge(txn, -charge)

    def _remove_blob(self, txn: WriteTransaction, digest: bytes) -> None:
        # Of a process killed before its record was there, there is a file all the same.
        self.store.remove_blob(txn, digest)
        txn.put(digest, b"", db=self._ends)

    def _charged(self, txn: WriteTransaction) -> int:
        return unpack_number(txn.get(_CHARGED_KEY, None, self._entries))

    def _add_charge(self, txn: WriteTransaction, charge: int) -> None:
        txn.put(_CHARGED_KEY, pack_number(self._charged(txn) + charge), db=self._entries)

    def _remove_files(self) -> None:
        with self.store.env.read() as txn:
            if not _count(txn, self._ends):
                return

        def work(txn: WriteTransaction) -> None:
            ended = list(txn.cursor(self._ends).iternext(keys=True, values=False))
            for digest in ended:
                self.store.remove_stray_file(txn, digest)
                txn.delete(digest, db=self._ends)

        self.store.env.write(work)


def _count(txn: "lmdb.Transaction[Any]", database: lmdb._Database) -> int:
    return int(txn.stat(database)["entries"])
