"""Committing what an import produces, in a thread beside the import."""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Final, NamedTuple, Protocol

from appliance.castore.digest import Digest
from appliance.castore.size_dialect import SizeDialect
from appliance.errors import ApplianceError, StoreError, StoreFullError, disk_error
from appliance.importer.hasher_pool import Hasher
from appliance.importer.importer import Progress
from appliance.importer.records import (
    HASH_RECORD,
    HashKind,
    ObjectHeader,
    ObjectKind,
    unpack_path_info,
)
from appliance.importer.staging import staged_path
from appliance.importer.stream import read_objects
from appliance.nix.store_path import StorePath
from appliance.services.addresses import ServiceAddresses
from appliance.store.batch import Batch
from appliance.store.schema import INLINE_MAX
from appliance.store.store import Store

# A commit begins as soon as this much is gathered and no other is under way: the disk is busy
# early, and what is left to do at the end is little.
_COMMIT_MIN_BYTES: Final = 8 << 20
# With this much gathered the import waits for the commit under way.
_COMMIT_MAX_BYTES: Final = 32 << 20


class PathEnd(NamedTuple):
    """What became of a path in a batch: it is durable, or refused for itself alone."""

    digest: bytes
    refusal: ApplianceError | None


class Sink(Protocol):
    """Where an import goes: a local store, or services."""

    def new_batch(self) -> Batch:
        """Return an empty batch for `commit`; its `add_blob` copies contents into the sink's form.

        So contents are copied once, and the caller need not know how a store keeps them.
        """

    def commit(self, batch: Batch) -> Iterator[PathEnd]:
        """Make everything in `batch` durable; takes over its files in any case.

        Yields each path when it is durable, or refused while the others may still be taken.

        Raises:
            ApplianceError: it cannot; no path in `batch` that was not yielded is visible.
        """

    def interrupt(self) -> None:
        """Have a commit under way end soon, with any error, if it may take for ever."""


class Committer:
    """Gathers objects, and commits them in batches, one at a time.

    The sink is its own until `close`. A commit that failed is raised by a later call, and nothing
    is committed after it. A path that the sink refuses is a line in `failures`.
    """

    def __init__(self, sink: Sink, hashers: Sequence[Hasher], failures: list[str]) -> None:
        self._sink = sink
        self._hashers = hashers
        # Of the paths that are complete, and of the one in hand.
        self._complete = sink.new_batch()
        self._current = sink.new_batch()
        # Blobs in `_complete` and in the commits before.
        self._known: set[bytes] = set()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="commit")
        self._commit: Future[None] | None = None
        # From the thread of the commit, with None at its end.
        self._ends: SimpleQueue[PathEnd | None] = SimpleQueue()
        # Complete, in order, and what is known of them.
        self._paths: deque[StorePath] = deque()
        self._refusals: dict[bytes, ApplianceError | None] = {}
        self._failures = failures
        self._num_copies = 0

    def add_files(self, index: int, records: bytes) -> None:
        """Take over the files in packed `HashRecord`s of one hashing process; give back its ring.

        Each blob is kept once.
        """
        hasher = self._hashers[index]
        ring, current, known = hasher.ring, self._current, self._known
        all_used = 0
        for record in HASH_RECORD.iter_unpack(records):
            kind, _, _, offset, size, used, file_size, staged, _, digest = record
            all_used += used
            if kind != HashKind.LAST:
                continue
            if digest in known or digest in current:
                if staged:
                    os.unlink(staged_path(hasher.staging, staged))  # noqa: PTH108 -- no Path is made for a file
            elif staged:
                current.add_file(digest, staged_path(hasher.staging, staged), file_size)
            elif file_size > INLINE_MAX:
                # Staged before, for a path that was abandoned since.
                path = staged_path(hasher.staging, self._next_copy())
                _write(path, ring[offset : offset + size])
                current.add_file(digest, path, file_size)
            else:
                # Copied out of the ring once, into the form that the sink keeps it in.
                current.add_blob(digest, ring[offset : offset + size])
        hasher.give_back(all_used)

    def add_directory(self, digest: bytes, encoded: bytes) -> None:
        """Take over a directory; all below it was added."""
        self._current.add_directory(Digest(digest), encoded)

    def complete(self, path: StorePath, path_info: bytes) -> None:
        """End the path in hand: all its objects have been added."""
        self._current.add_path_info(path.digest, path_info)
        self._keep_current()
        self._paths.append(path)

    def abandon(self) -> None:
        """Forget what was gathered of the path in hand.

        What a commit took along already stays: whole blobs and directories that no path has.
        """
        self._current.discard()
        self._current = self._sink.new_batch()

    def commit_if_large(self) -> Iterator[StorePath]:
        """Begin a commit if it is time, and yield the paths that became durable meanwhile."""
        yield from self._take_ends(is_waiting=False)
        gathered_bytes = self._complete.size_bytes + self._current.size_bytes
        if gathered_bytes < _COMMIT_MIN_BYTES:
            return
        if gathered_bytes >= _COMMIT_MAX_BYTES or self._commit is None:
            yield from self._take_ends(is_waiting=True)
            self._begin_commit()

    def finish(self) -> Iterator[StorePath]:
        """Commit what is left, and yield the paths as they become durable."""
        yield from self._take_ends(is_waiting=True)
        self._begin_commit()
        yield from self._take_ends(is_waiting=True)

    def settle(self) -> Iterator[StorePath]:
        """Begin nothing more, and yield the paths that a commit under way makes durable."""
        with suppress(ApplianceError):  # another error, of which this may follow, is being told
            yield from self._take_ends(is_waiting=True)

    def close(self) -> None:
        """Wait for the commit under way, or interrupt it, and drop what is gathered."""
        self._sink.interrupt()
        self._executor.shutdown(wait=True)
        self._complete.discard()
        self._current.discard()

    def _begin_commit(self) -> None:
        self._keep_current()
        batch, self._complete = self._complete, self._sink.new_batch()
        self._commit = self._executor.submit(self._run_commit, batch)

    def _run_commit(self, batch: Batch) -> None:
        try:
            for end in self._sink.commit(batch):
                self._ends.put(end)
        finally:
            self._ends.put(None)

    def _take_ends(self, *, is_waiting: bool) -> Iterator[StorePath]:
        # All of the commit under way, or those there are.
        while self._commit is not None and (is_waiting or not self._ends.empty()):
            end = self._ends.get()
            if end is None:
                commit, self._commit = self._commit, None
                commit.result()
                return
            self._refusals[end.digest] = end.refusal
            yield from self._settled()

    def _settled(self) -> Iterator[StorePath]:
        while self._paths and self._paths[0].digest in self._refusals:
            path = self._paths.popleft()
            refusal = self._refusals[path.digest]
            if refusal is None:
                yield path
            else:
                self._failures.append(f"{path.absolute()}: {refusal}")

    def _next_copy(self) -> int:
        # Negative: the numbers above 0 are the hashing process's.
        self._num_copies += 1
        return -self._num_copies

    def _keep_current(self) -> None:
        self._known |= self._current.blobs.keys() | self._current.files.keys()
        self._complete.merge(self._current)
        self._current = self._sink.new_batch()


