"""`appliance import`: paths of the file system become store paths."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final, NamedTuple

from appliance.castore.nodes import SizeDialect
from appliance.castore.path_info import encode_nar_addressed
from appliance.castore.store_path import StorePathError, check_new_name, nar_path
from appliance.errors import ImportTreeError
from appliance.importer.committer import Committer
from appliance.importer.hasher_pool import HasherEndedError, HasherPool
from appliance.importer.progress import Progress, Reporter
from appliance.importer.tree import TreeImport
from appliance.importer.walk import display
from appliance.store.service_uri import ServiceAddresses
from appliance.store.store import Store
from appliance.store.temp_directory import TempDirectory, sweep

# One process keeps up with the SHA-256 of the NAR, which is computed in one go, and a few more with
# the reading of small files.
_HASHERS_MAX: Final = 3


class _Root(NamedTuple):
    """A path to import, and the name that its store path gets."""

    path: bytes
    name: str


def import_paths(
    services: ServiceAddresses,
    paths: Sequence[Path],
    *,
    progress: Progress,
    dialect: SizeDialect = SizeDialect.DOCUMENTED,
) -> Iterator[str]:
    """Import each of `paths` and yield its store path once it is durable, in their order.

    A symlink is imported as such. A local store is created when missing. Forks hashing processes,
    so it must be called before this process has threads or an LMDB environment.

    Raises:
        ImportTreeError: some paths could not be imported: one line for each. The others were.
        StoreFullError: the disk is full. What was yielded before is there.
        StoreError: the store cannot be opened or written.
    """
    roots, failures = _roots(paths)
    if roots:
        with ExitStack() as stack:
            store_path = services.one_store()
            temp = stack.enter_context(TempDirectory(store_path or _staging_path()))
            pool = stack.enter_context(HasherPool(temp.path, _num_hashers()))
            if store_path is not None:
                store = Store.open(store_path, create=True)
                stack.callback(store.close)
                committer = stack.enter_context(Committer(store))
            else:
                # Loaded here: one local store has no need of gRPC, and hashers are forked before.
                from appliance.importer.services_sink import open_sink  # noqa: PLC0415 - see above

                sink = stack.enter_context(open_sink(services))
                committer = stack.enter_context(Committer(sink))
            reporter = Reporter(progress)
            for root in roots:
                try:
                    _import_root(root, pool, committer, reporter, dialect)
                except HasherEndedError as exc:
                    failures.append(str(exc))
                    break
                except ImportTreeError as exc:
                    failures.append(str(exc))
                yield from (path.absolute() for path in committer.durable_paths())
            committer.flush()
            yield from (path.absolute() for path in committer.durable_paths())
    if failures:
        raise ImportTreeError("\n".join(failures))


def _import_root(
    root: _Root,
    pool: HasherPool,
    committer: Committer,
    reporter: Reporter,
    dialect: SizeDialect,
) -> None:
    try:
        tree = TreeImport(root.path, pool, committer, reporter, dialect).run()
    except HasherEndedError:
        committer.abandon()
        raise
    except ImportTreeError:
        committer.abandon()
        pool.drain()
        raise
    path = nar_path(tree.nar_sha256, root.name)
    path_info = encode_nar_addressed(
        path, tree.node, nar_size=tree.nar_size, nar_sha256=tree.nar_sha256
    )
    committer.complete(path, path_info)


def _roots(paths: Sequence[Path]) -> tuple[list[_Root], list[str]]:
    roots = []
    failures = []
    for path in paths:
        try:
            roots.append(_root(os.fsencode(path)))
        except ImportTreeError as exc:
            failures.append(str(exc))
    return roots, failures


def _root(path: bytes) -> _Root:
    path = path.rstrip(b"/") or b"/"
    if path.rpartition(b"/")[2] in {b"", b".", b".."}:
        path = os.path.realpath(path)
    name = path.rpartition(b"/")[2]
    try:
        check_new_name(name.decode("latin-1"))
    except StorePathError as exc:
        raise ImportTreeError(f"{display(path)}: not a name for a store path: {exc}") from exc
    try:
        os.lstat(path)
    except OSError as exc:
        raise ImportTreeError(f"{display(path)}: {exc.strerror}") from exc
    return _Root(path, name.decode())


def _staging_path() -> Path:
    path = Path(tempfile.gettempdir()) / f"appliance-import-{os.geteuid()}"
    sweep(path)
    return path


def _num_hashers() -> int:
    return max(1, min(_HASHERS_MAX, len(os.sched_getaffinity(0)) - 1))
