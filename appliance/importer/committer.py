"""The committing process: gathers what the others produce, and commits it to the sink in batches.

`ImportRun` takes the objects of the tree process as they arrive. `Committer` gathers them and has a
thread commit them, one batch at a time, while the next one is gathered. A `Sink` is what a batch is
committed to; the one for a local store is here, the one for services in `services_sink.py`.
"""

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
    INNER_KINDS,
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
from appliance.store.leases import Lease, LeaseKind
from appliance.store.schema import INLINE_MAX
from appliance.store.store import Store
from appliance.system.tracing import same_trace

# A commit begins when this many bytes are gathered, unless another one is running. So the disk is
# busy from early on, and little is left to do at the end.
_COMMIT_MIN_BYTES: Final = 8 << 20
# When this many bytes are gathered, the import waits for the running commit.
_COMMIT_MAX_BYTES: Final = 32 << 20

# --- What a batch is committed to ---


class PathEnd(NamedTuple):
    """The outcome for one path of a batch."""

    # Digest of the store path.
    digest: bytes
    # None if the path is durable, else why the sink refuses this path but not the others.
    refusal: ApplianceError | None


class Sink(Protocol):
    """Where an import goes: a local store, or services."""

    def new_batch(self) -> Batch:
        """Return an empty batch for `commit`.

        The caller adds contents to it, and `add_blob` copies them into the form that the sink keeps
        them in. So each content is copied once, and only the sink knows that form.
        """

    def commit(self, batch: Batch) -> Iterator[PathEnd]:
        """Make everything in `batch` durable, and yield the outcome for each path in it.

        The sink owns the files of the batch from here on, whatever the outcome.

        Raises:
            ApplianceError: the commit failed. Paths that were not yielded are not visible.
        """

    def interrupt(self) -> None:
        """Make a running commit end soon, with any error, if it could wait for a peer forever."""


class _LocalSink:
    """A store on this machine."""

    def __init__(self, store: Store) -> None:
        self._store = store
        with store.env.read() as txn:
            self._num_sweeps = store.recent_puts.num_sweeps(txn)

    def new_batch(self) -> Batch:
        """See `Sink.new_batch`. The blobs of the batch are records of the store."""
        batch = Batch()
        batch.num_sweeps = self._num_sweeps
        return batch

    def commit(self, batch: Batch) -> Iterator[PathEnd]:
        """See `Sink.commit`. All paths are committed in one transaction, or none."""
        paths = list(batch.path_infos)
        self._store.commit(batch)
        for path in paths:
            yield PathEnd(path, None)

    def interrupt(self) -> None:
        """See `Sink.interrupt`. There is nothing to do, as a commit to a disk ends by itself."""


def open_sink(target: Path | ServiceAddresses, stack: ExitStack, dialect: SizeDialect) -> Sink:
    """Open the sink for an import; closing `stack` closes it.

    Args:
        target: the path of a store, which is created if it does not exist, or services.
        stack: takes over what has to be closed.
        dialect: how the Directories of the import count their entries.

    Raises:
        StoreError: a local store cannot be opened.
    """
    if isinstance(target, Path):
        store = Store.open(target, create=True)
        stack.callback(store.close)
        # What this import commits, and refers to later, stays until it has ended.
        stack.callback(Lease.begin(target, LeaseKind.IMPORT).close)
        return _LocalSink(store)
    # Imported here because a local store does not need gRPC, and because gRPC must not be loaded
    # before the other processes have been forked.
    from appliance.importer.services_sink import open_sink  # noqa: PLC0415 - see above

    return stack.enter_context(open_sink(target, dialect))


# --- Batches ---


