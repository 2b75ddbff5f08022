"""`appliance import`: paths of the file system become store paths.

hashing processes   read each file once, into shared memory, and hash it; write large ones to `tmp/`
tree process        walks; NAR digest; directories and PathInfos
this process        commits to the store, straight from the shared memory
"""

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Protocol

from appliance.castore.names import display
from appliance.castore.size_dialect import DEFAULT_DIALECT, SizeDialect
from appliance.errors import ApplianceError, ImportTreeError
from appliance.importer.hasher_pool import Hasher
from appliance.importer.own_places import excluded_directories, own_places
from appliance.importer.roots import Identity, Root, identity_of
from appliance.importer.staging import user_staging_directory
from appliance.importer.store_places import refuse_store_path
from appliance.importer.tree_process import start_tree_process
from appliance.nix.store_path import STORE_DIR, StorePathError, check_new_name
from appliance.services.addresses import ServiceAddresses
from appliance.store.temp_directory import TempDirectory

# One hashing process keeps up with the SHA-256 of a NAR, which is computed in one go; small files
# take more to read than to hash.
_HASHERS_MAX: Final = 3
# Of the ring of a hashing process: small, for it to stay in the caches, and because each page of
# it costs a fault in each process.
_RING_SIZE: Final = 8 << 20


class Progress(Protocol):
    """Tells a person how far an import is."""

    def update(self, *, num_files: int, num_bytes: int, path: str) -> None:
        """Show the totals so far and the file in hand; called ten times a second at most."""


def import_paths(
    target: Path | ServiceAddresses,
    paths: Sequence[Path],
    *,
    progress: Progress,
    warn: Callable[[str], None] | None = None,
    dialect: SizeDialect = DEFAULT_DIALECT,
    name: str | None = None,
    when_begun: Callable[[], None] = lambda: None,
) -> Generator[str, None, None]:
    """Import each of `paths` into `target` and yield its store path once it is durable, in order.

    `target` is a store by its path, created when missing, or services; it is not imported into
    itself. A symlink is imported as such. A store path is named after its path, or by `name`.
    Forks, so it must be called before this process has threads or an LMDB environment; `when_begun`
    is called once it has.

    A warning goes to `warn`, or else to the log.

    Raises:
        ImportTreeError: some paths could not be imported: one line for each. The others were, or
            what ended the import is the last line.
        StoreFullError: the disk is full. What was yielded before is there.
        StoreError: the store cannot be opened or written.
    """
    places = own_places(target)
    roots, failures = _roots(paths, name, excluded_directories(places))
    if roots:
        with ExitStack() as stack:
            store_path = target if isinstance(target, Path) else target.one_store()
            temp = stack.enter_context(TempDirectory(store_path or user_staging_directory()))
            hashers = _start_hashers(temp.path, stack)
            excluded = excluded_directories(places)
            tree, objects = start_tree_process(roots, hashers, dialect, excluded)
            stack.callback(tree.kill)
            stack.callback(os.close, objects)
            for hasher in hashers:
                hasher.leave_to_tree()
            when_begun()
            # All that this process alone needs is loaded while the others begin.
            from appliance.importer.committer import ImportRun, open_sink  # noqa: PLC0415

            sink = open_sink(store_path or target, stack, dialect)
            run = ImportRun(sink, hashers, progress, failures, warn)
            stack.callback(run.close)
            try:
                yield from run.take(objects)
            except ApplianceError as exc:
                if not failures:
                    raise
                raise ImportTreeError("\n".join([*failures, str(exc)])) from exc
            if run.num_ended < len(roots) and not run.is_broken:
                failures.append(tree.describe_end())
    if failures:
        raise ImportTreeError("\n".join(failures))


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


def _roots(
    paths: Sequence[Path], name: str | None, excluded: Mapping[Identity, str]
) -> tuple[list[Root], list[str]]:
    roots = []
    failures = []
    for path in paths:
        try:
            roots.append(_root(os.fsencode(path), name, excluded))
        except ImportTreeError as exc:
            failures.append(str(exc))
    return roots, failures


def _root(path: bytes, name: str | None, excluded: Mapping[Identity, str]) -> Root:
    path = path.rstrip(b"/") or b"/"
    if path.rpartition(b"/")[2] in {b"", b".", b".."}:
        path = os.path.realpath(path)
    refuse_store_path(path)
    if name is None:
        name = path.rpartition(b"/")[2].decode("utf-8", "backslashreplace")
    try:
        check_new_name(name)
    except StorePathError as exc:
        raise ImportTreeError(f"{display(path)}: no name for a path in {STORE_DIR}: {exc}") from exc
    try:
        status = os.lstat(path)
    except OSError as exc:
        raise ImportTreeError(f"{display(path)}: {exc.strerror}") from exc
    if (why := excluded.get(identity_of(status))) is not None:
        raise ImportTreeError(f"{display(path)}: {why}")
    return Root(path, name)
