"""Imports paths of the file system into a store, with several processes: `import_paths`.

Theory of operation. Three kinds of processes are connected by pipes and rings of shared memory:

    hashing processes    read each file once, into their rings, and hash it (BLAKE3); copy large
                         contents to files in the staging directory, `tmp/` of a local store
    tree process         walks the trees, requests their files in the order of the walk, computes
                         the SHA-256 of the NARs, makes Directories and PathInfos
    committing process   the caller of `import_paths`; collects blobs, Directories and PathInfos in
                         batches, which one of its threads commits to the sink

A hashing process reads paths of files from its pipe. It puts each file into its ring in the form
that the file has in the NAR (large files in pieces of 1 MiB), and sends a record of where that is
to the tree process. The tree process requests files from all hashing processes in turn and takes
the records in the order of the walk, so it can feed the bytes in the rings to SHA-256 without
copying them. It passes the records on to the committing process, which copies small contents out of
the ring, takes over staged files, and gives the bytes of the ring back to the hashing process,
oldest first. A hashing process whose ring is full waits, and so does the rest in the end: the
memory for contents is bounded, whatever the size of the tree.

The tree process passes on a Directory after everything in it, and a PathInfo after its root. The
committing process adds them to batches in this order, and commits one batch after the other. A
local store commits a batch in one transaction; services get its blobs, then its Directories, then
its PathInfos. So whatever is visible has everything that it refers to, wherever an import ends. At
worst, there are blobs and Directories left that no PathInfo refers to.

If a tree cannot be imported, what was gathered of it is dropped, and the next one follows. If a
disk is full, a hashing process sends the error in place of a file, or the commit raises it; either
ends the import. If a hashing process dies, its pipe of records ends, and the tree process reports
this and ends; if the tree process dies, its pipe to the committing process ends. In both cases the
paths that were complete are committed, and the others are reported. If the committing process dies,
the kernel kills the others; a later process that uses the store removes what they staged.
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

# For large files, one hashing process keeps up with the SHA-256 of the NAR, which only one process
# can compute. Small files take longer to open and read than to hash, so they need more.
_HASHERS_MAX: Final = 3
# Bytes of the ring of a hashing process. It is small so that it stays in the CPU's caches, and
# because each of its pages costs a page fault in each process.
_RING_SIZE: Final = 8 << 20


class Progress(Protocol):
    """Shows the progress of an import."""

    def update(self, *, num_files: int, num_bytes: int, path: str) -> None:
        """Show the totals so far and the current file; called at most ten times a second."""


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
    """Import each of `paths` into `target`, and yield its store path once it is durable, in order.

    This forks, so the process must not have threads or an LMDB environment yet.

    Args:
        target: the path of a store, which is created if it does not exist, or services. It is never
            imported into itself.
        paths: files, directories or symlinks; symlinks are not followed.
        progress: is updated while the import runs.
        warn: is called with each warning; by default warnings are logged.
        dialect: how the entries of directories are counted.
        name: name of the store path; by default, the last component of its path.
        when_begun: is called once all processes have been forked.

    Raises:
        ImportTreeError: some paths could not be imported; the text has a line for each of them. All
            others were imported, unless the last line says what ended the import.
        StoreFullError: the disk is full. The paths yielded before are in the store.
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
            # Imported here, while the other processes start: only this process needs it.
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
