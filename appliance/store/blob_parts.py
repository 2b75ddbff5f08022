"""The blobs of a cache that are there in part: begun, grown range by range, completed.

How such a blob is kept is described in `partial_blob`. Every method runs in transactions of its
own, and several processes may fetch parts of one blob: each of them records the ranges that it has
written. Whatever one of them has, another may evict; `PartLostError` says so.

Bytes that go into the file were verified against a list of chunks, and nobody can compare that list
with the digest of the blob before all of it is there. Processes share a file only if they go by the
same list: what a peer of one of them makes up is never read by another one.
"""

from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Final, TypeVar

from appliance.castore.digest import Digest
from appliance.db.environment import WriteTransaction
from appliance.errors import StoreError, disk_error
from appliance.store.blob_cache import BlobCache, charge_of
from appliance.store.partial_blob import PartialBlob, partial_in
from appliance.store.schema import BLOBS, pack_file_record

T = TypeVar("T")

# What the record of a blob is charged before any byte is there.
_RECORD_CHARGE: Final = 4096


class PartLostError(StoreError):
    """A blob of which a part was there has been evicted, or is there as a whole by now."""


class OtherListError(StoreError):
    """Parts of the blob are there that were verified by another list of chunks."""


class BlobParts:
    """The blobs of `cache` (lent) that are there in part; threads may share it."""

    def __init__(self, cache: BlobCache) -> None:
        self._cache = cache
        self._store = cache.store
        self._blobs = cache.store.env.database(BLOBS)

    def find(self, digest: bytes) -> PartialBlob | None:
        """Return what is there of a blob of which a part is there, or None."""
        with self._store.snapshot() as snapshot:
            found = snapshot.partial_blob(digest)
            return None if found is None else found.with_ranges(())

    def begin(self, digest: Digest, size: int, list_digest: bytes) -> PartialBlob | None:
        """Return what is there of a blob; if that is nothing, begin to keep parts of it.

        Args:
            digest: digest of the blob.
            size: its size in bytes.
            list_digest: digest of the list of chunks that the parts will be verified by.

        Returns:
            The record, of which `open` opens the file; None if the whole blob is there.

        Raises:
            BlobTooLargeError: the blob does not fit an empty cache.
            OtherListError: another process has parts by another list, or another size.
            StoreError: LMDB failed.
        """
        self._cache.check_size(digest, size)

        def work(txn: WriteTransaction) -> PartialBlob | None:
            found = partial_in(txn, self._blobs, digest)
            if found is not None:
                if (found.size, found.list_digest) != (size, list_digest):
                    raise OtherListError(f"blob {digest}: is there in part, by another list")
                return found
            if txn.get(digest, db=self._blobs) is not None:
                return None
            begun = PartialBlob.new(digest, size, list_digest)
            txn.put(digest, begun.pack(), db=self._blobs)
            # Another process may be fetching the whole blob, and has charged for it.
            charge = max(self._cache.charged(txn, digest), _RECORD_CHARGE)
            self._cache.charge(txn, digest, charge, ())
            return begun

        return self._store.env.write(work)

    def open(self, partial: PartialBlob) -> int:
        """Open the file of a blob of which a part is there, for writing; the caller owns it.

        Raises:
            PartLostError: the file is gone.
            StoreError: the file cannot be opened.
        """
        try:
            is_empty = not len(partial.bounds)
            return self._store.files.open_partial(partial.key, partial.size, create=is_empty)
        except FileNotFoundError:
            self._cache.drop(Digest(partial.digest))
            raise PartLostError(f"blob {Digest(partial.digest)}: its file is gone") from None
        except OSError as exc:
            raise disk_error(exc, self._store.path) from exc

    def reserve(self, partial: PartialBlob, size: int, keep: Collection[bytes]) -> bool:
        """Charge for parts that are about to be fetched, and evict other blobs to make room.

        Args:
            partial: the blob.
            size: how many bytes more than before, in whole pages.
            keep: see `BlobCache.reserve`.

        Returns:
            False if there is no room; see `BlobCache.reserve`.

        Raises:
            PartLostError: see there; the file was removed.
            StoreError: LMDB failed.
        """
        most = charge_of(partial.size)

        def work(txn: WriteTransaction) -> bool:
            self._present(txn, partial)
            had_charge = self._cache.charged(txn, partial.digest)
            return self._cache.charge(txn, partial.digest, min(had_charge + size, most), keep)

        is_reserved = self._unless_lost(partial, work)
        self._cache.remove_files()
        return is_reserved

    def add_ranges(self, partial: PartialBlob, ranges: Collection[tuple[int, int]]) -> PartialBlob:
        """Record that ranges of bytes are in the file, verified; return what is there now.

        If that is the whole blob, the ranges are not recorded: the caller compares the blob with
        its digest, and `complete` makes it visible. So no process ever finds all of a blob that
        nobody compared.

        Raises:
            PartLostError: see there; the file was removed.
            StoreError: LMDB failed.
        """

        def work(txn: WriteTransaction) -> PartialBlob:
            grown = self._present(txn, partial).with_ranges(ranges)
            if not grown.is_whole:
                txn.put(partial.digest, grown.pack(), db=self._blobs)
            return grown

        return self._unless_lost(partial, work)

    def complete(self, partial: PartialBlob) -> None:
        """Make a blob visible that is there as a whole, and was compared with its digest.

        Raises:
            PartLostError: see there.
            StoreError: LMDB failed.
        """
        is_placed = False

        def work(txn: WriteTransaction) -> None:
            nonlocal is_placed
            self._present(txn, partial)
            if not is_placed:
                self._store.files.complete(partial.key, partial.digest)
                is_placed = True
            txn.put(partial.digest, pack_file_record(partial.size), db=self._blobs)
            self._cache.charge(txn, partial.digest, charge_of(partial.size), ())

        try:
            self._unless_lost(partial, work)
        except OSError as exc:
            raise disk_error(exc, self._store.path) from exc

    def _present(self, txn: WriteTransaction, partial: PartialBlob) -> PartialBlob:
        found = partial_in(txn, self._blobs, partial.digest)
        if found is None or found.token != partial.token:
            raise PartLostError(f"blob {Digest(partial.digest)}: was evicted")
        return found

    def _unless_lost(self, partial: PartialBlob, work: Callable[[WriteTransaction], T]) -> T:
        try:
            return self._store.env.write(work)
        except PartLostError:
            # Perhaps it was made after the eviction; no record will ever name it.
            with suppress(OSError):
                self._store.files.remove(partial.key)
            raise
