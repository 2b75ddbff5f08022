"""The store: reading it in any number of processes, committing to it in one at a time."""

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import lmdb

from appliance.castore.digest import Digest
from appliance.db.environment import (
    Environment,
    NotWritableError,
    ReadTransaction,
    WriteTransaction,
)
from appliance.errors import (
    AlreadyExistsError,
    ApplianceError,
    ContentMissingError,
    PathInfoError,
    SchemaVersionError,
    StoreError,
    disk_error,
)
from appliance.store import schema, temp_directory
from appliance.store.batch import Batch, StagedFile
from appliance.store.blob_files import BlobFile, BlobFiles
from appliance.store.chunk_table import ChunkPlace, ChunkTable
from appliance.store.image_table import ImageTable
from appliance.store.recent_puts import RecentPuts, lost_object, missing_reference
from appliance.store.snapshot import Snapshot, Tables

if TYPE_CHECKING:
    from appliance.castore.directory import Directory


class Store:
    """One open store, under the same rules as `db.environment.Environment`.

    In particular it is opened after a fork, and at most once in a process.

    Attributes:
        path: the directory that the store was opened in; it may have been moved since.
        env: the LMDB environment of the store.
        files: the blob files of the store; for this package.
        images: the table of images, for writing; for this package.
        recent_puts: what was put lately.
        chunks: the tables of chunks.
    """

    def __init__(
        self, path: Path, env: Environment, files: BlobFiles, *, is_durable: bool = True
    ) -> None:
        self.path = path
        self._is_durable = is_durable
        self.env = env
        self.files = files
        self._tables = Tables.of(env)
        self.images = ImageTable(env)
        self.recent_puts = RecentPuts(env)
        self.chunks = ChunkTable(env)

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
        """Open the store in the directory `path`.

        Opening it for writing also removes the temporary files of processes that have ended.

        Args:
            path: directory of the store.
            is_readonly: open it for reading only; other processes may commit meanwhile.
            create: make the store if it is missing.
            or_readonly: open it for reading only if this process may not write to it.
            is_durable: whether a commit, with its blob files, survives a power cut; see
                `Environment`.
            more_databases: names of databases in the same environment that the caller owns.
            map_size_bytes: initial size of the map.

        Raises:
            SchemaVersionError: the store has another version.
            StoreError: the store does not exist (and `create` is not set), or cannot be opened.
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
            return cls._assembled(path, env, is_durable=is_durable)
        except OSError as exc:
            raise StoreError(f"{exc.filename or path}: {exc.strerror}") from exc

    @classmethod
    def _assembled(cls, path: Path, env: Environment, *, is_durable: bool) -> "Store":
        # Takes `env` over: it is closed if anything fails.
        with ExitStack() as opened:
            opened.callback(env.close)
            files = BlobFiles(path)
            opened.callback(files.close)
            store = cls(path, env, files, is_durable=is_durable)
            store._check_version()
            if store.is_writable:
                temp_directory.sweep(path)
                with suppress(OSError):  # of a full disk: the first large blob makes it
                    files.make_directory()
            opened.pop_all()
        return store

    @property
    def is_writable(self) -> bool:
        """Whether this process can commit to the store."""
        return not self.env.is_readonly

    def snapshot(self) -> AbstractContextManager[Snapshot]:
        """Open a snapshot for reading; a thread can have only one open at a time.

        Raises:
            SnapshotLostError, StoreError: see `Environment.read`.
        """
        return self.env.read_through(self._view)

    def open_blob(self, blob: BlobFile) -> int:
        """Open the file of a blob and return a descriptor, which the caller owns.

        Raises:
            FileNotFoundError: the file is gone, perhaps because a cache has evicted the blob.
            OSError: the file cannot be opened.
        """
        return self.files.open(blob.digest)

    def chunks_of(self, digest: bytes) -> bytes | None:
        """Return the chunks of a blob as `castore.chunking` packs them, or None if there are none.

        The blob itself need not be there.

        Raises:
            StoreError: LMDB failed.
        """
        with self.env.read() as txn:
            return self.chunks.of_blob(txn, digest)

    def places_of_chunk(self, digest: bytes) -> list[ChunkPlace]:
        """Return where the chunk with this digest is, in each blob that has it.

        Raises:
            StoreError: LMDB failed.
        """
        with self.env.read() as txn:
            return list(self.chunks.places(txn, digest))

    def commit(self, batch: Batch) -> None:
        """Make everything in `batch` durable and visible, or nothing.

        The staged files are taken over in either case.

        Raises:
            AlreadyExistsError, PathInfoError: a PathInfo is refused by the rules of
                `nix.path_info_rules.accepted`; everything else in the batch is committed.
            ContentMissingError: a PathInfo is refused because part of its tree was removed from the
                store after whoever puts it had found it there, or because it is one of
                `Batch.closed_paths` and refers to a path that is not there; the same.
            StoreFullError: the disk is full.
            StoreError: the disk failed.
        """
        for error in self.commit_accepted(batch).values():
            raise error

    def commit_accepted(self, batch: Batch) -> dict[bytes, ApplianceError]:
        """Commit like `commit`, but return the refusals of PathInfos instead of raising one.

        Returns:
            The reason for each refused PathInfo, by the digest of its store path.

        Raises:
            StoreError: as for `commit`.
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
        """Put the images of Directories, given in canonical encoding; see `ImageTable.put`.

        Raises:
            StoreFullError: the disk is full.
            StoreError: the disk failed.
        """
        if directories:
            self.env.write(lambda txn: self.images.put(txn, directories))

    def close(self) -> None:
        """Close the store; no transaction may be open. Blob files stay open."""
        self.files.close()
        self.env.close()

    # --- In a write transaction; for this package ---

    def view_in(self, txn: "ReadTransaction | WriteTransaction") -> Snapshot:
        """Return the contents of the store as `txn` sees them."""
        return self._view(txn)

    def remove_blob(self, txn: WriteTransaction, digest: bytes) -> bool:
        """Delete the record of a blob, with its chunks, and return whether there was one.

        The file of the blob stays, since readers go by the record until `txn` is committed:
        `remove_stray_file` removes it later, or the next put of the blob replaces it.
        """
        self.chunks.remove(txn, digest)
        return txn.delete(digest, db=self._tables.blobs)

    def remove_stray_file(self, txn: WriteTransaction, digest: bytes) -> bool:
        """Remove the file of a blob that has no record; descriptors of the file stay valid.

        A write transaction is needed for its lock: no other process can then be putting the blob.

        Returns:
            Whether there was such a file.

        Raises:
            OSError: the file cannot be removed.
        """
        return txn.get(digest, db=self._tables.blobs) is None and self.files.remove(digest)

    def _place_files(
        self, txn: WriteTransaction, files: dict[bytes, StagedFile], placed: set[bytes]
    ) -> None:
        # A file without a record may be the rest of a killed process and hold less than the
        # content, so it is replaced; so is a file whose size is not the recorded one. A file that
        # agrees with its record is never touched: the write lock keeps the record from changing.
        view = self._view(txn)
        missing = [
            digest
            for digest, file in files.items()
            if digest not in placed and not view.has_blob(digest, file.size)
        ]
        for digest in missing:
            self.files.place(digest, files[digest].path)
            placed.add(digest)
        if missing and self._is_durable:
            self.files.sync()

    def _withdraw(self, placed: set[bytes]) -> None:
        # After a failed commit: files without records would take up space for ever. This takes the
        # write lock again, as another process may have put the same blob since.
        def work(txn: WriteTransaction) -> None:
            for digest in placed:
                self.remove_stray_file(txn, digest)

        if placed:
            with suppress(StoreError, OSError):  # the commit's own error is the one to report
                self.env.write(work)

    def _put(
        self, txn: WriteTransaction, batch: Batch, refused: dict[bytes, ApplianceError]
    ) -> None:
        records = {
            digest: schema.pack_file_record(file.size) for digest, file in batch.files.items()
        }
        # In the order of keys, LMDB visits each page once and fills the pages of a new tree.
        _put_objects(txn, self._tables.blobs, sorted((batch.blobs | records).items()))
        self.chunks.put(txn, batch.chunks)
        directories = sorted(batch.directories.items())
        _put_objects(txn, self._tables.directories, directories)
        self.images.put(txn, batch.directories)
        for node_digest, nar_info in batch.nar_infos.items():
            txn.put(node_digest, nar_info, db=self._tables.nar_infos)
        old_generation = generation = self._view(txn).generation
        may_have_lost = bool(batch.path_infos) and self.recent_puts.may_have_lost(
            txn, batch.num_sweeps
        )
        put_paths: list[bytes] = []
        for path_digest, stated in batch.path_infos.items():
            old = txn.get(path_digest, db=self._tables.path_infos)
            try:
                path_info = self._accepted(txn, old, stated, batch)
                if may_have_lost:
                    self._check_whole(txn, path_info)
                if path_digest in batch.closed_paths:
                    self._check_references(txn, path_info)
            except (AlreadyExistsError, PathInfoError, ContentMissingError) as exc:
                refused[path_digest] = exc
                continue
            put_paths.append(path_digest)
            if path_info == old:
                continue
            generation += 1
            txn.put(path_digest, path_info, db=self._tables.path_infos)
            txn.put(schema.pack_log_key(generation), path_digest, db=self._tables.path_info_log)
        if generation != old_generation:
            txn.put(schema.GENERATION_KEY, schema.pack_number(generation), db=self._tables.meta)
        if self._is_durable:
            blobs = batch.blobs.keys() | batch.files.keys()
            self.recent_puts.note(txn, blobs, batch.directories, put_paths)

    def _check_whole(self, txn: WriteTransaction, path_info: bytes) -> None:
        from appliance.nix.path_info import read_path_info  # noqa: PLC0415 - as in `_accepted`

        info = read_path_info(path_info)
        lost = lost_object(self._view(txn), info.node)
        if lost is not None:
            raise ContentMissingError(
                f"{info.path.absolute()}: {lost} was removed from the store meanwhile; put it again"
            )

    def _check_references(self, txn: WriteTransaction, path_info: bytes) -> None:
        from appliance.nix.path_info import read_path_info  # noqa: PLC0415 - as in `_accepted`

        info = read_path_info(path_info)
        missing = missing_reference(self._view(txn), path_info)
        if missing is not None:
            raise ContentMissingError(
                f"{info.path.absolute()}: refers to {missing}, which is not in the store, or no "
                "longer; put that path first"
            )

    def _accepted(
        self, txn: WriteTransaction, old: bytes | None, stated: bytes, batch: Batch
    ) -> bytes:
        view = self._view(txn)
        if old == stated or (old is None and not view.has_nar_infos()):
            return stated  # there is nothing that it could contradict
        # Loaded late: an import into a new store never needs the rules of PathInfos.
        from appliance.nix.path_info_rules import accepted  # noqa: PLC0415 - see above

        return accepted(old, stated, _KnownContents(view), may_replace=batch.may_replace_paths)

    def _check_version(self) -> None:
        if self.is_writable:
            self.env.write(self._stamp)
        with self.env.read() as txn:
            version = schema.unpack_number(txn.get(schema.VERSION_KEY, db=self._tables.meta))
        if version != schema.VERSION:
            raise SchemaVersionError(
                f"{self.path}: the store has version {version}; this program reads {schema.VERSION}"
            )

    def _view(self, txn: "ReadTransaction | WriteTransaction") -> Snapshot:
        return Snapshot(self._tables, self.files, txn)

    def _stamp(self, txn: WriteTransaction) -> None:
        version = schema.pack_number(schema.VERSION)
        txn.put(schema.VERSION_KEY, version, db=self._tables.meta, overwrite=False)
        txn.put(schema.ID_KEY, os.urandom(schema.ID_SIZE), db=self._tables.meta, overwrite=False)


class _KnownContents:
    """The contents that a store has; implements `path_info_rules.Known`."""

    def __init__(self, view: Snapshot) -> None:
        self._view = view

    def nar_of(self, key: Digest) -> tuple[int, bytes] | None:
        """See `Known.nar_of`."""
        return self._view.nar_info(key)

    def directory_of(self, digest: Digest) -> "Directory | None":
        """See `Known.directory_of`."""
        from appliance.castore.directory import Directory  # noqa: PLC0415 - as above

        encoded = self._view.directory(digest)
        if encoded is None or Digest.of(encoded) != digest:
            return None
        return Directory.from_bytes(encoded)


def _put_objects(
    txn: WriteTransaction,
    database: lmdb._Database,
    objects: Sequence[tuple[bytes, bytes | memoryview]],
) -> None:
    # Usually all objects are new, and one call puts them. An object that is there with another
    # value was damaged, and is replaced.
    _num_consumed, num_added = txn.cursor(db=database).putmulti(objects, overwrite=False)
    if num_added < len(objects):
        for digest, value in objects:
            if txn.get(digest, db=database) != value:
                txn.put(digest, value, db=database)
