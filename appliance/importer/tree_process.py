"""The tree process: imports trees, one after the other, and reports the outcome of each.

It lists directories but reads no files; it receives these from the hashing processes. `tree.py` has
the import of one tree.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from appliance.castore.size_dialect import SizeDialect
from appliance.errors import ImportTreeError, StoreError, StoreFullError
from appliance.importer.hasher_pool import Hasher, HasherEndedError
from appliance.importer.records import ObjectKind
from appliance.importer.roots import Identity, Overlaps, Root
from appliance.importer.stream import Feed, ObjectWriter
from appliance.system.process import Child

if TYPE_CHECKING:
    from appliance.importer.tree import Tree


def start_tree_process(
    roots: Sequence[Root],
    hashers: Sequence[Hasher],
    dialect: SizeDialect,
    excluded: Mapping[Identity, str],
) -> tuple[Child, int]:
    """Fork the tree process.

    Args:
        roots: the paths to import.
        hashers: the hashing processes, which no other process may use.
        dialect: how the entries of directories are counted.
        excluded: directories that must not be imported, each with the reason.

    Returns:
        The process, and the read end of the pipe of its objects, which the caller owns.
    """
    objects, child_objects = os.pipe2(os.O_CLOEXEC)

    def work() -> None:
        os.close(objects)
        _Trees(roots, Feed(hashers, ObjectWriter(child_objects)), dialect, excluded).run()

    child = Child("the process walking the tree", work)
    os.close(child_objects)
    return child, objects


class _Trees:
    """Imports the trees; a tree that lies in another one is imported together with it."""

    def __init__(
        self,
        roots: Sequence[Root],
        feed: Feed,
        dialect: SizeDialect,
        excluded: Mapping[Identity, str],
    ) -> None:
        self._roots = roots
        self._feed = feed
        self._dialect = dialect
        self._excluded = excluded
        self._overlaps = Overlaps(roots)
        # By resolved path: the imported tree, or why it cannot be imported.
        self._outcomes: dict[bytes, Tree | str] = {}

    def run(self) -> None:
        feed = self._feed
        try:
            for index, root in enumerate(self._roots):
                self._report(root, self._outcome(self._overlaps.path(index)))
        except HasherEndedError as exc:
            feed.put(ObjectKind.ENDED, b"", hasher=exc.hasher)
        except StoreFullError as exc:
            feed.put(ObjectKind.FULL, str(exc).encode())
        except StoreError as exc:
            feed.put(ObjectKind.FAILED, str(exc).encode())
        feed.pass_on()

    def _report(self, root: Root, outcome: "Tree | str") -> None:
        if isinstance(outcome, str):
            self._feed.put(ObjectKind.REFUSED, outcome.encode())
            return
        from appliance.importer.tree import path_info_of  # noqa: PLC0415 - was imported before

        self._feed.put(ObjectKind.PATH_INFO, path_info_of(outcome, root.name))

    def _outcome(self, path: bytes) -> "Tree | str":
        # Import the outermost tree that `path` lies in. If that cannot be imported, or if the walk
        # did not find `path` in it, import `path` alone.
        for tree in (self._overlaps.outermost(path), path):
            if path not in self._outcomes and tree not in self._outcomes:
                self._import(tree)
        return self._outcomes[path]

    def _import(self, path: bytes) -> None:
        """Import a tree and the given paths in it, and record their outcomes."""
        try:
            trees = self._trees(self._overlaps.given(path), self._overlaps.parts(path))
        except ImportTreeError as exc:
            self._feed.put(ObjectKind.ABANDONED, b"")
            self._outcomes[path] = str(exc)
        else:
            for part, tree in trees.items():
                self._outcomes[_join(path, part)] = tree

    def _trees(self, path: bytes, parts: Collection[bytes]) -> "dict[bytes, Tree]":
        # Imported here, while the hashing processes import what they need.
        from appliance.importer.walk import LookaheadWalk, open_root  # noqa: PLC0415 - see above

        with closing(open_root(path)) as root:
            try:
                walk = LookaheadWalk(root, self._feed.pool, self._excluded)
                walk.walk_on()
                # Imported once the hashing processes have been sent requests.
                from appliance.importer.tree import import_tree  # noqa: PLC0415 - see above

                return import_tree(walk, self._feed, self._dialect, parts)
            except ImportTreeError:
                self._feed.abandon()
                raise


def _join(path: bytes, part: bytes) -> bytes:
    return b"%b/%b" % (path.rstrip(b"/"), part) if part else path
