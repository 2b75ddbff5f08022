"""One LMDB environment: growth, disk full, and grown maps, handled in one place.

Rules, each because LMDB cannot detect the breach:

* Open after fork only; an environment must not cross a fork, nor be opened twice in one process.
* A thread has at most one transaction open at a time. Resizing a map moves it, which pulls the
  memory away from under any other transaction of this process: it waits for those of other threads
  to end, and would wait for ever for one of its own. So a nested `read` or `write` is refused
  always, not only on the rare day when the map has to grow.
* A buffer from a read transaction is memory of the map: it dies with the transaction.
"""

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NoReturn, TypeAlias, TypeVar

import lmdb

from appliance.errors import SchemaVersionError, StoreError, StoreFullError
from appliance.store.disk_errors import FULL_ERRNOS

T = TypeVar("T")

# Quoted: the class is generic in its stubs only.
ReadTransaction: TypeAlias = "lmdb.Transaction[memoryview]"
WriteTransaction: TypeAlias = "lmdb.Transaction[bytes]"

_MAX_READERS: Final = 4096
# Less than this left on the file system, and an EIO of LMDB is taken for a full disk.
_FULL_BELOW_BYTES: Final = 1 << 20


class Environment:
    """An open LMDB environment with its named databases.

    Args:
        path: directory of the environment; created (0755) when writable and missing.
        databases: names of all databases in it; created when writable and missing.
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
                path.mkdir(mode=0o755, parents=True, exist_ok=True)
            self._env = lmdb.Environment(
                os.fspath(path),
                map_size=map_size_bytes,
                readonly=is_readonly,
                create=not is_readonly,
                sync=is_durable,
                metasync=is_durable,
                mode=0o644,
                readahead=False,
                max_readers=_MAX_READERS,
                max_dbs=len(databases),
                max_spare_txns=1,
            )
        except (lmdb.Error, OSError) as exc:
            self._raise_translated(exc)
        try:
            self._databases = self._until_it_fits(lambda: self._open_databases(databases))
        except BaseException:
            self._env.close()
            raise

    @contextmanager
    def read(self) -> Iterator[ReadTransaction]:
        """Open a snapshot; its values are views of the map that die with it.

        Raises:
            StoreError: LMDB failed, at the beginning or inside the block.
        """
        txn = self._until_it_fits(self._begin_read)
        try:
            yield txn
        except lmdb.Error as exc:
            self._raise_translated(exc)
        finally:
            txn.abort()
            self._gate.leave()

    def write(self, work: Callable[[WriteTransaction], T]) -> T:
        """Run `work` in the one write transaction, commit, and return what it returned.

        `work` runs again from the start, in a new transaction, whenever the map had to grow: it
        must not change anything outside that a second run would trip over. An exception from it
        aborts. Values it reads are copies.

        Raises:
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

        self._gate.check_outside()
        with self._writing:
            return self._until_it_fits(attempt)

    def database(self, name: bytes) -> lmdb._Database:
        """Return the handle of a database named at opening."""
        return self._databases[name]

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

    def _open_databases(self, names: Sequence[bytes]) -> dict[bytes, lmdb._Database]:
        if self._is_readonly:
            return {name: self._open_database(name) for name in names}
        # Nobody else does while other processes keep the environment open.
        self._env.reader_check()
        with self._env.begin(write=True) as txn:
            return {name: self._env.open_db(name, txn=txn) for name in names}

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
            try:
                self._env.set_mapsize(size_bytes)
            except lmdb.Error as exc:
                self._raise_translated(exc)

    def _raise_translated(self, exc: lmdb.Error | OSError) -> NoReturn:
        code = exc.code if isinstance(exc, lmdb.Error) else exc.errno
        if code in FULL_ERRNOS or (code == errno.EIO and self._is_disk_full()):
            raise StoreFullError(f"{self._path}: the disk is full") from exc
        reason = os.strerror(code) if code and code > 0 else str(exc)
        raise StoreError(f"{self._path}: {reason}") from exc

    def _is_disk_full(self) -> bool:
        # LMDB reports a write that came out short for lack of space as EIO (mdb.c: mdb_page_flush).
        stat = os.statvfs(self._path)
        num_blocks = stat.f_bfree if os.geteuid() == 0 else stat.f_bavail
        return num_blocks * stat.f_frsize < _FULL_BELOW_BYTES


class _Gate:
    """Lets transactions of any number of threads in, or a resize alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_inside = 0
        self._is_closed = False
        self._of_thread = threading.local()

    def check_outside(self) -> None:
        if getattr(self._of_thread, "is_inside", False):
            raise RuntimeError("this thread has a transaction open already")

    def enter(self) -> None:
        self.check_outside()
        with self._changed:
            if self._is_closed:
                self._changed.wait_for(lambda: not self._is_closed)
            self._num_inside += 1
        self._of_thread.is_inside = True

    def leave(self) -> None:
        self._of_thread.is_inside = False
        with self._changed:
            self._num_inside -= 1
            if self._is_closed:
                self._changed.notify_all()

    @contextmanager
    def closed(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._is_closed)
            self._is_closed = True
            self._changed.wait_for(lambda: self._num_inside == 0)
        try:
            yield
        finally:
            with self._changed:
                self._is_closed = False
                self._changed.notify_all()
