"""Commits of concurrent tasks, gathered: what arrives during one commit makes up the next."""

import asyncio
import itertools
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from appliance.errors import ApplianceError, ReadOnlyStoreError
from appliance.store.batch import Batch
from appliance.store.store import Store
from appliance.store.temp_directory import TempDirectory

# So that one commit neither takes long nor holds many dirty pages.
_COMMIT_BYTES: Final = 16 << 20


class _Waiting(NamedTuple):
    batch: Batch
    future: Future[None]

    def end(self, refused: Mapping[bytes, ApplianceError]) -> None:
        """Tell who waits that it was committed, or what of it was refused."""
        error = next((refused[path] for path in self.batch.path_infos if path in refused), None)
        if error is None:
            self.future.set_result(None)
        else:
            self.future.set_exception(error)


class CommitQueue:
    """A thread that commits to `store`; it is the writer of this process."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._changed = threading.Condition()
        self._waiting: list[_Waiting] = []
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="commit")
        self._thread.start()

    def submit(self, batch: Batch) -> Future[None]:
        """Commit `batch`, with others perhaps; the future fails as `Store.commit` does."""
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()  # the batch is taken over: too late to cancel
        with self._changed:
            if self._is_closing:
                raise RuntimeError("the store is being closed")
            self._waiting.append(_Waiting(batch, future))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Commit what waits, and end the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while group := self._next_group():
            merged = Batch()
            for item in group:
                merged.merge(item.batch)
            try:
                refused = self._store.commit_accepted(merged)
            except BaseException as exc:  # noqa: BLE001 - whatever it was, those who wait must know
                for item in group:
                    item.future.set_exception(exc)
            else:
                for item in group:
                    item.end(refused)

    def _next_group(self) -> list[_Waiting]:
        # Empty when closing and all is done.
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closing)
            size_bytes = 0
            num_items = 0
            paths: set[bytes] = set()
            for item in self._waiting:
                if num_items and size_bytes + item.batch.size_bytes > _COMMIT_BYTES:
                    break
                # Of two PathInfos of one path, the second is put when the first is there.
                if not paths.isdisjoint(item.batch.path_infos):
                    break
                paths.update(item.batch.path_infos)
                size_bytes += item.batch.size_bytes
                num_items += 1
            group = self._waiting[:num_items]
            del self._waiting[:num_items]
            return group


# --- A store used from an event loop: reading in a few threads, committing in one.

T = TypeVar("T")

_NUM_READERS: Final = 4


class AsyncStore:
    """An open store with its threads; one per store and process."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._readers = ThreadPoolExecutor(_NUM_READERS, "store")
        self._commits = CommitQueue(store) if store.is_writable else None
        self._temp: TempDirectory | None = None
        self._temp_lock = threading.Lock()
        self._temp_numbers = itertools.count()

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        is_readonly: bool = False,
        create: bool = False,
        or_readonly: bool = False,
    ) -> "AsyncStore":
        """Open the store in the directory `path`, as `Store.open` does.

        Raises:
            StoreError: it does not exist (and `create` is not set), or cannot be opened.
        """
        return cls(
            Store.open(path, is_readonly=is_readonly, create=create, or_readonly=or_readonly)
        )

    async def run(self, work: Callable[[], T]) -> T:
        """Run `work` in a reading thread; it may open one transaction at a time.

        It has ended when this returns, also when this is cancelled: what it uses can be closed.
        """
        future = asyncio.get_running_loop().run_in_executor(self._readers, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait({future})
            raise

    async def commit(self, batch: Batch) -> None:
        """Make `batch` durable and visible.

        Raises:
            ReadOnlyStoreError: the store was opened for reading only.
            StoreError: nothing of it is; the disk may be full.
        """
        if self._commits is None:
            batch.discard()
            raise ReadOnlyStoreError(f"{self.store.path}: opened for reading only")
        await asyncio.shield(asyncio.wrap_future(self._commits.submit(batch)))

    def temp_directory(self) -> Path:
        """Return a directory for temporary files, on the file system of the store."""
        with self._temp_lock:
            if self._temp is None:
                self._temp = TempDirectory(self.store.path)
            return self._temp.path

    def new_temp_path(self) -> Path:
        """Return the path of a temporary file to create."""
        return self.temp_directory() / str(next(self._temp_numbers))

    def close(self) -> None:
        """Finish all commits and close the store."""
        self._readers.shutdown()
        if self._commits is not None:
            self._commits.close()
        if self._temp is not None:
            self._temp.close()
        self.store.close()
