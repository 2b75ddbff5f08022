"""Removing what a plan found to be dead, in short transactions; `collection` has the theory."""

import fcntl
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final, TypeAlias

from appliance.collector.marking import Marks
from appliance.collector.path_graph import PathGraph, in_parts
from appliance.db.environment import ReadTransaction, WriteTransaction
from appliance.errors import disk_error
from appliance.nix.path_info_rules import nar_key
from appliance.store import removal, schema
from appliance.store.root_lists import open_roots_lock
from appliance.store.store import Store

_IsDead: TypeAlias = "Callable[[ReadTransaction | WriteTransaction, bytes], bool]"

# How long a transaction may take about, and how many objects it removes.
_COMMIT_S: Final = 0.05
_OBJECTS_MIN: Final = 64
_OBJECTS_MAX: Final = 8192
_FIRST_OBJECTS: Final = 512
_PUT_MEANWHILE: Final = "put meanwhile"


@dataclass(slots=True)
class Swept:
    """What a collection has removed."""

    num_paths: int = 0
    num_directories: int = 0
    num_blobs: int = 0
    num_files: int = 0
    """Files of blobs, those included that a killed process had left."""
    freed_bytes: int = 0
    """Stored bytes of Directories, images and blobs."""


class Sweep:
    """One sweep of a store.

    Args:
        store: the store, open for writing (lent).
        graph: its paths, which follow the store from here on.
        marks: the marks of the plan.
        first_removed: objects with this mark or a higher one are dead, as are those without.
        recent_ns: notes of puts (`RecentPuts.since`) from this time on have not been marked.

    Attributes:
        swept: what was removed so far.
    """

    def __init__(
        self, store: Store, graph: PathGraph, marks: Marks, first_removed: int, recent_ns: int
    ) -> None:
        self.swept = Swept()
        self._store = store
        self._graph = graph
        self._marks = marks
        self._first_removed = first_removed
        self._recent_ns = recent_ns
        self._num_objects = _FIRST_OBJECTS
        # The paths that are to go and have not been removed yet.
        self._going: set[bytes] = set()
        # Paths that were put since the plan.
        self._added: dict[bytes, str] = {}

    # --- Store paths ---

    def remove_paths(
        self, dead: Iterable[bytes], roots_now: Callable[[], dict[bytes, str]]
    ) -> None:
        """Remove paths in this order, without those that have become live.

        Args:
            dead: digests of the paths.
            roots_now: returns the roots of this moment; called with the lock of the roots held.

        Raises:
            StoreError: LMDB or the disk failed, or a root breaks a rule.
        """
        dead = list(dead)
        self._going = set(dead)
        for part in in_parts(dead):
            removed = self._remove_part(part, roots_now)
            self.swept.num_paths += len(removed)
            self._going.difference_update(removed)
            for digest in removed:
                del self._graph.paths[digest]

    def _remove_part(
        self, part: list[bytes], roots_now: Callable[[], dict[bytes, str]]
    ) -> list[bytes]:
        # The lock of the roots is held from reading them to the commit. It is taken inside the
        # transaction, so that sessions do not wait for it while this waits for other writers. But
        # who has it may be waiting for the transaction, so this does not wait for it there.
        lock = open_roots_lock(self._store.path)

        def work(txn: WriteTransaction) -> list[bytes] | None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            return self._remove_paths(txn, part, roots_now())

        try:
            removed = self._store.env.write(work)
            while removed is None:
                fcntl.flock(lock, fcntl.LOCK_EX)
                removed = self._store.env.write(work)
            return removed
        finally:
            os.close(lock)

    def _remove_paths(
        self, txn: WriteTransaction, part: list[bytes], roots: dict[bytes, str]
    ) -> list[bytes]:
        # The work of a transaction may be repeated, so only its commit changes `_going`.
        self._follow(txn)
        self._note_puts(txn, part)
        live = self._graph.closure(roots | self._added)
        view = self._store.view_in(txn)
        for digest in [digest for digest in self._going if digest in live]:
            self._marks.mark(view, self._graph.paths[digest].node)
            self._going.discard(digest)
        removed = [digest for digest in part if digest in self._going]
        for digest in removed:
            removal.remove_path(self._store, txn, digest)
        if removed:
            self._store.recent_puts.note_sweep(txn)
        return removed

    def _note_puts(self, txn: WriteTransaction, part: list[bytes]) -> None:
        # A path that is put as it was gets a new time, but no entry of the log.
        for digest in part:
            known = self._graph.paths[digest]
            put_ns = self._store.recent_puts.time_of_path(txn, digest)
            if put_ns != known.put_ns:
                self._graph.paths[digest] = known._replace(put_ns=put_ns)
                self._added[digest] = _PUT_MEANWHILE

    # --- Objects ---

    def remove_directories(self) -> None:
        """Remove dead Directories with their images.

        Raises:
            StoreError: LMDB failed.
        """
        marks, first = self._marks, self._first_removed
        dead = (
            key
            for key in removal.keys(self._store, schema.DIRECTORIES)
            if marks.is_dead_directory(key, first)
        )

        def remove(txn: WriteTransaction, part: list[bytes]) -> None:
            for digest in part:
                if marks.is_dead_directory(digest, first):
                    number = marks.directories.number_of(digest)
                    self.swept.freed_bytes += marks.directories.sizes[number]
                    self.swept.num_directories += removal.remove_directory(self._store, txn, digest)

        self._in_transactions(dead, remove)

    def remove_blobs(self) -> None:
        """Remove dead blobs: their records, then their files.

        Raises:
            StoreError: LMDB or the disk failed.
        """
        marks, first = self._marks, self._first_removed
        dead = (
            key for key in removal.keys(self._store, schema.BLOBS) if marks.is_dead_blob(key, first)
        )

        def remove(txn: WriteTransaction, part: list[bytes]) -> list[bytes]:
            in_files = []
            for digest in part:
                if marks.is_dead_blob(digest, first):
                    self.swept.freed_bytes += marks.blobs.sizes[marks.blobs.number_of(digest)]
                    self.swept.num_blobs += 1
                    if removal.remove_blob(self._store, txn, digest):
                        in_files.append(digest)
            return in_files

        self._in_transactions(dead, remove)

    def remove_stray_files(self) -> None:
        """Remove the files of blobs without records.

        Raises:
            StoreError: LMDB or the disk failed.
        """
        for part in in_parts(self._stray_files(), _OBJECTS_MIN):
            self._remove_files(part)

    def remove_rest(self, before_ns: int) -> None:
        """Remove what belongs to removed objects and paths.

        Args:
            before_ns: notes of puts that are older than this are removed, too.

        Raises:
            StoreError: LMDB failed.
        """
        store = self._store

        def has_no(table: bytes) -> _IsDead:
            return lambda txn, key: not removal.has(store, txn, table, key)

        self._remove_keys(
            schema.IMAGES,
            removal.keys(store, schema.IMAGES),
            lambda txn, key: (
                not removal.has(store, txn, schema.DIRECTORIES, removal.digest_of_image(key))
            ),
        )
        self._remove_keys(
            schema.PATH_TIMES, removal.keys(store, schema.PATH_TIMES), has_no(schema.PATH_INFOS)
        )
        self._remove_keys(
            schema.PATH_INFO_LOG,
            removal.keys(store, schema.PATH_INFO_LOG),
            lambda txn, key: removal.is_log_entry_stale(store, txn, key),
        )
        # A NAR info that was calculated for a path which is put only now is calculated again.
        named = {nar_key(known.node) for known in self._graph.paths.values()}
        self._remove_keys(
            schema.NAR_INFOS,
            removal.keys(store, schema.NAR_INFOS),
            lambda _txn, key: key not in named,
        )
        while store.env.write(
            lambda txn: store.recent_puts.remove_before(txn, before_ns, _OBJECTS_MIN)
        ):
            pass

    def _in_transactions(
        self,
        dead: Iterator[bytes],
        remove: Callable[[WriteTransaction, list[bytes]], list[bytes] | None],
    ) -> None:
        # As many objects at a time as can be removed in about _COMMIT_S.
        while part := list(islice(dead, self._num_objects)):
            before = Swept(**_fields(self.swept))

            def work(txn: WriteTransaction, part: list[bytes] = part) -> list[bytes]:
                self.swept = Swept(**_fields(before))  # noqa: B023 - called at once
                self._follow(txn)
                self._store.recent_puts.note_sweep(txn)
                return remove(txn, part) or []

            started_s = time.monotonic()
            in_files = self._store.env.write(work)
            if time.monotonic() - started_s > _COMMIT_S:
                self._num_objects = max(_OBJECTS_MIN, self._num_objects // 2)
            else:
                self._num_objects = min(_OBJECTS_MAX, self._num_objects * 2)
            if in_files:
                self._remove_files(in_files)

    def _follow(self, txn: WriteTransaction) -> None:
        """Mark what was put since the plan or the last call."""
        view = self._store.view_in(txn)
        for added in self._graph.follow(txn, view):
            self._added[added.path.digest] = _PUT_MEANWHILE
            self._marks.mark(view, added.node)
        for put in self._store.recent_puts.since(txn, self._recent_ns):
            self._recent_ns = put.time_ns + 1
            for blob in put.blobs:
                self._marks.mark_blob(blob)
            for directory in put.directories:
                self._marks.mark_directory(view, directory)

    def _remove_files(self, digests: list[bytes]) -> None:
        def work(txn: WriteTransaction) -> int:
            return sum(self._store.remove_stray_file(txn, digest) for digest in digests)

        try:
            self.swept.num_files += self._store.env.write(work)
        except OSError as exc:
            raise disk_error(exc, self._store.path) from exc

    def _stray_files(self) -> Iterator[bytes]:
        for digests in self._store.files.digests():
            with self._store.snapshot() as snapshot:
                stray = [digest for digest in digests if snapshot.blob(digest) is None]
            yield from stray

    def _remove_keys(
        self,
        table: bytes,
        keys: Iterable[bytes],
        is_dead: _IsDead,
    ) -> None:
        # Looked at first in a snapshot, so that a table of which nothing goes is only read.
        for part in in_parts(keys, _FIRST_OBJECTS):
            with self._store.env.read() as txn:
                dead = [key for key in part if is_dead(txn, key)]
            if dead:
                self._store.env.write(
                    lambda txn: removal.remove_keys(self._store, txn, table, dead, is_dead)  # noqa: B023 - called at once
                )


def _fields(swept: Swept) -> dict[str, int]:
    return {name: getattr(swept, name) for name in Swept.__slots__}
