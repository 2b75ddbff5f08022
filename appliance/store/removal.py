"""Reading all keys of a store, and removing what the collector found to be dead.

`keys` and `sizes` read a table from one key on; each call opens a snapshot of its own, so that no
page is pinned for long. The other functions run in a write transaction of the caller, which keeps
it short.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Final

from appliance.castore.digest import DIGEST_SIZE
from appliance.db.environment import ReadTransaction, WriteTransaction
from appliance.store import schema
from appliance.store.store import Store

# Keys that are read in one snapshot.
_KEYS_AT_A_TIME: Final = 16_384
# The pages that were read are counted at least once per this many keys.
_KEYS_PER_COUNT: Final = 2_048
_FILE_RECORD_SIZE: Final = len(schema.pack_file_record(0))


# --- Reading ---


def sizes(store: Store, txn: ReadTransaction, table: bytes) -> Iterator[tuple[memoryview, int]]:
    """Yield the keys of a table in order, with the bytes that are stored under each.

    A blob that is kept in a file counts with the size of the file. Nothing but the keys and short
    records is read from the disk. The memory of a key is valid until the next one.
    """
    for number, (key, value) in enumerate(txn.cursor(db=store.env.database(table)).iternext()):
        if not number % _KEYS_PER_COUNT:
            store.env.limit_pages()
        size = len(value)
        if table == schema.BLOBS and size == _FILE_RECORD_SIZE and value[0] == schema.IN_FILE:
            size = schema.unpack_file_record(value)
        yield key, size


def image_sizes(store: Store, txn: ReadTransaction) -> Iterator[tuple[memoryview, int]]:
    """Yield the digests of Directories with the size of each piece of their images, in order."""
    images = store.env.newer_database(schema.IMAGES)
    if images is not None:
        for number, (key, value) in enumerate(txn.cursor(db=images).iternext()):
            if not number % _KEYS_PER_COUNT:
                store.env.limit_pages()
            yield key[:DIGEST_SIZE], len(value)


def keys(store: Store, table: bytes) -> Iterator[bytes]:
    """Yield the keys of a table in order; commits between two keys may be seen or not."""
    database = store.env.newer_database(table)
    if database is None:
        return
    after = b""
    while True:
        with store.env.read() as txn:
            cursor = txn.cursor(db=database)
            found: list[bytes] = []
            if cursor.set_range(after):
                items = islice(cursor.iternext(keys=True, values=False), _KEYS_AT_A_TIME)
                found = [bytes(key) for key in items]
        store.env.limit_pages()
        yield from (key for key in found if key != after)
        if len(found) < _KEYS_AT_A_TIME:
            return
        after = found[-1]


# --- Removing, in a write transaction ---


def remove_path(store: Store, txn: WriteTransaction, path_digest: bytes) -> bool:
    """Remove the PathInfo of a store path, and return whether there was one."""
    txn.delete(path_digest, db=store.env.database(schema.PATH_TIMES))
    return txn.delete(path_digest, db=store.env.database(schema.PATH_INFOS))


def remove_directory(store: Store, txn: WriteTransaction, digest: bytes) -> bool:
    """Remove a Directory with its image, and return whether there was one."""
    store.images.remove(txn, digest)
    return txn.delete(digest, db=store.env.database(schema.DIRECTORIES))


def remove_blob(store: Store, txn: WriteTransaction, digest: bytes) -> bool:
    """Remove the record of a blob, and return whether it had a file, which stays for now."""
    record = txn.get(digest, db=store.env.database(schema.BLOBS))
    store.remove_blob(txn, digest)
    return record is not None and record[0] == schema.IN_FILE


def remove_keys(
    store: Store,
    txn: WriteTransaction,
    table: bytes,
    found: Iterable[bytes],
    is_dead: "Callable[[ReadTransaction | WriteTransaction, bytes], bool]",
) -> int:
    """Remove those of the keys `found` in a table that are dead; return their number."""
    database = store.env.newer_database(table)
    num_removed = 0
    for key in found:
        if is_dead(txn, key):
            num_removed += txn.delete(key, db=database)
    return num_removed


def digest_of_image(key: bytes) -> bytes:
    """Return the digest of the Directory that a key of `images1` belongs to."""
    return key[:DIGEST_SIZE]


def is_log_entry_stale(store: Store, txn: "ReadTransaction | WriteTransaction", key: bytes) -> bool:
    """Whether the store path of an entry of `path_info_log` is not in the store, or it is gone."""
    path_digest = txn.get(key, None, store.env.database(schema.PATH_INFO_LOG))
    if path_digest is None:
        return True
    return txn.get(bytes(path_digest), None, store.env.database(schema.PATH_INFOS)) is None


def has(store: Store, txn: "ReadTransaction | WriteTransaction", table: bytes, key: bytes) -> bool:
    """Whether a table has a key."""
    return txn.get(key, None, store.env.database(table)) is not None
