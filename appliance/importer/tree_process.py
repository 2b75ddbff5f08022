"""The tree process: walks the trees, computes their NAR digests, makes their directories.

It reads no file itself: the hashing processes bring their content, in the order of the walk.
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
    """Fork the process that imports `roots`; return it, and the pipe of its objects.

    The directories `excluded` are not imported, for the reason that goes with each.
    """
    objects, child_objects = os.pipe2(os.O_CLOEXEC)

    def work() -> None:
        os.close(objects)
        _Trees(roots, Feed(hashers, ObjectWriter(child_objects)), dialect, excluded).run()

    child = Child("the process walking the tree", work)
    os.close(child_objects)
    return child, objects


class _Trees:
    """Imports trees, one after the other; one that lies in another together with that one."""

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
        # What the trees came to, or why they cannot be imported.
        self._outcomes: dict[bytes, Tree | str] = {}

    def run(self) -> None:
        feed = self._feed
        try:
            for index, root in enumerate(self._roots):
                self._tell(root, self._outcome(self._overlaps.path(index)))
        except HasherEndedError as exc:
            feed.put(ObjectKind.ENDED, b"", hasher=exc.hasher)
        except StoreFullError as exc:
            feed.put(ObjectKind.FULL, str(exc).encode())
        except StoreError as exc:
            feed.put(ObjectKind.FAILED, str(exc).encode())
        feed.pass_on()

    def _tell(self, root: Root, outcome: "Tree | str") -> None:
        if isinstance(outcome, str):
            self._feed.put(ObjectKind.REFUSED, outcome.encode())
            return
        from appliance.importer.tree import path_info_of  # noqa: PLC0415 - loaded before

        self._feed.put(ObjectKind.PATH_INFO, path_info_of(outcome, root.name))

    def _outcome(self, path: bytes) -> "Tree | str":
        # What a path lies in comes first. If that cannot be imported, or the path was not come to
        # there, it is imported alone.
        for tree in (self._overlaps.outermost(path), path):
            if path not in self._outcomes and tree not in self._outcomes:
                self._import(tree)
        return self._outcomes[path]

    def _import(self, path: bytes) -> None:
        """Import a tree, and what lies in it; keep what they come to."""
        try:
            trees = self._trees(self._overlaps.given(path), self._overlaps.parts(path))
        except ImportTreeError as exc:
            self._feed.put(ObjectKind.ABANDONED, b"")
            self._outcomes[path] = str(exc)
        else:
            for part, tree in trees.items():
                self._outcomes[_join(path, part)] = tree

    def _trees(self, path: bytes, parts: Collection[bytes]) -> "dict[bytes, Tree]":
        # Loaded here, beside what the hashing processes load.
        from appliance.importer.walk import WalkAhead, open_root  # noqa: PLC0415 - see above

        with closing(open_root(path)) as root:
            try:
                ahead = WalkAhead(root, self._feed.pool, self._excluded)
                ahead.walk_on()
                # Loaded when the hashing processes have work.
                from appliance.importer.tree import import_tree  # noqa: PLC0415 - see above

                return import_tree(ahead, self._feed, self._dialect, parts)
            except ImportTreeError:
                self._feed.abandon()
                raise


def _join(path: bytes, part: bytes) -> bytes:
    return b"%b/%b" % (path.rstrip(b"/"), part) if part else path
