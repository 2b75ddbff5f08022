"""Group commit: the writes of concurrent tasks, committed together by one thread per process.

Every commit waits for the disk, however little it writes, so a hundred small commits take far
longer than one commit of the same objects. No timer gathers them: while the thread is busy with one
commit, new batches queue up, and together they make up the next one. So the batch of a lone task is
committed at once, and concurrent tasks share commits.

    submit a, b, c ...   ->  waiting: [a] [b] [c] ...
    the thread           ->  takes a group from the front, merges it, commits it, ends its futures

What keeps the tasks of one group apart:

* A group ends at 16 MiB, so that no commit takes long or holds many dirty pages in memory.
* A group has at most one PathInfo for each store path: `Batch.merge` would keep only the last. The
  second one waits for the next group, where the rules compare it with the first as stored.
* A PathInfo that is refused fails its own task alone; everything else in the group is committed,
  including the other objects of the same batch. If the disk fails, nothing in the group is stored
  and every task in it fails.

Objects are named by digests of their contents, so merging batches that have objects in common is
safe. `AsyncStore` puts the queue and a few reading threads behind coroutines, for services on an
event loop, which must not block in LMDB or in reading blob files.
"""

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

T = TypeVar("T")

# The size at which a group ends; a single larger batch is a group of its own.
_COMMIT_BYTES: Final = 16 << 20
_NUM_READERS: Final = 4


# --- The queue ---


class _Waiting(NamedTuple):
    batch: Batch
    future: Future[None]

    def end(self, refused: Mapping[bytes, ApplianceError]) -> None:
        """End the future, with an error if one of the batch's PathInfos was refused."""
        error = next((refused[path] for path in self.batch.path_infos if path in refused), None)
        if error is None:
            self.future.set_result(None)
        else:
            self.future.set_exception(error)


class CommitQueue:
    """Commits batches to `store`, in a thread of its own."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._changed = threading.Condition()
        self._waiting: list[_Waiting] = []
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="commit")
        self._thread.start()

    def submit(self, batch: Batch) -> Future[None]:
        """Take over `batch` and commit it, perhaps together with others.

        Returns:
            A future that ends when the batch is committed, and fails with the errors of
            `Store.commit`. It cannot be cancelled.
        """
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()  # makes `cancel` refuse
        with self._changed:
            if self._is_closing:
                raise RuntimeError("the store is being closed")
            self._waiting.append(_Waiting(batch, future))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Commit all that waits, and end the thread."""
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
            except BaseException as exc:  # noqa: BLE001 - passed on to every waiting task
                for item in group:
                    item.future.set_exception(exc)
            else:
                for item in group:
                    item.end(refused)

    def _next_group(self) -> list[_Waiting]:
        # Waits for one; an empty group means that the queue is closed and drained.
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closing)
            size_bytes = 0
            num_items = 0
            paths: set[bytes] = set()
            for item in self._waiting:
                if num_items and size_bytes + item.batch.size_bytes > _COMMIT_BYTES:
                    break
                if not paths.isdisjoint(item.batch.path_infos):
                    break
                paths.update(item.batch.path_infos)
                size_bytes += item.batch.size_bytes
                num_items += 1
            group = self._waiting[:num_items]
            del self._waiting[:num_items]
            return group


# --- A store on an event loop ---


class AsyncStore:
    """An open store with its threads: a few that read, and one that commits.

    A process has at most one for each store. `store` is closed with it.
    """

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
        """Open the store in the directory `path`; the arguments are those of `Store.open`.

        Raises:
            StoreError: the store does not exist (and `create` is not set), or cannot be opened.
        """
        return cls(
            Store.open(path, is_readonly=is_readonly, create=create, or_readonly=or_readonly)
        )

    async def run(self, work: Callable[[], T]) -> T:
        """Run `work` in a reading thread and return its result; it may open snapshots in turn.

        This returns only when `work` has ended, even if it is cancelled, so that the caller can
        then close what `work` uses.
        """
        import asyncio  # noqa: PLC0415 - it is slow to load, and commands without a loop are short

        future = asyncio.get_running_loop().run_in_executor(self._readers, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait({future})
            raise

    async def commit(self, batch: Batch) -> None:
        """Take over `batch` and make it durable and visible.

        Cancelling this does not stop the commit.

        Raises:
            ReadOnlyStoreError: the store was opened for reading only.
            StoreError: nothing in the batch is stored; the disk may be full.
            AlreadyExistsError, PathInfoError: see `Store.commit`.
        """
        import asyncio  # noqa: PLC0415 - as above

        await asyncio.shield(asyncio.wrap_future(self._submit(batch)))

    def commit_and_wait(self, batch: Batch) -> None:
        """Do the same as `commit`, for callers without an event loop."""
        self._submit(batch).result()

    def _submit(self, batch: Batch) -> Future[None]:
        if self._commits is None:
            batch.discard()
            raise ReadOnlyStoreError(f"{self.store.path}: opened for reading only")
        return self._commits.submit(batch)

    def temp_directory(self) -> Path:
        """Return a directory for temporary files, on the file system of the store."""
        with self._temp_lock:
            if self._temp is None:
                self._temp = TempDirectory(self.store.path)
            return self._temp.path

    def new_temp_path(self) -> Path:
        """Return the path of a temporary file, which the caller creates."""
        return self.temp_directory() / str(next(self._temp_numbers))

    def close(self) -> None:
        """Finish all reads and commits, remove the temporary files, and close the store."""
        self._readers.shutdown()
        if self._commits is not None:
            self._commits.close()
        if self._temp is not None:
            self._temp.close()
        self.store.close()
