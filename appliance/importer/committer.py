"""Committing what an import produces, beside the import."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, Protocol, Self

from appliance.castore.store_path import StorePath
from appliance.store.batch import Batch

# Large enough that commits are few, small enough that the disk is busy early and memory is not.
_COMMIT_BYTES: Final = 16 << 20


class Sink(Protocol):
    """What takes in an import: a store, or services."""

    def commit(self, batch: Batch) -> None:
        """Make everything in `batch` durable; takes over its files in any case.

        Raises:
            StoreError: it cannot; no path in `batch` is visible.
        """


class Committer:
    """Gathers objects, and commits them in a thread, one batch at a time.

    The sink is its own while it is open. A commit that failed is raised by the next call that
    waits for one; nothing is committed after it.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="commit")
        # Of the paths that are complete, and of the one in hand.
        self._complete = Batch()
        self.batch = Batch()
        self._complete_paths: list[StorePath] = []
        self._commit: Future[None] | None = None
        self._committing_paths: list[StorePath] = []
        self._durable_paths: list[StorePath] = []
        self._blobs_sent: set[bytes] = set()

    def has_blob(self, digest: bytes) -> bool:
        """Whether the blob was gathered or committed before."""
        return digest in self._blobs_sent or digest in self.batch or digest in self._complete

    def commit_if_large(self) -> None:
        """Begin a commit if enough has been gathered; waits for the one before it."""
        if self.batch.size_bytes + self._complete.size_bytes >= _COMMIT_BYTES:
            self._complete.merge(self.batch)
            self.batch = Batch()
            self._begin_commit()

    def complete(self, path: StorePath, path_info: bytes) -> None:
        """End the path in hand: all its objects have been gathered."""
        self.batch.add_path_info(path.digest, path_info)
        self._complete.merge(self.batch)
        self.batch = Batch()
        self._complete_paths.append(path)
        self.commit_if_large()

    def abandon(self) -> None:
        """Forget what was gathered of the path in hand.

        What a large commit took along already stays: whole blobs and directories that no path has.
        """
        self.batch.discard()
        self.batch = Batch()

    def durable_paths(self) -> Iterator[StorePath]:
        """Yield each path once that has been committed."""
        if self._commit is not None and self._commit.done():
            self._end_commit()
        while self._durable_paths:
            yield self._durable_paths.pop(0)

    def flush(self) -> None:
        """Commit all that is complete, and wait for it."""
        self._begin_commit()
        self._end_commit()

    def close(self) -> None:
        """Wait for the commit under way, and remove what is left."""
        self._executor.shutdown(wait=True)
        self._complete.discard()
        self.batch.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _begin_commit(self) -> None:
        self._end_commit()
        batch, self._complete = self._complete, Batch()
        self._blobs_sent.update(batch.blobs, batch.files)
        self._committing_paths, self._complete_paths = self._complete_paths, []
        self._commit = self._executor.submit(self._sink.commit, batch)

    def _end_commit(self) -> None:
        if self._commit is not None:
            commit, self._commit = self._commit, None
            commit.result()
            self._durable_paths += self._committing_paths
            self._committing_paths = []
