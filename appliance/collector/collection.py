"""Garbage collection: what no root reaches is removed, while imports and sessions go on.

Theory of operation. A collection holds the lock `gc.lock`, so there is one at a time, and goes
through these steps. It can be killed between any two instructions; the next one finds what is left.

1. Plan (`plan`). In one snapshot, the store paths are read, and those that are reachable from a
   root along references are live. The blobs and Directories below live paths are marked, and so is
   what was put within the period of grace. If a Directory below a live path is damaged, what lies
   below it is not known, and the collection is refused. With a limit, the dead paths are then taken
   from the last to the first in the order of their removal, and each marks what nothing before has
   marked: that is what its removal frees.
2. PathInfos (`sweep.Sweep.remove_paths`). In short transactions, each with the lock of the roots,
   the roots are read again, and dead paths are removed, each before those that it refers to. What
   became a root before that is seen, and who comes later finds no path (`root_lists`).
3. Objects. All paths that are left have marks below them. In short transactions, dead Directories
   and blobs are removed. A transaction first marks what was put since the snapshot, PathInfos and
   noted objects (`recent_puts`) alike, so a put in between makes its objects live again. What is
   committed later is checked by the commit itself if something was removed since its writer looked.
4. Files. A reader goes by the record of a blob, so the file is removed after the record, in a
   transaction of its own that looks again: the write lock keeps anybody from placing the file
   meanwhile. Files without a record that a killed process has left go, too.
5. The rest: images, NAR infos and log entries of what is gone.
"""

import fcntl
import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from appliance.collector.marking import FIRST_DEAD, Marks
from appliance.collector.path_graph import PathGraph
from appliance.collector.root_sources import Roots, gather_roots
from appliance.collector.sweep import Sweep, Swept
from appliance.db.environment import ReadTransaction
from appliance.db.resident_pages import read_ahead
from appliance.errors import StoreError, disk_error
from appliance.nix.store_path import StorePath
from appliance.store.root_lists import roots_locked
from appliance.store.snapshot import Snapshot
from appliance.store.store import Store

_LOG: Final = logging.getLogger(__name__)
_LOCK: Final = "gc.lock"
_DAY_S: Final = 86_400


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectOptions:
    """What a collection removes."""

    grace_s: float = 3600
    """What was put within this many seconds is kept."""
    older_than_s: float = 0
    """Dead paths that were put within this many seconds are kept."""
    max_freed_bytes: int | None = None
    """Remove no more dead paths once this much is freed."""
    keep_free_bytes: int | None = None
    """Remove no more dead paths once the file system has this much space."""
    is_forced: bool = False
    """Go on although Directories of live paths are damaged."""
    chosen: Sequence[StorePath] | None = None
    """Remove only these paths, which must be dead."""


@dataclass(slots=True)
class CollectionPlan:
    """What one snapshot says about a collection.

    Attributes:
        live: the live paths, with the root that each was reached from, by digest.
        dead: the paths to be removed, in order.
        first_removed: objects with this mark or a higher one are removed, as are those without.
        freed_bytes: the stored bytes of what is to be removed.
    """

    graph: PathGraph
    roots: Roots
    marks: Marks
    live: dict[bytes, str]
    recent_ns: int
    dead: list[bytes] = field(default_factory=list)
    first_removed: int = FIRST_DEAD
    freed_bytes: int = 0

    def names(self, digests: Iterable[bytes]) -> list[str]:
        """Return the paths with these digests, absolute, in order."""
        return sorted(self.graph.paths[digest].path.absolute() for digest in digests)


