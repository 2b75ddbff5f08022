"""One LMDB environment: growth, full disks, grown maps and files that cannot be written.

Rules, each because LMDB cannot detect the breach:

* Open after fork only; an environment must not cross a fork, nor be opened twice in one process.
* A thread has at most one transaction open at a time. Resizing a map moves it, which pulls the
  memory away from under any other transaction of this process: it waits for those of other threads
  to end, and would wait for ever for one of its own. So a nested `read` or `write` is refused
  always, not only on the rare day when the map has to grow.
* A buffer from a read transaction is memory of the map: it dies with the transaction.

Reading without the lock file: a reader has to write to `lock.mdb`, as it is there that writers see
which snapshots are in use, and may not reuse their pages. Where this process cannot write to it (a
read-only file system, a store of somebody else's), it reads unregistered. Nothing can go wrong with
that while nobody writes, as on a file system that is itself read-only. Else a snapshot holds until
the second commit after it: a transaction that was open for longer ends with a SnapshotLostError.
"""

import errno
import os
import resource
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Generic, NoReturn, TypeAlias, TypeVar

import lmdb

from appliance.db import address_space
from appliance.db.data_file import (
    allocate_lock,
    check_data,
    check_pid,
    is_written_by_nobody,
)
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

# A store holds copies of what perhaps only its importer can read, so only its owner and a group may
# enter its directory. What is inside is open to whoever comes in.
DIRECTORY_MODE: Final = 0o750
_MAX_READERS: Final = 4096
# Less than this left on the file system, and an EIO of LMDB is taken for a full disk.
_FULL_BELOW_BYTES: Final = 1 << 20
_NOT_WRITABLE_ERRNOS: Final = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
# Commits that a snapshot outlives though no writer knows of it: LMDB reuses the pages that a
# transaction has freed in the second one after it at the earliest (mdb.c: mdb_page_alloc).
_SAFE_COMMITS: Final = 1


class NotWritableError(StoreError):
    """This process may not write to the environment; it may yet be allowed to read it."""


