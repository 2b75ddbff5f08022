"""The committing process: what the tree process sends goes to the store."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from appliance.castore.size_dialect import SizeDialect
from appliance.errors import ApplianceError, StoreError, StoreFullError
from appliance.importer.committer import Committer, PathEnd, Sink
from appliance.importer.hasher_pool import Hasher
from appliance.importer.object_stream import read_objects
from appliance.importer.progress import Progress
from appliance.importer.records import ObjectHeader, ObjectKind, unpack_path_info
from appliance.store.batch import Batch
from appliance.store.service_uri import ServiceAddresses
from appliance.store.store import Store


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