class Committer:
    """Gathers objects in batches, and commits these one at a time, in a thread.

    If a commit fails, a later call raises its error, and nothing more is committed.

    Args:
        sink: used by the thread until `close`.
        hashers: the hashing processes, by index.
        failures: gets a line for each path that the sink refuses.
    """

    def __init__(self, sink: Sink, hashers: Sequence[Hasher], failures: list[str]) -> None:
        self._sink = sink
        self._hashers = hashers
        # For each hashing process, the chunks so far of the file that it is reading.
        self._chunks = [bytearray() for _ in hashers]
        # The objects of the complete paths, and those of the current one.
        self._complete = sink.new_batch()
        self._current = sink.new_batch()
        # Digests of the blobs in `_complete` and in all earlier batches.
        self._known: set[bytes] = set()
        self._executor = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="commit", initializer=same_trace()
        )
        self._commit: Future[None] | None = None
        # Outcomes from the thread; None marks the end of a commit.
        self._ends: SimpleQueue[PathEnd | None] = SimpleQueue()
        # The complete paths that have not been reported, in order, and the outcomes known so far.
        self._paths: deque[StorePath] = deque()
        self._refusals: dict[bytes, ApplianceError | None] = {}
        self._failures = failures
        self._num_copies = 0

    def add_files(self, index: int, records: bytes) -> None:
        """Add the files described by packed `HashRecord`s to the current path.

        The bytes of the ring that the records use are given back to the hashing process. Staged
        files that are not needed are removed, because the blob was added before.

        Args:
            index: the hashing process.
            records: its records.
        """
        hasher = self._hashers[index]
        ring, current, known = hasher.ring, self._current, self._known
        chunks = self._chunks[index]
        all_used = 0
        for record in HASH_RECORD.iter_unpack(records):
            kind, _, _, offset, size, used, file_size, staged, _, digest = record
            all_used += used
            if kind == HashKind.CHUNKS:
                chunks += ring[offset : offset + size]
            if kind in INNER_KINDS:
                continue
            listed = bytes(chunks)
            chunks.clear()
            if kind != HashKind.LAST:
                continue
            if digest in known or digest in current:
                if staged:
                    os.unlink(staged_path(hasher.staging, staged))  # noqa: PTH108 -- no Path is made for a file
            elif staged:
                current.add_file(digest, staged_path(hasher.staging, staged), file_size, listed)
            elif file_size > INLINE_MAX:
                # The content was staged for an earlier file, whose path was abandoned. It is whole
                # in the ring, and has to be staged again.
                path = staged_path(hasher.staging, self._next_copy())
                _write(path, ring[offset : offset + size])
                current.add_file(digest, path, file_size)
            else:
                current.add_blob(digest, ring[offset : offset + size])
        hasher.give_back(all_used)

    def add_directory(self, digest: bytes, encoded: bytes) -> None:
        """Add a directory to the current path; everything it refers to must have been added."""
        self._current.add_directory(Digest(digest), encoded)

    def complete(self, path: StorePath, path_info: bytes) -> None:
        """End the current path, all of whose objects have been added."""
        self._current.add_path_info(path.digest, path_info)
        self._keep_current()
        self._paths.append(path)

    def abandon(self) -> None:
        """Drop the current path.

        Objects of it that are in an earlier batch stay in the store, without a path that has them.
        """
        self._current.discard()
        self._current = self._sink.new_batch()

    def commit_if_large(self) -> Iterator[StorePath]:
        """Begin a commit if enough is gathered; yield the paths that have become durable."""
        yield from self._take_ends(is_waiting=False)
        gathered_bytes = self._complete.size_bytes + self._current.size_bytes
        if gathered_bytes < _COMMIT_MIN_BYTES:
            return
        if gathered_bytes >= _COMMIT_MAX_BYTES or self._commit is None:
            yield from self._take_ends(is_waiting=True)
            self._begin_commit()

    def finish(self) -> Iterator[StorePath]:
        """Commit everything that is left; yield the paths as they become durable."""
        yield from self._take_ends(is_waiting=True)
        self._begin_commit()
        yield from self._take_ends(is_waiting=True)

    def settle(self) -> Iterator[StorePath]:
        """Wait for the running commit, if any; yield the paths that it makes durable."""
        with suppress(ApplianceError):  # the caller is already handling an earlier error
            yield from self._take_ends(is_waiting=True)

    def close(self) -> None:
        """Wait for the running commit or interrupt it, and drop what is gathered."""
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
        # Takes all outcomes of the running commit if it `is_waiting`, else those that are there.
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
        # The hashing process uses the positive numbers.
        self._num_copies += 1
        return -self._num_copies

    def _keep_current(self) -> None:
        self._known |= self._current.blobs.keys() | self._current.files.keys()
        self._complete.merge(self._current)
        self._current = self._sink.new_batch()


def _write(path: str, content: memoryview) -> None:
    try:
        with open(path, "xb", buffering=0) as file:  # noqa: PTH123 -- as for other staged files
            while content:
                content = content[file.write(content) :]
    except OSError as exc:
        raise disk_error(exc, path) from exc


# --- Objects ---


class ImportRun:
    """Takes the objects of the tree process, and counts the paths that have ended.

    Args:
        sink: where the import goes.
        hashers: the hashing processes, by index.
        progress: is updated with each PROGRESS object.
        failures: gets a line for each path that cannot be imported.
        warn: is called with each warning; by default warnings are logged.

    Attributes:
        num_ended: number of paths that are complete or have failed.
        is_broken: whether a hashing process has ended.
    """

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
        """Take all objects, and yield store paths as they become durable.

        Args:
            objects: read end of the pipe of objects.

        Raises:
            ApplianceError: the import cannot go on. Paths that a running commit still makes durable
                are yielded before.
        """
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
        """Wait for the running commit or interrupt it, and drop what is gathered."""
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