@contextmanager
def collecting(store_path: Path) -> Iterator[None]:
    """Keep other collections out for a block; wait for one that is running.

    Raises:
        StoreError: this user may not write to the store, or the disk failed.
    """
    try:
        fd = os.open(store_path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as exc:
        raise disk_error(exc, store_path) from exc
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _LOG.info("%s: waiting for another garbage collection", store_path)
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def plan(store: Store, options: CollectOptions) -> CollectionPlan:
    """Find out what a collection would remove now; see the theory of operation.

    Raises:
        StoreError: Directories of live paths are damaged, and the collection is not forced; a
            chosen path is live; a root breaks a rule; or LMDB failed.
    """
    with roots_locked(store.path, is_exclusive=True):
        roots = gather_roots(store.path, options.grace_s)
    free_bytes = _free_bytes(store) if options.keep_free_bytes is not None else 0
    read_ahead(store.path)
    with store.env.read() as txn:
        view = store.view_in(txn)
        graph = PathGraph(store)
        graph.load(txn, view)
        live = graph.closure(reasons(graph, roots, options))
        made = CollectionPlan(graph, roots, Marks(store, txn), live, 0)
        _mark_live(store, txn, view, made)
        _check_damage(store, made, is_forced=options.is_forced)
        wanted = _wanted(made, options.chosen)
        made.dead = graph.referrers_first(wanted)
        _mark_kept(view, made, set(wanted))
        _limit(view, made, options, free_bytes)
    return made


def reasons(graph: PathGraph, roots: Roots, options: CollectOptions) -> dict[bytes, str]:
    """Return why each root of a collection is one, by the digest of the path."""
    found = dict(roots.paths)
    if roots.all_held_by:
        found |= dict.fromkeys(graph.paths.keys() - found.keys(), roots.all_held_by)
    since_ns = roots.objects_since_ns
    old_ns = time.time_ns() - int(options.older_than_s * 10**9)
    for digest, known in graph.paths.items():
        if known.put_ns >= since_ns:
            found.setdefault(digest, "recent")
        elif options.older_than_s and known.put_ns > old_ns:
            found.setdefault(digest, f"put less than {options.older_than_s / _DAY_S:g} days ago")
    return found


def roots_of(store: Store, grace_s: float) -> dict[str, str]:
    """Return the absolute paths of all roots, in order, with where each is one.

    A root that the store lacks is among them.

    Raises:
        StoreError: a root breaks a rule, or LMDB or the disk failed.
    """
    with roots_locked(store.path, is_exclusive=True):
        roots = gather_roots(store.path, grace_s)
    graph = PathGraph(store)
    with store.env.read() as txn:
        graph.load(txn, store.view_in(txn))
    found = reasons(graph, roots, CollectOptions(grace_s=grace_s))
    names = roots.names | {digest: known.path for digest, known in graph.paths.items()}
    return dict(sorted((names[digest].absolute(), where) for digest, where in found.items()))


def collect(store: Store, options: CollectOptions) -> Swept:
    """Remove what no root reaches; call it in a block of `collecting`.

    Raises:
        StoreError: see `plan`.
    """
    made = plan(store, options)
    sweep = Sweep(store, made.graph, made.marks, made.first_removed, made.recent_ns)

    def roots_now() -> dict[bytes, str]:
        return reasons(made.graph, gather_roots(store.path, options.grace_s), options)

    sweep.remove_paths(made.dead, roots_now)
    sweep.remove_directories()
    sweep.remove_blobs()
    sweep.remove_stray_files()
    sweep.remove_rest(made.roots.objects_since_ns)
    return sweep.swept


# --- Steps of the plan ---


def _mark_live(store: Store, txn: ReadTransaction, view: Snapshot, made: CollectionPlan) -> None:
    made.marks.mark_live(view, (made.graph.paths[digest].node for digest in made.live))
    for blob in made.roots.blobs:
        made.marks.mark_blob(blob)
    for put in store.recent_puts.since(txn, made.roots.objects_since_ns):
        for blob_digest in put.blobs:
            made.marks.mark_blob(blob_digest)
        for directory in put.directories:
            made.marks.mark_directory(view, directory)
    made.recent_ns = max(made.roots.objects_since_ns, store.recent_puts.last_ns(txn) + 1)


def _check_damage(store: Store, made: CollectionPlan, *, is_forced: bool) -> None:
    damage = [*made.graph.damage, *made.marks.damage]
    if not damage:
        return
    if not is_forced:
        raise StoreError(
            "\n".join(
                f"{store.path}: {line}, so what it refers to is not known; nothing was removed "
                "(`appliance verify --repair` may mend it, --force goes on all the same)"
                for line in damage
            )
        )
    for line in damage:
        _LOG.warning("%s: %s; what only it refers to is removed", store.path, line)


def _wanted(made: CollectionPlan, chosen: Sequence[StorePath] | None) -> list[bytes]:
    if chosen is None:
        return [digest for digest in made.graph.paths if digest not in made.live]
    wanted = [path.digest for path in chosen]
    for path in chosen:
        known = made.graph.paths.get(path.digest)
        if known is None or known.path != path:
            raise StoreError(f"path {path.absolute()} is not valid")
        if path.digest in made.live:
            raise StoreError(f"path {path.absolute()} is live: {made.live[path.digest]}")
        others = made.graph.paths.keys() - set(wanted)
        referrer = made.graph.referrer_of(path.digest, others)
        if referrer is not None:
            raise StoreError(
                f"path {path.absolute()}: {referrer.path.absolute()} refers to it and would stay"
            )
    return wanted


def _mark_kept(view: Snapshot, made: CollectionPlan, wanted: set[bytes]) -> None:
    made.marks.mark_live(
        view,
        (
            known.node
            for digest, known in made.graph.paths.items()
            if digest not in wanted and digest not in made.live
        ),
    )


def _limit(view: Snapshot, made: CollectionPlan, options: CollectOptions, free_bytes: int) -> None:
    limits = []
    if options.max_freed_bytes is not None:
        limits.append(options.max_freed_bytes)
    if options.keep_free_bytes is not None:
        limits.append(max(0, options.keep_free_bytes - free_bytes))
    if not limits:
        made.freed_bytes = made.marks.unmarked_bytes()
        return
    # From the last one to be removed to the first: each marks what only it and earlier ones have.
    frees = [
        made.marks.mark(view, made.graph.paths[digest].node, FIRST_DEAD + number)
        for number, digest in enumerate(reversed(made.dead))
    ]
    frees.reverse()
    num_removed = 0
    made.freed_bytes = made.marks.unmarked_bytes()
    while num_removed < len(made.dead) and made.freed_bytes < min(limits):
        made.freed_bytes += frees[num_removed]
        num_removed += 1
    made.first_removed = FIRST_DEAD + len(made.dead) - num_removed
    del made.dead[num_removed:]


def _free_bytes(store: Store) -> int:
    try:
        status = store.files.statvfs()
    except OSError as exc:
        raise disk_error(exc, store.path) from exc
    return status.f_bavail * status.f_frsize + store.env.unused_bytes()
