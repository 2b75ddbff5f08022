"""Reading a store as it is at one moment, unaffected by later commits."""

from collections.abc import Iterator
from typing import Final, NamedTuple, Self

import lmdb

from appliance.castore.digest import EMPTY_DIGEST
from appliance.db.environment import Environment, ReadTransaction, WriteTransaction
from appliance.images import builder
from appliance.store import schema
from appliance.store.blob_files import BlobFile, BlobFiles
from appliance.store.partial_blob import PartialBlob

_EMPTY: Final = memoryview(b"")
_EMPTY_IMAGE: Final = memoryview(bytes(builder.build(b"")))


class Tables(NamedTuple):
    """The handles of a store's databases, whose contents `schema` describes.

    `images` is None if an earlier release made the store without images, and it is open for reading
    only.
    """

    meta: lmdb._Database
    blobs: lmdb._Database
    directories: lmdb._Database
    images: lmdb._Database | None
    path_infos: lmdb._Database
    path_info_log: lmdb._Database
    nar_infos: lmdb._Database

    @classmethod
    def of(cls, env: Environment) -> Self:
        """Return the handles of the databases that `env` was opened with."""
        return cls(
            meta=env.database(schema.META),
            blobs=env.database(schema.BLOBS),
            directories=env.database(schema.DIRECTORIES),
            images=env.newer_database(schema.IMAGES),
            path_infos=env.database(schema.PATH_INFOS),
            path_info_log=env.database(schema.PATH_INFO_LOG),
            nar_infos=env.database(schema.NAR_INFOS),
        )


class Snapshot:
    """The contents of a store as one transaction sees them; `Store.snapshot` opens one.

    The store's own code also wraps its write transactions, to read what they have written so far.
    A memoryview from a snapshot is memory of the LMDB map, valid until the transaction ends.

    Args:
        tables: the databases of the store.
        files: the blob files of the store.
        txn: the transaction; the caller ends it.
    """

    __slots__ = ("_files", "_tables", "_txn")

    def __init__(
        self, tables: Tables, files: BlobFiles, txn: "ReadTransaction | WriteTransaction"
    ) -> None:
        self._tables = tables
        self._files = files
        self._txn = txn

    def transaction(self) -> int:
        """Return the number of the last transaction whose changes this snapshot has."""
        return self._txn.id()

    # --- Blobs, Directories and their images ---

    def blob(self, digest: bytes) -> memoryview | BlobFile | None:
        """Return a blob's content, or its file, or None; the empty blob is always in the store."""
        value = self._txn.get(digest, None, self._tables.blobs)
        if value is None:
            return _EMPTY if digest == EMPTY_DIGEST else None
        if value[0] == schema.INLINE:
            return memoryview(value)[1:]
        if value[0] == schema.PARTIAL:
            return None
        return BlobFile(digest, schema.unpack_file_record(value))

    def partial_blob(self, digest: bytes) -> PartialBlob | None:
        """Return what is there of a blob of which a part is there, or None."""
        value = self._txn.get(digest, None, self._tables.blobs)
        if value is None or value[0] != schema.PARTIAL:
            return None
        return PartialBlob.unpack(digest, value)

    def has_blob(self, digest: bytes, size: int | None = None) -> bool:
        """Whether a blob is in the store, and its file, if it has one, has the recorded size.

        Args:
            digest: digest of the blob.
            size: the size that the record must state, in bytes; None accepts any.

        Raises:
            OSError: the file cannot be examined.
        """
        blob = self.blob(digest)
        if isinstance(blob, BlobFile):
            return size in {None, blob.size} and self._files.is_whole(blob)
        return blob is not None and size in {None, len(blob)}

    def blob_digests(self) -> Iterator[bytes]:
        """Yield the digests of all blobs on record, in ascending order."""
        cursor = self._txn.cursor(db=self._tables.blobs)
        for key in cursor.iternext(keys=True, values=False):
            yield bytes(key)

    def directory(self, digest: bytes) -> bytes | None:
        """Return the encoding of a Directory; the empty one is always in the store."""
        value = self._txn.get(digest, None, self._tables.directories)
        if value is None:
            return b"" if digest == EMPTY_DIGEST else None
        return bytes(value)

    def directories(self, after: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Yield (digest, encoded Directory) by ascending digest, for digests above `after`."""
        return self._items(self._tables.directories, after)

    def directories_beginning(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Yield (digest, encoded Directory) for each digest that begins with `prefix`, in order."""
        cursor = self._txn.cursor(db=self._tables.directories)
        is_there = cursor.set_range(prefix)
        while is_there and (digest := bytes(cursor.key())).startswith(prefix):
            yield digest, bytes(cursor.value())
            is_there = cursor.next()

    def image(self, digest: bytes, piece: int = 0) -> memoryview | None:
        """Return a piece of a Directory's image, or None; the empty one always has its image.

        A Directory has no image if an earlier release stored it.
        """
        database = self._tables.images
        image = None
        if database is not None:
            image = self._txn.get(schema.image_key(digest, piece), None, database)
        if image is None:
            return _EMPTY_IMAGE if digest == EMPTY_DIGEST else None
        return memoryview(image)

    # --- Store paths ---

    @property
    def generation(self) -> int:
        """The number of times that a PathInfo was ever put into this store."""
        return schema.unpack_number(self._txn.get(schema.GENERATION_KEY, None, self._tables.meta))

    def path_info(self, path_digest: bytes) -> bytes | None:
        """Return the PathInfo of a store path, given the path's digest (20 bytes), or None."""
        value = self._txn.get(path_digest, None, self._tables.path_infos)
        return None if value is None else bytes(value)

    def path_infos(self, after: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Yield (digest of the store path, PathInfo) by ascending digest, above `after`."""
        return self._items(self._tables.path_infos, after)

    def path_infos_since(self, generation: int) -> Iterator[tuple[int, bytes]]:
        """Yield (generation, PathInfo) for each put after `generation`, oldest first.

        A path that was put several times is yielded as often, always with its present PathInfo.
        """
        cursor = self._txn.cursor(db=self._tables.path_info_log)
        if cursor.set_range(schema.pack_log_key(generation + 1)):
            for key, path_digest in cursor:
                path_info = self.path_info(bytes(path_digest))
                if path_info is not None:
                    yield schema.unpack_log_key(key), path_info

    def nar_info(self, node_digest: bytes) -> tuple[int, bytes] | None:
        """Return the size and SHA-256 of a node's NAR, or None if they were never calculated."""
        value = self._txn.get(node_digest, None, self._tables.nar_infos)
        return None if value is None else schema.unpack_nar_info(value)

    def has_nar_infos(self) -> bool:
        """Whether the store has the size and SHA-256 of any NAR."""
        return self._txn.stat(self._tables.nar_infos)["entries"] > 0

    def _items(self, database: lmdb._Database, after: bytes) -> Iterator[tuple[bytes, bytes]]:
        cursor = self._txn.cursor(db=database)
        if cursor.set_range(after):
            for key, value in cursor:
                if key != after:
                    yield bytes(key), bytes(value)
