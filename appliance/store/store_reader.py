"""Reading a store through the C module, in a worker.

A process may use only one LMDB library. Two would not know of each other's locks on `lock.mdb`, and
the first one to close that file would drop the locks of the other. The C code that answers plain
requests uses the system's library. Therefore the Python handler of the same worker reads through
it, too, and a worker that has a `StoreReader` opens no `Environment`.
"""

import errno
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NoReturn, TypeAlias, cast

from appliance._engine import ffi, lib
from appliance.db import address_space
from appliance.db.data_file import allocate_lock, check_data, check_pid, is_written_by_nobody
from appliance.errors import PidInUseError, SchemaVersionError, SnapshotLostError, StoreError
from appliance.store import schema
from appliance.store.blob_files import BlobFile, BlobFiles
from appliance.store.snapshot import Snapshot, Tables
from appliance.store.store import Store

_MAX_READERS: Final = 4096
_NOT_WRITABLE_ERRNOS: Final = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
# See `db.environment`: commits that a snapshot outlives though no writer knows of it.
_SAFE_COMMITS: Final = 1


class StoreReader:
    """One store, open for reading only, for use by one thread; see `Environment` for the rules.

    Args:
        path: the directory of the store.
        map_size_bytes: the initial size of the map.

    Raises:
        SchemaVersionError: the store has another version.
        StoreError: the store does not exist or cannot be opened.
    """

    def __init__(self, path: Path, *, map_size_bytes: int = 1 << 30) -> None:
        self.path = path
        self._value = ffi.new("struct eng_bytes *")
        self.cdata = ffi.new("struct eng_store *")
        try:
            data_size = check_data(path)
            if data_size == 0:
                raise StoreError(f"{path}: no store there")
            is_locked = _prepare_lock(path)
            self.is_registered = is_locked or is_written_by_nobody(path)
            self.files = BlobFiles(path)
            # A worker that has changed its user cannot look at the file by its path any more.
            self._data_fd = os.open(path / "data.mdb", os.O_PATH | os.O_CLOEXEC)
        except OSError as exc:
            raise StoreError(f"{exc.filename or path}: {exc.strerror}") from exc
        map_size = address_space.map_size(map_size_bytes, data_size)
        code = lib.eng_store_open(self.cdata, os.fsencode(path), map_size, _MAX_READERS, is_locked)
        if code:
            self.files.close()
            os.close(self._data_fd)
            self._raise(code)
        self._reading = _Reading(self, Snapshot(_TABLES, self.files, cast("Any", self)))
        try:
            self._check_version()
        except BaseException:
            self.close()
            raise

    def snapshot(self) -> "_Reading":
        """Return a context that opens a snapshot; there is one snapshot at a time.

        Raises:
            SnapshotLostError: what was read must not be used, since it was read without a lock and
                may have been overwritten.
            StoreError: LMDB failed.
        """
        return self._reading

    def open_blob(self, blob: BlobFile) -> int:
        """See `Store.open_blob`."""
        return self.files.open(blob.digest)

    def get(self, key: bytes, default: None, table: int) -> memoryview | None:
        """Return a value, valid until the snapshot ends; `Snapshot` calls this.

        Raises:
            StoreError: LMDB failed.
        """
        found = lib.eng_store_get(self.cdata, table, key, len(key), self._value)
        if found == 0:
            return default
        if found != 1:
            self._raise(found)
        return memoryview(ffi.buffer(self._value.at, self._value.size)).toreadonly()

    def begin(self) -> None:
        """Open a snapshot; `end` closes it."""
        code = lib.eng_store_begin(self.cdata)
        while code == lib.ENG_STORE_RESIZED:
            self._resize()
            code = lib.eng_store_begin(self.cdata)
        if code:
            self._raise(code)

    def end(self) -> None:
        """Close the snapshot.

        Raises:
            SnapshotLostError: see `snapshot`.
        """
        is_lost = not self.is_registered and lib.eng_store_commits_since(self.cdata) > _SAFE_COMMITS
        lib.eng_store_end(self.cdata)
        if is_lost:
            raise SnapshotLostError(
                f"{self.path}: was written while it was read without its lock.mdb, "
                "which this user cannot write to: read it again"
            )

    def close(self) -> None:
        """Close; no snapshot may be open."""
        lib.eng_store_close(self.cdata)
        self.files.close()
        os.close(self._data_fd)

    def _check_version(self) -> None:
        with self._reading:
            version = schema.unpack_number(self.get(schema.VERSION_KEY, None, lib.ENG_META))
        if version != schema.VERSION:
            raise SchemaVersionError(
                f"{self.path}: the store has version {version}; this program reads {schema.VERSION}"
            )

    def _resize(self) -> None:
        # Another process has grown the file; 0 adopts its size.
        size = self._limited_size() if address_space.is_limited() else 0
        code = lib.eng_store_resize(self.cdata, size)
        if code:
            self._raise(code)

    def _limited_size(self) -> int:
        present = lib.eng_store_map_size(self.cdata)
        size = address_space.with_slack(os.fstat(self._data_fd).st_size)
        grown = size - present + address_space.MAP_SLACK_BYTES
        if grown > 0 and not address_space.is_free(grown):
            raise StoreError(f"{self.path}: needs {size} bytes of address space and some more")
        return size

    def _raise(self, code: int) -> NoReturn:
        if code == errno.EAGAIN:
            # A process with the same id has registered since `check_pid`.
            raise PidInUseError(str(self.path / "lock.mdb"), os.getpid())
        reason = ffi.string(lib.eng_store_error(code)).decode()
        if code == lib.ENG_STORE_NOT_FOUND:
            raise SchemaVersionError(f"{self.path}: a database is missing: not of this version")
        raise StoreError(f"{self.path}: {reason}")


ReadableStore: TypeAlias = Store | StoreReader

# What `Snapshot` hands on to `get`.
_TABLES: Final = cast(
    "Any",
    Tables(
        *cast(
            "Any",
            (
                lib.ENG_META,
                lib.ENG_BLOBS,
                lib.ENG_DIRECTORIES,
                lib.ENG_IMAGES,
                lib.ENG_PATH_INFOS,
                lib.ENG_PATH_INFO_LOG,
                lib.ENG_NAR_INFOS,
            ),
        )
    ),
)


class _Reading:
    __slots__ = ("_reader", "_snapshot")

    def __init__(self, reader: StoreReader, snapshot: Snapshot) -> None:
        self._reader = reader
        self._snapshot = snapshot

    def __enter__(self) -> Snapshot:
        self._reader.begin()
        return self._snapshot

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._reader.end()


def _prepare_lock(path: Path) -> bool:
    try:
        allocate_lock(path, _MAX_READERS)
        check_pid(path)
    except OSError as exc:
        if exc.errno in _NOT_WRITABLE_ERRNOS:
            return False
        raise
    return True
