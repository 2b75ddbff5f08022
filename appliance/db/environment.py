"""One LMDB environment, and how it copes with growth, full disks and files it may not write.

Rules, each of which LMDB cannot enforce itself:

* An environment must not cross a fork, so it is opened after the fork; and a process must not have
  one open twice.
* A thread has at most one transaction open at a time. Resizing the map moves it, which pulls the
  memory away from under every open transaction of the process. A resize therefore waits until the
  transactions of other threads have ended, and would wait for ever for one of its own thread. So a
  nested `read` or `write` is always refused, not only on the rare occasion when the map must grow.
* A buffer from a read transaction is memory of the map, and valid until the transaction ends.

Reading without the lock file. A reader registers its snapshot in `lock.mdb`, and writers do not
reuse the pages of snapshots that are registered there. A process that may not write to `lock.mdb`
(on a read-only file system, or in another user's store) reads without registering. That is safe as
long as nobody writes, and nobody can if the file system itself is read-only. Otherwise the pages of
an unregistered snapshot stay intact until the second commit after it; if a transaction was open for
longer, it ends with a SnapshotLostError, and its results must not be used.
"""

import errno
import os
import resource
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Generic, NamedTuple, NoReturn, TypeAlias, TypeVar

import lmdb

from appliance.db import address_space
from appliance.db.data_file import (
    allocate_lock,
    check_data,
    check_pid,
    is_written_by_nobody,
)
from appliance.db.resident_pages import limit_pages
from appliance.db.transaction_gate import TransactionGate
from appliance.errors import (
    FULL_ERRNOS,
    PidInUseError,
    ReadOnlyStoreError,
    SchemaVersionError,
    SnapshotLostError,
    StoreError,
    StoreFullError,
)

T = TypeVar("T")

# Quoted: the class is generic in its stubs only.
V = TypeVar("V")

ReadTransaction: TypeAlias = "lmdb.Transaction[memoryview]"
WriteTransaction: TypeAlias = "lmdb.Transaction[bytes]"

# A store holds copies of files that perhaps only their importer may read, so only the owner and the
# group may enter its directory. The files inside are readable by everyone who can enter.
DIRECTORY_MODE: Final = 0o750
_MAX_READERS: Final = 4096
# If the file system has less free space than this, an EIO from LMDB means that the disk is full.
_FULL_BELOW_BYTES: Final = 1 << 20
_NOT_WRITABLE_ERRNOS: Final = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
# Commits that an unregistered snapshot survives: LMDB reuses the pages that a transaction has freed
# in the second transaction after it, at the earliest (mdb.c: mdb_page_alloc).
_SAFE_COMMITS: Final = 1


class EnvironmentFigures(NamedTuple):
    """How large an environment is, and how much of it is used."""

    map_bytes: int
    used_bytes: int
    """Of the file, pages included that later commits will use again."""
    num_readers: int
    """Slots of `lock.mdb` that are in use, or were in use at one time."""
    readers_max: int
    entries: dict[str, int]
    """The number of entries of each database."""


class NotWritableError(StoreError):
    """This process may not write to the environment, though it may be able to read it."""