def _write(path: str, content: memoryview) -> None:
    try:
        with open(path, "xb", buffering=0) as file:  # noqa: PTH123 -- as for the others staged
            while content:
                content = content[file.write(content) :]
    except OSError as exc:
        raise disk_error(exc, path) from exc


# --- The committing process: what the tree process sends goes to the store.


class ImportRun:
    """Takes what the tree process sends."""

    def __init__(
        self,
        sink: Sink,
        hashers: Sequence[Hasher],
        progress: Progress,
        failures: list[str],
        warn: Callable[[str], None] | None,
    ) -> None:
        self.num_ended = 0
        self.is_broken = False
        self._committer = Committer(sink, hashers, failures)
        self._hashers = hashers
        self._progress = progress
        self._failures = failures
        self._warn = warn or logging.getLogger(__name__).warning

    def take(self, objects: int) -> Iterator[str]:
        """Take all, and yield store paths as they become durable; those that do, in any case."""
        try:
            for header, content in read_objects(objects):
                self._take(header, content)
                for path in self._committer.commit_if_large():
                    yield path.absolute()
            self._committer.abandon()
            for path in self._committer.finish():
                yield path.absolute()
        except ApplianceError:
            for path in self._committer.settle():
                yield path.absolute()
            raise

    def close(self) -> None:
        """Wait for what is under way, or interrupt it, and drop the rest."""
        self._committer.close()

    def _take(self, header: ObjectHeader, content: bytes) -> None:
        match header.kind:
            case ObjectKind.RECORDS:
                self._committer.add_files(header.hasher, content)
            case ObjectKind.DIRECTORY:
                self._committer.add_directory(header.digest, content)
            case ObjectKind.PROGRESS:
                self._progress.update(
                    num_files=header.num_files, num_bytes=header.num_bytes, path=content.decode()
                )
            case ObjectKind.WARNING:
                self._warn(content.decode())
            case ObjectKind.PATH_INFO:
                self._committer.complete(*unpack_path_info(content))
                self.num_ended += 1
            case ObjectKind.ABANDONED:
                self._committer.abandon()
            case ObjectKind.REFUSED:
                self._failures.append(content.decode())
                self.num_ended += 1
            case ObjectKind.FULL | ObjectKind.FAILED as kind:
                error = StoreFullError if kind == ObjectKind.FULL else StoreError
                raise error(content.decode())
            case ObjectKind.ENDED:
                self._failures.append(self._hashers[header.hasher].child.describe_end())
                self.is_broken = True


class _LocalSink:
    def __init__(self, store: Store) -> None:
        self._store = store

    def new_batch(self) -> Batch:
        """See `Sink.new_batch`: its blobs are records of the store."""
        return Batch()

    def commit(self, batch: Batch) -> Iterator[PathEnd]:
        """See `Sink.commit`: all paths in one transaction, or none."""
        paths = list(batch.path_infos)
        self._store.commit(batch)
        for path in paths:
            yield PathEnd(path, None)

    def interrupt(self) -> None:
        """Nothing: a disk comes to an end."""


def open_sink(target: Path | ServiceAddresses, stack: ExitStack, dialect: SizeDialect) -> Sink:
    """Open what takes in an import, of directories in `dialect`, until `stack` ends.

    Raises:
        StoreError: it cannot be opened.
    """
    if isinstance(target, Path):
        store = Store.open(target, create=True)
        stack.callback(store.close)
        return _LocalSink(store)
    # Loaded here: one local store has no need of gRPC, and all that is forked was forked before.
    from appliance.importer.services_sink import open_sink  # noqa: PLC0415 - see above

    return stack.enter_context(open_sink(target, dialect))
