"""The tree process: walks the trees, computes their NAR digests, makes their directories.

It reads no file itself: the hashing processes bring their content, in the order of the walk.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import closing

from appliance.castore.size_dialect import SizeDialect
from appliance.errors import ImportTreeError, StoreError, StoreFullError
from appliance.importer.ahead import Ahead
from appliance.importer.child import Child
from appliance.importer.feed import Feed
from appliance.importer.hasher_pool import Hasher, HasherEndedError
from appliance.importer.object_stream import ObjectWriter
from appliance.importer.records import ObjectKind
from appliance.importer.root import Identity, OpenRoot, Root, open_root


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
        trees = _Trees(Feed(hashers, ObjectWriter(child_objects)), dialect, excluded)
        trees.run(roots)

    child = Child("the process walking the tree", work)
    os.close(child_objects)
    return child, objects


class _Trees:
    """Imports trees, one after the other."""

    def __init__(self, feed: Feed, dialect: SizeDialect, excluded: Mapping[Identity, str]) -> None:
        self._feed = feed
        self._dialect = dialect
        self._excluded = excluded

    def run(self, roots: Sequence[Root]) -> None:
        feed = self._feed
        try:
            for root in roots:
                self._import_root(root)
        except HasherEndedError as exc:
            feed.put(ObjectKind.ENDED, b"", hasher=exc.hasher)
        except StoreFullError as exc:
            feed.put(ObjectKind.FULL, str(exc).encode())
        except StoreError as exc:
            feed.put(ObjectKind.FAILED, str(exc).encode())
        feed.pass_on()

    def _import_root(self, root: Root) -> None:
        try:
            with closing(open_root(root.path)) as opened:
                self._feed.put(ObjectKind.PATH_INFO, self._import(root.name, opened))
        except ImportTreeError as exc:
            self._feed.put(ObjectKind.REFUSED, str(exc).encode())

    def _import(self, name: str, root: OpenRoot) -> bytes:
        """Return the content of a PATH_INFO."""
        try:
            ahead = Ahead(root, self._feed.pool, self._excluded)
            ahead.walk_on()
            # Loaded when the hashing processes have work.
            from appliance.importer.tree import import_tree  # noqa: PLC0415 - see above

            return import_tree(name, ahead, self._feed, self._dialect)
        except ImportTreeError:
            self._feed.abandon()
            raise