class Environment:
    """An open LMDB environment with its named databases.

    Args:
        path: directory of the environment; created (0750) when writable and missing.
        databases: names of its databases; created when writable and missing.
        newer_databases: names of further databases, which an earlier release did not create; when
            opened for reading only, they may be missing.
        is_readonly: open for reading only, so that `write` fails; other processes may write
            meanwhile.
        is_durable: whether a commit survives a power cut. If not, a power cut may leave a corrupt
            file, so that only data that can be rebuilt may be kept there.
        map_size_bytes: initial size of the map; it grows by doubling.

    Raises:
        SchemaVersionError: opened for reading only, and one of `databases` does not exist.
        StoreFullError: the disk is full.
        StoreError: the environment cannot be opened.
    """

    def __init__(
        self,
        path: Path,
        *,
        databases: Sequence[bytes],
        newer_databases: Sequence[bytes] = (),
        is_readonly: bool,
        is_durable: bool,
        map_size_bytes: int = 1 << 30,
    ) -> None:
        self._path = path
        self._is_readonly = is_readonly
        self._gate = TransactionGate()
        self._writing = threading.Lock()
        self._is_open = False
        try:
            if not is_readonly:
                path.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
            data_size = check_data(path)
            if is_readonly and data_size == 0:
                raise StoreError(f"{path}: {os.strerror(errno.ENOENT)}")
            self._is_locked = self._prepare_lock()
            self._is_registered = self._is_locked or is_written_by_nobody(path)
            self._env = lmdb.Environment(
                os.fspath(path),
                map_size=address_space.map_size(map_size_bytes, data_size),
                readonly=is_readonly,
                create=not is_readonly,
                sync=is_durable,
                metasync=is_durable,
                mode=0o644,
                readahead=False,
                max_readers=_MAX_READERS,
                max_dbs=len(databases) + len(newer_databases),
                max_spare_txns=1,
                lock=self._is_locked,
            )
            self._is_open = True
        except (lmdb.Error, OSError) as exc:
            self._raise_translated(exc)
        try:
            self._databases = self._until_it_fits(
                lambda: self._open_databases(databases, newer_databases)
            )
        except BaseException:
            self._env.close()
            raise

    @property
    def is_readonly(self) -> bool:
        """Whether the environment was opened for reading only."""
        return self._is_readonly

    @property
    def is_locked(self) -> bool:
        """Whether `lock.mdb` is used; other readers in this process must then use it too."""
        return self._is_locked

    def read(self) -> AbstractContextManager[ReadTransaction]:
        """Open a read transaction; its values are views of the map, valid until it ends.

        Raises:
            SnapshotLostError: raised at the end of the block: the transaction was not registered
                in `lock.mdb`, and nothing that was read in it may be used.
            StoreError: LMDB failed, at the beginning or inside the block.
        """
        return _Reading(self, _itself)

    def read_through(self, view: Callable[[ReadTransaction], V]) -> AbstractContextManager[V]:
        """Open a read transaction like `read`, but enter the block with `view(transaction)`."""
        return _Reading(self, view)

    def begin_read(self) -> ReadTransaction:
        """Begin a read transaction, which `end_read` must end; `read` does both.

        Raises:
            StoreError: LMDB failed.
        """
        try:
            return self._begin_read()
        except lmdb.Error:  # most often a map that another process has grown
            return self._until_it_fits(self._begin_read)

    def end_read(self, txn: ReadTransaction, exc: BaseException | None = None) -> None:
        """End a read transaction in the thread that began it.

        Args:
            txn: a transaction from `begin_read`.
            exc: the exception that the caller failed with; one from LMDB is raised as a StoreError.

        Raises:
            SnapshotLostError, StoreError: see `read`.
        """
        is_lost = not self._is_registered and self._is_lost(txn)
        txn.abort()
        self._gate.leave()
        if is_lost:
            raise SnapshotLostError(
                f"{self._path}: was written while it was read without its lock.mdb, "
                "which this user cannot write to; read it again"
            )
        if exc is not None and isinstance(exc, lmdb.Error):
            self._raise_translated(exc)

    def write(self, work: Callable[[WriteTransaction], T]) -> T:
        """Run `work` in a write transaction, commit it, and return the result of `work`.

        There is one write transaction at a time, in all processes. Whenever the map must grow,
        `work` runs again from the start in a new transaction, so its effects outside of the
        environment must bear repetition. An exception from `work` aborts the transaction. Values
        that `work` reads are copies.

        Raises:
            ReadOnlyStoreError: the environment was opened for reading only.
            StoreFullError: the disk is full; the transaction was aborted.
            StoreError: LMDB failed; the transaction was aborted.
        """

        def attempt() -> T:
            self._gate.enter()
            try:
                with self._env.begin(write=True) as txn:
                    return work(txn)
            finally:
                self._gate.leave()

        if self._is_readonly:
            raise ReadOnlyStoreError(f"{self._path}: opened for reading only")
        self._gate.check_outside()
        with self._writing:
            return self._until_it_fits(attempt)

    def database(self, name: bytes) -> lmdb._Database:
        """Return the handle of a database named at opening."""
        return self._databases[name]

    def newer_database(self, name: bytes) -> lmdb._Database | None:
        """Return the handle of one of the newer databases, or None if it does not exist."""
        return self._databases.get(name)

    def reap_readers(self) -> int:
        """Free the reader slots of dead processes, and return their number.

        Such a slot pins the pages of its snapshot, and the file then grows with every commit.
        """
        return self._env.reader_check()

    def map_size_bytes(self) -> int:
        """Return the current size of the map."""
        return self._env.info()["map_size"]

    def figures(self) -> EnvironmentFigures:
        """Return the sizes as of now; this reads a page for each database.

        Raises:
            StoreError: LMDB failed.
        """
        with self.read() as txn:
            entries = {
                name.decode(): txn.stat(database)["entries"]
                for name, database in self._databases.items()
            }
        info = self._env.info()
        return EnvironmentFigures(
            map_bytes=info["map_size"],
            used_bytes=(info["last_pgno"] + 1) * self._env.stat()["psize"],
            num_readers=info["num_readers"],
            readers_max=info["max_readers"],
            entries=entries,
        )

    def limit_pages(self) -> None:
        """Take the map's pages out of this process, if they are many; see `resident_pages`."""
        limit_pages(self._path / "data.mdb")

    def unused_bytes(self) -> int:
        """Return about how many bytes of the file later commits will use before it grows.

        Pages of the database of free pages count as unused.
        """
        info, stat = self._env.info(), self._env.stat()
        used = _pages(stat)
        with self.read() as txn:
            used += sum(_pages(txn.stat(database)) for database in self._databases.values())
        return max(0, info["last_pgno"] + 1 - used) * stat["psize"]

    def close(self) -> None:
        """Close the environment; every transaction must have ended."""
        self._env.close()

    def _prepare_lock(self) -> bool:
        try:
            allocate_lock(self._path, _MAX_READERS)
            check_pid(self._path)
        except OSError as exc:
            if self._is_readonly and exc.errno in _NOT_WRITABLE_ERRNOS:
                return False
            raise
        return True

    def _is_lost(self, txn: ReadTransaction) -> bool:
        return self._env.info()["last_txnid"] > txn.id() + _SAFE_COMMITS

    def _begin_read(self) -> ReadTransaction:
        self._gate.enter()
        try:
            try:
                return self._env.begin(buffers=True)
            except lmdb.ReadersFullError:
                self._env.reader_check()
                return self._env.begin(buffers=True)
        except BaseException:
            self._gate.leave()
            raise

    def _open_databases(
        self, names: Sequence[bytes], newer: Sequence[bytes]
    ) -> dict[bytes, lmdb._Database]:
        if self._is_readonly:
            opened = {name: self._open_database(name) for name in names}
            for name in newer:
                with suppress(SchemaVersionError):
                    opened[name] = self._open_database(name)
            return opened
        # LMDB itself does this only when no process has the environment open.
        self._env.reader_check()
        with self._env.begin(write=True) as txn:
            return {name: self._env.open_db(name, txn=txn) for name in (*names, *newer)}

    def _open_database(self, name: bytes) -> lmdb._Database:
        # Without a read transaction of ours: py-lmdb would not commit it, and a handle that was
        # opened in an uncommitted transaction is invalid.
        try:
            return self._env.open_db(name, create=False)
        except lmdb.NotFoundError as exc:
            raise SchemaVersionError(
                f"{self._path}: database {name.decode()!r} is missing; the version is another one"
            ) from exc

    def _until_it_fits(self, attempt: Callable[[], T]) -> T:
        while True:
            try:
                return attempt()
            except lmdb.MapFullError:
                self._resize(self.map_size_bytes() * 2)
            except lmdb.MapResizedError:
                # Another process has grown the map; 0 adopts its size.
                self._resize(0)
            except lmdb.Error as exc:
                self._raise_translated(exc)
            except OSError as exc:  # from `work`, not from LMDB
                if exc.errno not in FULL_ERRNOS:
                    raise
                self._raise_translated(exc)

    def _resize(self, size_bytes: int) -> None:
        with self._gate.closed():
            if address_space.is_limited():
                size_bytes = self._limited_size(size_bytes)
            try:
                self._env.set_mapsize(size_bytes)
            except lmdb.Error as exc:
                self._raise_translated(exc)

    def _limited_size(self, wanted_bytes: int) -> int:
        # LMDB unmaps the old map before it maps the new one. If that failed, no map would be left;
        # so it is tested first whether there is room for the new one.
        present = self.map_size_bytes()
        least = address_space.with_slack(self._used_bytes())
        for size in (wanted_bytes, max(least, present + present // 8)):
            if size > present and address_space.is_free(
                size - present + address_space.MAP_SLACK_BYTES
            ):
                return size
        raise self._no_address_space(max(least, present))

    def _used_bytes(self) -> int:
        # A worker that has given up its user can no longer look at the file by its path.
        if not self._is_open:
            return check_data(self._path)
        return (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"]

    def _no_address_space(self, size_bytes: int) -> StoreError:
        return StoreError(
            f"{self._path}: needs more than {size_bytes} bytes of address space, but the limit of "
            f"this process is {resource.getrlimit(resource.RLIMIT_AS)[0]} bytes (RLIMIT_AS)"
        )

    def _raise_translated(self, exc: lmdb.Error | OSError) -> NoReturn:
        code = exc.code if isinstance(exc, lmdb.Error) else exc.errno
        if code == errno.ENOMEM and address_space.is_limited():
            raise self._no_address_space(self._used_bytes()) from exc
        if code == errno.EAGAIN:
            # After `check_pid`, a process with the same id in another PID namespace took the lock.
            raise PidInUseError(str(self._path / "lock.mdb"), os.getpid()) from exc
        if code in FULL_ERRNOS or (
            code == errno.EIO and not self._is_readonly and self._is_disk_full()
        ):
            raise StoreFullError(f"{self._path}: the disk is full") from exc
        reason = os.strerror(code) if code and code > 0 else str(exc)
        where = exc.filename if isinstance(exc, OSError) and exc.filename else self._path
        is_refused = code in _NOT_WRITABLE_ERRNOS and not self._is_readonly
        raise (NotWritableError if is_refused else StoreError)(f"{where}: {reason}") from exc

    def _is_disk_full(self) -> bool:
        # LMDB reports a write that was cut short by a full disk as EIO (mdb.c: mdb_page_flush).
        stat = os.statvfs(self._path)
        num_blocks = stat.f_bfree if os.geteuid() == 0 else stat.f_bavail
        return num_blocks * stat.f_frsize < _FULL_BELOW_BYTES


class _Reading(Generic[V]):
    # A class rather than a generator with `contextmanager`, which takes several times as long: each
    # batch of a guest's requests opens a transaction.

    __slots__ = ("_env", "_txn", "_view")

    _txn: ReadTransaction

    def __init__(self, env: Environment, view: Callable[[ReadTransaction], V]) -> None:
        self._env = env
        self._view = view

    def __enter__(self) -> V:
        self._txn = self._env.begin_read()
        return self._view(self._txn)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._env.end_read(self._txn, exc)


def _pages(stat: "lmdb._StatDict") -> int:
    return stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]


def _itself(txn: ReadTransaction) -> ReadTransaction:
    return txn
