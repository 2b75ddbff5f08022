"""The store: reading it in any number of processes, committing to it in one at a time."""

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import lmdb

from appliance.castore.digest import EMPTY_DIGEST, Digest
from appliance.db.environment import (
    Environment,
    NotWritableError,
    ReadTransaction,
    WriteTransaction,
)
from appliance.errors import (
    AlreadyExistsError,
    ApplianceError,
    PathInfoError,
    SchemaVersionError,
    StoreError,
    disk_error,
)
from appliance.store import schema, temp_directory
from appliance.store.batch import Batch, StagedFile
from appliance.store.image_table import ImageTable
from appliance.system import libc

if TYPE_CHECKING:
    from appliance.castore.directory import Directory

Transaction = lmdb.Transaction

_EMPTY: Final = memoryview(b"")


class BlobFile(NamedTuple):
    """A blob kept in a file of exactly `size` bytes; one whose file is not counts as absent."""

    path: Path
    size: int

    def is_whole(self) -> bool:
        """Whether the file is there with that size.

        Raises:
            OSError: that cannot be found out.
        """
        try:
            status = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return stat.S_ISREG(status.st_mode) and status.st_size == self.size


class Store:
    """One open store. The rules of `lmdb_env.Environment` are its rules."""

    def __init__(self, path: Path, env: Environment, *, is_durable: bool = True) -> None:
        self.path = path
        self._is_durable = is_durable
        self.env = env
        self._blobs_path = path / schema.BLOBS_DIRECTORY
        self._meta = env.database(schema.META)
        self._blobs = env.database(schema.BLOBS)
        self._directories = env.database(schema.DIRECTORIES)
        self.images = ImageTable(env)
        self._path_infos = env.database(schema.PATH_INFOS)
        self._path_info_log = env.database(schema.PATH_INFO_LOG)
        self._nar_infos = env.database(schema.NAR_INFOS)

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        is_readonly: bool = False,
        create: bool = False,
        or_readonly: bool = False,
        is_durable: bool = True,
        more_databases: Sequence[bytes] = (),
        map_size_bytes: int = 1 << 30,
    ) -> "Store":
        """Open the store in the directory `path`; a writable one is swept of dead processes' files.

        Args:
            path: its directory.
            is_readonly: other processes may commit meanwhile.
            create: make it if it is missing.
            or_readonly: open it for reading only if this process may not write to it.
            is_durable: see `Environment`; it goes for the files of blobs too.
            more_databases: of the opener's own, in the same environment.
            map_size_bytes: initial size of the map.

        Raises:
            SchemaVersionError: it is of another version.
            StoreError: it does not exist (and `create` is not set), or cannot be opened.
        """
        if not create and not (path / "data.mdb").exists():
            raise StoreError(f"{path}: no store there")
        databases = (*schema.DATABASES, *more_databases)

        def opened(*, is_readonly: bool) -> Environment:
            return Environment(
                path,
                databases=databases,
                newer_databases=schema.NEWER_DATABASES,
                is_readonly=is_readonly,
                is_durable=is_durable,
                map_size_bytes=map_size_bytes,
            )

        try:
            env = opened(is_readonly=is_readonly)
        except NotWritableError:
            if not or_readonly or not (path / "data.mdb").exists():
                raise
            env = opened(is_readonly=True)
        try:
            store = cls(path, env, is_durable=is_durable)
            store._check_version()
            if store.is_writable:
                temp_directory.sweep(path)
        except OSError as exc:
            env.close()
            raise StoreError(f"{exc.filename or path}: {exc.strerror}") from exc
        except BaseException:
            env.close()
            raise
        return store

    @property
    def is_writable(self) -> bool:
        """Whether this process can commit to it."""
        return not self.env.is_readonly

    def read(self) -> AbstractContextManager[ReadTransaction]:
        """Open a snapshot, for the reading methods below."""
        return self.env.read()

    def blob(self, txn: Transaction, digest: bytes) -> memoryview | BlobFile | None:
        """Return the content of a blob or where it is; a view dies with `txn`."""
        value = txn.get(digest, db=self._blobs)
        if value is None:
            return _EMPTY if digest == EMPTY_DIGEST else None
        if value[0] == schema.INLINE:
            return memoryview(value)[1:]
        return BlobFile(self.blob_path(digest), schema.unpack_file_record(value))

    def has_blob(self, txn: Transaction, digest: bytes, size: int | None = None) -> bool:
        """Whether a blob is there, of `size` bytes if that is known, as it is on record.

        Raises:
            OSError: that cannot be found out.
        """
        blob = self.blob(txn, digest)
        if isinstance(blob, BlobFile):
            return size in {None, blob.size} and blob.is_whole()
        return blob is not None and size in {None, len(blob)}

    def blob_path(self, digest: bytes) -> Path:
        """Return where the blob is if it is kept in a file."""
        name = digest.hex()
        return self._blobs_path / name[:2] / name

    def directory(self, txn: Transaction, digest: bytes) -> bytes | None:
        """Return an encoded Directory; the empty one is always there."""
        value = txn.get(digest, db=self._directories)
        if value is None:
            return b"" if digest == EMPTY_DIGEST else None
        return bytes(value)

    def path_info(self, txn: Transaction, path_digest: bytes) -> bytes | None:
        """Return an encoded PathInfo by the digest (20 bytes) of its store path."""
        value = txn.get(path_digest, db=self._path_infos)
        return None if value is None else bytes(value)

    def path_infos(self, txn: Transaction, after: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Yield (digest of the store path, PathInfo) by ascending digest, from after `after`."""
        cursor = txn.cursor(db=self._path_infos)
        if cursor.set_range(after):
            for key, value in cursor:
                if key != after:
                    yield bytes(key), bytes(value)

    def path_infos_since(self, txn: Transaction, generation: int) -> Iterator[tuple[int, bytes]]:
        """Yield (generation, PathInfo) of what was put after `generation`, oldest first.

        A path put several times comes as often, each time as it is now.
        """
        cursor = txn.cursor(db=self._path_info_log)
        if cursor.set_range(schema.pack_log_key(generation + 1)):
            for key, path_digest in cursor:
                path_info = self.path_info(txn, bytes(path_digest))
                if path_info is not None:
                    yield schema.unpack_log_key(key), path_info

    def nar_info(self, txn: Transaction, node_digest: bytes) -> tuple[int, bytes] | None:
        """Return size and SHA-256 of the NAR of a node, if they were ever calculated."""
        value = txn.get(node_digest, db=self._nar_infos)
        return None if value is None else schema.unpack_nar_info(value)

    def generation(self, txn: Transaction) -> int:
        """Return the number of PathInfos ever put."""
        return schema.unpack_number(txn.get(schema.GENERATION_KEY, db=self._meta))

    def identity(self, txn: Transaction) -> bytes:
        """Return what no other store has, not even one made later in its place."""
        stat = (self.path / "data.mdb").stat()
        own = bytes(txn.get(schema.ID_KEY, b"", db=self._meta))
        return b"%d:%d:%b" % (stat.st_dev, stat.st_ino, own)

    def commit(self, batch: Batch) -> None:
        """Make everything in `batch` durable and visible, or nothing of it.

        Takes over the staged files in either case.

        Raises:
            AlreadyExistsError, PathInfoError: one of its PathInfos is refused, as
                `castore.path_info_rules.accepted` says; everything else is there.
            StoreFullError: the disk is full.
            StoreError: the disk failed.
        """
        for error in self.commit_accepted(batch).values():
            raise error

    def commit_accepted(self, batch: Batch) -> dict[bytes, ApplianceError]:
        """As `commit`, but return why PathInfos were refused, by the digests of their paths.

        Raises:
            StoreError: as `commit` does.
        """
        refused: dict[bytes, ApplianceError] = {}
        if batch.is_empty():
            return refused
        placed: set[bytes] = set()

        def work(txn: WriteTransaction) -> None:
            refused.clear()
            self._place_files(txn, batch.files, placed)
            self._put(txn, batch, refused)

        try:
            self.images.put_ahead(batch.directories)
            self.env.write(work)
        except BaseException as exc:
            self._withdraw(placed)
            if isinstance(exc, OSError):
                raise disk_error(exc, self.path) from exc
            raise
        finally:
            for digest in placed:
                del batch.files[digest]
            batch.discard()
        return refused

    def put_images(self, directories: Mapping[bytes, bytes]) -> None:
        """Put the images of Directories; see `ImageTable.put`.

        Raises:
            StoreFullError: the disk is full.
            StoreError: the disk failed.
        """
        if directories:
            self.env.write(lambda txn: self.images.put(txn, directories))

    def close(self) -> None:
        """Close; no transaction may be open."""
        self.env.close()

    def _place_files(
        self, txn: WriteTransaction, files: dict[bytes, StagedFile], placed: set[bytes]
    ) -> None:
        # A name without a record may be left from a killed process, with less than the content:
        # it is replaced, as is a file that is not as its record says. One that is as its record
        # says is never touched, which the write lock warrants.
        missing = [
            digest
            for digest, file in files.items()
            if digest not in placed and not self.has_blob(txn, digest, file.size)
        ]
        for digest in missing:
            self._place(files[digest].path, digest)
            placed.add(digest)
        if missing and self._is_durable:
            # The data of all files, their names and their directories become durable at once: the
            # file system commits its journal once, where a sync per file would commit it per file.
            libc.syncfs(self._blobs_path)

    def _place(self, path: str, digest: bytes) -> None:
        name = digest.hex()
        directory = f"{self._blobs_path}/{name[:2]}"
        try:
            os.rename(path, f"{directory}/{name}")  # noqa: PTH104 -- no Path is made for a file
        except FileNotFoundError:
            os.makedirs(directory, mode=0o755, exist_ok=True)  # noqa: PTH103 -- as above
            os.rename(path, f"{directory}/{name}")  # noqa: PTH104 -- as above

    def _withdraw(self, placed: set[bytes]) -> None:
        # A file without a record would take its space for ever. Under the write lock again: another
        # process may have put the blob meanwhile.
        def work(txn: WriteTransaction) -> None:
            for digest in placed:
                if txn.get(digest, db=self._blobs) is None:
                    self.blob_path(digest).unlink(missing_ok=True)

        if placed:
            with suppress(StoreError, OSError):  # what failed the commit is told
                self.env.write(work)

    def _put(
        self, txn: WriteTransaction, batch: Batch, refused: dict[bytes, ApplianceError]
    ) -> None:
        records = {
            digest: schema.pack_file_record(file.size) for digest, file in batch.files.items()
        }
        # In key order the pages are visited once, and a new tree is written densely.
        _put_objects(txn, self._blobs, sorted((batch.blobs | records).items()))
        directories = sorted(batch.directories.items())
        _put_objects(txn, self._directories, directories)
        self.images.put(txn, batch.directories)
        for node_digest, nar_info in batch.nar_infos.items():
            txn.put(node_digest, nar_info, db=self._nar_infos)
        old_generation = generation = self.generation(txn)
        for path_digest, stated in batch.path_infos.items():
            old = txn.get(path_digest, db=self._path_infos)
            try:
                path_info = self._accepted(txn, old, stated, batch)
            except (AlreadyExistsError, PathInfoError) as exc:
                refused[path_digest] = exc
                continue
            if path_info == old:
                continue
            generation += 1
            txn.put(path_digest, path_info, db=self._path_infos)
            txn.put(schema.pack_log_key(generation), path_digest, db=self._path_info_log)
        if generation != old_generation:
            txn.put(schema.GENERATION_KEY, schema.pack_number(generation), db=self._meta)

    def _accepted(
        self, txn: WriteTransaction, old: bytes | None, stated: bytes, batch: Batch
    ) -> bytes:
        if old == stated or (old is None and not txn.stat(self._nar_infos)["entries"]):
            return stated  # nothing is known that it could contradict
        # Loaded here: an import into a new store has no need of what reads PathInfos.
        from appliance.nix.path_info_rules import accepted  # noqa: PLC0415 - see above

        known = _KnownContents(self, txn)
        return accepted(old, stated, known, may_replace=batch.may_replace_paths)

    def _check_version(self) -> None:
        if self.is_writable:
            self.env.write(self._stamp)
        with self.env.read() as txn:
            version = schema.unpack_number(txn.get(schema.VERSION_KEY, db=self._meta))
        if version != schema.VERSION:
            raise SchemaVersionError(
                f"{self.path}: the store has version {version}; this program reads {schema.VERSION}"
            )

    def _stamp(self, txn: WriteTransaction) -> None:
        version = schema.pack_number(schema.VERSION)
        txn.put(schema.VERSION_KEY, version, db=self._meta, overwrite=False)
        txn.put(schema.ID_KEY, os.urandom(schema.ID_SIZE), db=self._meta, overwrite=False)


class _KnownContents:
    """What is in `store`; see `path_info_rules.Known`."""

    def __init__(self, store: Store, txn: WriteTransaction) -> None:
        self._store = store
        self._txn = txn

    def nar_of(self, key: Digest) -> tuple[int, bytes] | None:
        """See `Known.nar_of`."""
        return self._store.nar_info(self._txn, key)

    def directory_of(self, digest: Digest) -> "Directory | None":
        """See `Known.directory_of`."""
        from appliance.castore.directory import Directory  # noqa: PLC0415 - as above

        encoded = self._store.directory(self._txn, digest)
        if encoded is None or Digest.of(encoded) != digest:
            return None
        return Directory.from_bytes(encoded)


def _put_objects(
    txn: WriteTransaction,
    database: lmdb._Database,
    objects: Sequence[tuple[bytes, bytes | memoryview]],
) -> None:
    # An object that was damaged is whole again with its next put. Most often all of them are new.
    _num_consumed, num_added = txn.cursor(db=database).putmulti(objects, overwrite=False)
    if num_added < len(objects):
        for digest, value in objects:
            if txn.get(digest, db=database) != value:
                txn.put(digest, value, db=database)
