"""`appliance import`: paths of the file system become store paths.

hashing processes   read each file once, into shared memory, and hash it; write large ones to `tmp/`
tree process        walks; NAR digest; directories and PathInfos
this process        commits to the store, straight from the shared memory
"""

import gc
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from appliance.castore.nodes import SizeDialect
from appliance.castore.store_path import STORE_DIR, StorePathError, check_new_name
from appliance.errors import ImportTreeError, StoreError, StoreFullError
from appliance.importer.committer import Committer, Sink
from appliance.importer.hasher_pool import Hasher
from appliance.importer.object_stream import read_objects
from appliance.importer.progress import Progress
from appliance.importer.records import ObjectHeader, ObjectKind
from appliance.importer.tree_process import Root, start_tree_process
from appliance.importer.walk import display
from appliance.store.service_uri import ServiceAddresses
from appliance.store.store import Store
from appliance.store.temp_directory import TempDirectory, sweep

# One hashing process keeps up with the SHA-256 of a NAR, which is computed in one go; small files
# take more to read than to hash.
_HASHERS_MAX: Final = 3
# Of the ring of a hashing process: small, for it to stay in the caches, and because each page of
# it costs a fault in each process.
_RING_SIZE: Final = 8 << 20


def import_paths(
    target: Path | ServiceAddresses,
    paths: Sequence[Path],
    *,
    progress: Progress,
    dialect: SizeDialect = SizeDialect.DOCUMENTED,
) -> Iterator[str]:
    """Import each of `paths` into `target` and yield its store path once it is durable, in order.

    `target` is a store by its path, created when missing, or services. A symlink is imported as
    such. Forks, so it must be called before this process has threads or an LMDB environment.

    Raises:
        ImportTreeError: some paths could not be imported: one line for each. The others were.
        StoreFullError: the disk is full. What was yielded before is there.
        StoreError: the store cannot be opened or written.
    """
    roots, failures = _roots(paths)
    # Nothing here or in the processes forked here makes cycles worth a search for them.
    gc.disable()
    if roots:
        with ExitStack() as stack:
            store_path = target if isinstance(target, Path) else target.one_store()
            temp = stack.enter_context(TempDirectory(store_path or _staging_path()))
            hashers = _start_hashers(temp.path, stack)
            tree, objects = start_tree_process(roots, hashers, dialect)
            stack.callback(tree.kill)
            stack.callback(os.close, objects)
            for hasher in hashers:
                hasher.leave_to_tree()
            sink = _open_sink(store_path or target, stack)
            committer = stack.enter_context(Committer(sink, hashers))
            run = _ImportRun(committer, hashers, progress, failures)
            yield from run.run(objects)
            if run.num_ended < len(roots) and not run.is_broken:
                failures.append(tree.describe_end())
    if failures:
        raise ImportTreeError("\n".join(failures))


class _ImportRun:
    """Takes what the tree process sends."""

    def __init__(
        self,
        committer: Committer,
        hashers: Sequence[Hasher],
        progress: Progress,
        failures: list[str],
    ) -> None:
        self.num_ended = 0
        self.is_broken = False
        self._committer = committer
        self._hashers = hashers
        self._progress = progress
        self._failures = failures

    def run(self, objects: int) -> Iterator[str]:
        """Take all, and yield store paths as they become durable."""
        for header, content in read_objects(objects):
            self._take(header, content)
            for path in self._committer.commit_if_large():
                yield path.absolute()
        self._committer.abandon()
        for path in self._committer.finish():
            yield path.absolute()

    def _take(self, header: ObjectHeader, content: bytes) -> None:
        match header.kind:
            case ObjectKind.RECORDS:
                self._committer.add_files(header.hasher, content)
            case ObjectKind.DIRECTORY:
                self._committer.add_directory(header.digest, content)
            case ObjectKind.PROGRESS:
                self._progress.update(
                    num_files=header.num_files, num_bytes=header.num_bytes, path=display(content)
                )
            case ObjectKind.PATH_INFO:
                self._committer.complete(content)
                self.num_ended += 1
            case ObjectKind.REFUSED:
                self._committer.abandon()
                self._failures.append(content.decode())
                self.num_ended += 1
            case ObjectKind.FULL:
                raise StoreFullError(content.decode())
            case ObjectKind.FAILED:
                raise StoreError(content.decode())
            case ObjectKind.ENDED:
                self._failures.append(self._hashers[header.hasher].child.describe_end())
                self.is_broken = True


def _open_sink(target: Path | ServiceAddresses, stack: ExitStack) -> Sink:
    if isinstance(target, Path):
        store = Store.open(target, create=True)
        stack.callback(store.close)
        return store
    # Loaded here: one local store has no need of gRPC, and all that is forked was forked before.
    from appliance.importer.services_sink import open_sink  # noqa: PLC0415 - see above

    return stack.enter_context(open_sink(target))


def _staging_path() -> Path:
    # Of a known name, so that what a killed import left is found, where others write too.
    path = Path(tempfile.gettempdir()) / f"appliance-import-{os.geteuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
    except OSError as exc:
        raise StoreError(f"{path}: {exc.strerror}") from exc
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise StoreError(f"{path}: not a directory that only this user can write to")
    sweep(path)
    return path


def _start_hashers(staging: Path, stack: ExitStack) -> list[Hasher]:
    num_hashers = max(1, min(_HASHERS_MAX, len(os.sched_getaffinity(0)) - 1))
    hashers = []
    for index in range(num_hashers):
        directory = staging / str(index)
        directory.mkdir(mode=0o700)
        hasher = Hasher(index, directory, _RING_SIZE)
        stack.callback(hasher.close)
        hashers.append(hasher)
    return hashers


def _roots(paths: Sequence[Path]) -> tuple[list[Root], list[str]]:
    roots = []
    failures = []
    for path in paths:
        try:
            roots.append(_root(os.fsencode(path)))
        except ImportTreeError as exc:
            failures.append(str(exc))
    return roots, failures


def _root(path: bytes) -> Root:
    path = path.rstrip(b"/") or b"/"
    if path.rpartition(b"/")[2] in {b"", b".", b".."}:
        path = os.path.realpath(path)
    name = path.rpartition(b"/")[2].decode("latin-1")
    try:
        check_new_name(name)
    except StorePathError as exc:
        raise ImportTreeError(f"{display(path)}: no name for a path in {STORE_DIR}: {exc}") from exc
    try:
        os.lstat(path)
    except OSError as exc:
        raise ImportTreeError(f"{display(path)}: {exc.strerror}") from exc
    return Root(path, name)
