"""The tree process: walks the trees, computes their NAR digests, makes their directories.

It reads no file itself: the hashing processes bring their content, in the order of the walk.
"""

import os
from collections.abc import Sequence

from appliance.castore.size_dialect import SizeDialect
from appliance.errors import ImportTreeError, StoreError, StoreFullError
from appliance.importer.ahead import Ahead
from appliance.importer.child import Child
from appliance.importer.feed import Feed
from appliance.importer.hasher_pool import Hasher, HasherEndedError
from appliance.importer.object_stream import ObjectWriter
from appliance.importer.records import ObjectKind
from appliance.importer.root import Root


def start_tree_process(
    roots: Sequence[Root], hashers: Sequence[Hasher], dialect: SizeDialect
) -> tuple[Child, int]:
    """Fork the process that imports `roots`; return it, and the pipe of its objects."""
    objects, child_objects = os.pipe2(os.O_CLOEXEC)

    def work() -> None:
        os.close(objects)
        _run(roots, Feed(hashers, ObjectWriter(child_objects)), dialect)

    child = Child("the process walking the tree", work)
    os.close(child_objects)
    return child, objects


def _run(roots: Sequence[Root], feed: Feed, dialect: SizeDialect) -> None:
    try:
        for root in roots:
            _import_root(root, feed, dialect)
    except HasherEndedError as exc:
        feed.put(ObjectKind.ENDED, b"", hasher=exc.hasher)
    except StoreFullError as exc:
        feed.put(ObjectKind.FULL, str(exc).encode())
    except StoreError as exc:
        feed.put(ObjectKind.FAILED, str(exc).encode())
    feed.pass_on()


def _import_root(root: Root, feed: Feed, dialect: SizeDialect) -> None:
    try:
        ahead = Ahead(root.path, feed.pool)
        ahead.walk_on()
        # Loaded when the hashing processes have work.
        from appliance.importer.tree import import_tree  # noqa: PLC0415 - see above

        path_info = import_tree(root.name, ahead, feed, dialect)
    except ImportTreeError as exc:
        feed.abandon()
        feed.put(ObjectKind.REFUSED, str(exc).encode())
        return
    feed.put(ObjectKind.PATH_INFO, path_info)