class Environment:
    """An open LMDB environment with its named databases.

    Args:
        path: directory of the environment; created (0750) when writable and missing.
        databases: names of all databases in it; created when writable and missing.
        newer_databases: the same of some that an earlier release did not make: read-only, one may
            be missing.
        is_readonly: other processes may write meanwhile; `write` is a bug.
        is_durable: a commit survives a power cut. Without it a power cut may leave a broken file:
            only derived data may live there, to be rebuilt after one.
        map_size_bytes: initial size of the map; it grows by doubling.

    Raises:
        SchemaVersionError: read-only, and one of `databases` does not exist.
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
        self._gate = _Gate()
        self._writing = threading.Lock()
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
        """Whether it was opened for reading only."""
        return self._is_readonly

    @property
    def is_locked(self) -> bool:
        """Whether `lock.mdb` is used; any other reader in this process must do the same."""
        return self._is_locked

    def read(self) -> AbstractContextManager[ReadTransaction]:
        """Open a read transaction; its values are views of the map that die with it.

        Raises:
            SnapshotLostError: it was read without a lock, and what came of it is not to be used.
            StoreError: LMDB failed, at the beginning or inside the block.
        """
        return _Reading(self, _itself)

    def read_through(self, view: Callable[[ReadTransaction], V]) -> AbstractContextManager[V]:
        """Open a read transaction as `read` does, and yield the `view` of it."""
        return _Reading(self, view)

    def begin_read(self) -> ReadTransaction:
        """Begin a read transaction that `end_read` must end; `read` does both.

        Raises:
            StoreError: LMDB failed.
        """
        return self._until_it_fits(self._begin_read)

    def end_read(self, txn: ReadTransaction, exc: BaseException | None = None) -> None:
        """End a read transaction in the thread that began it.

        Args:
            txn: from `begin_read`.
            exc: what was raised while it was open; that of LMDB is raised again as a StoreError.

        Raises:
            SnapshotLostError, StoreError: see `read`.
        """
        is_lost = not self._is_registered and self._is_lost(txn)
        txn.abort()
        self._gate.leave()
        if is_lost:
            raise SnapshotLostError(
                f"{self._path}: was written while it was read without its lock.mdb, "
                "which this user cannot write to: read it again"
            )
        if isinstance(exc, lmdb.Error):
            self._raise_translated(exc)

    def write(self, work: Callable[[WriteTransaction], T]) -> T:
        """Run `work` in the one write transaction, commit, and return what it returned.

        `work` runs again from the start, in a new transaction, whenever the map had to grow: it
        must not change anything outside that a second run would trip over. An exception from it
        aborts. Values it reads are copies.

        Raises:
            ReadOnlyStoreError: the environment was opened for reading only.
            StoreFullError: the disk is full; nothing of this transaction is stored.
            StoreError: LMDB failed; nothing of this transaction is stored.
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
        """Return the handle of one of the newer databases, if it is there."""
        return self._databases.get(name)

    def reap_readers(self) -> int:
        """Free the reader slots of dead processes and return how many there were.

        A slot left behind pins the pages of its snapshot, and the file grows with every commit.
        """
        return self._env.reader_check()

    def map_size_bytes(self) -> int:
        """Return the present size of the map."""
        return self._env.info()["map_size"]

    def close(self) -> None:
        """Close; every transaction must have ended."""
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
        # Nobody else does while other processes keep the environment open.
        self._env.reader_check()
        with self._env.begin(write=True) as txn:
            return {name: self._env.open_db(name, txn=txn) for name in (*names, *newer)}

    def _open_database(self, name: bytes) -> lmdb._Database:
        # In a transaction of its own: py-lmdb does not commit a read transaction of ours, and a
        # handle opened in one that is not committed is good for nothing.
        try:
            return self._env.open_db(name, create=False)
        except lmdb.NotFoundError as exc:
            raise SchemaVersionError(
                f"{self._path}: has no database {name.decode()!r}: not of this version"
            ) from exc

    def _until_it_fits(self, attempt: Callable[[], T]) -> T:
        while True:
            try:
                return attempt()
            except lmdb.MapFullError:
                self._resize(self.map_size_bytes() * 2)
            except lmdb.MapResizedError:
                # Another process has grown the file; 0 adopts its size.
                self._resize(0)
            except lmdb.Error as exc:
                self._raise_translated(exc)
            except OSError as exc:  # of the work itself
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
        # LMDB unmaps before it maps, and has no map at all when the latter fails: so that must not.
        present = self.map_size_bytes()
        least = address_space.with_slack((self._path / "data.mdb").stat().st_size)
        for size in (wanted_bytes, max(least, present + present // 8)):
            if size > present and address_space.is_free(
                size - present + address_space.MAP_SLACK_BYTES
            ):
                return size
        raise self._no_address_space(max(least, present))

    def _no_address_space(self, size_bytes: int) -> StoreError:
        return StoreError(
            f"{self._path}: needs {size_bytes} bytes of address space and some more; the limit of "
            f"this process is {resource.getrlimit(resource.RLIMIT_AS)[0]} (RLIMIT_AS)"
        )

    def _raise_translated(self, exc: lmdb.Error | OSError) -> NoReturn:
        code = exc.code if isinstance(exc, lmdb.Error) else exc.errno
        if code == errno.ENOMEM and address_space.is_limited():
            raise self._no_address_space(check_data(self._path)) from exc
        if code == errno.EAGAIN:
            # Another process of this id was faster, after `check_pid`.
            raise PidInUseError(str(self._path / "lock.mdb"), os.getpid()) from exc
        if code in FULL_ERRNOS or (code == errno.EIO and self._is_disk_full()):
            raise StoreFullError(f"{self._path}: the disk is full") from exc
        reason = os.strerror(code) if code and code > 0 else str(exc)
        where = exc.filename if isinstance(exc, OSError) and exc.filename else self._path
        is_refused = code in _NOT_WRITABLE_ERRNOS and not self._is_readonly
        raise (NotWritableError if is_refused else StoreError)(f"{where}: {reason}") from exc

    def _is_disk_full(self) -> bool:
        # LMDB reports a write that came out short for lack of space as EIO (mdb.c: mdb_page_flush).
        stat = os.statvfs(self._path)
        num_blocks = stat.f_bfree if os.geteuid() == 0 else stat.f_bavail
        return num_blocks * stat.f_frsize < _FULL_BELOW_BYTES


class _Reading(Generic[V]):
    # A class, as a generator with `contextmanager` costs several times as much, and each batch of
    # a guest's requests opens a transaction.

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


def _itself(txn: ReadTransaction) -> ReadTransaction:
    return txn


class _Gate:
    """Lets transactions of any number of threads in, or a resize alone."""

    def __init__(self) -> None:
        # Entered by itself: what a condition adds to it costs as much as beginning a transaction.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._num_inside = 0
        self._is_closed = False
        self._of_thread = threading.local()

    def check_outside(self) -> None:
        if getattr(self._of_thread, "is_inside", False):
            raise RuntimeError("this thread has a transaction open already")

    def enter(self) -> None:
        self.check_outside()
        with self._lock:
            if self._is_closed:
                self._changed.wait_for(lambda: not self._is_closed)
            self._num_inside += 1
        self._of_thread.is_inside = True

    def leave(self) -> None:
        self._of_thread.is_inside = False
        with self._lock:
            self._num_inside -= 1
            if self._is_closed:
                self._changed.notify_all()

    @contextmanager
    def closed(self) -> Iterator[None]:
        with self._lock:
            self._changed.wait_for(lambda: not self._is_closed)
            self._is_closed = True
            self._changed.wait_for(lambda: self._num_inside == 0)
        try:
            yield
        finally:
            with self._lock:
                self._is_closed = False
                self._changed.notify_all()
