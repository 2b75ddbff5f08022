"""A store used from an event loop: reading in a few threads, committing in one."""

import asyncio
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

from appliance.errors import ReadOnlyStoreError
from appliance.store.batch import Batch
from appliance.store.commit_queue import CommitQueue
from appliance.store.store import Store
from appliance.store.temp_directory import TempDirectory

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
