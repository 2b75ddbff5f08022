"""What was put lately: the objects of each commit, and the time of each store path.

Whoever puts a tree puts its blobs first, then its Directories, then its PathInfo. Until the last of
these commits, nothing refers to what the first ones brought. So every commit notes its objects in
the database `recent_puts`, those included that the store already had, and garbage collection keeps
whatever was noted within its period of grace. Notes older than two days are removed, a few with
each commit.

A client may also have asked what the store has, and not put it again. Nothing is noted then, so the
commit of a PathInfo looks again: `lost_object` walks the tree below it if anything was removed from
the store since the client can have asked. Who puts closures may have found a path there that the
new one refers to, so `missing_reference` looks for those, too, where the client asks for it: others
put paths in any order.
"""

import struct
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

from appliance.castore.digest import DIGEST_SIZE, EMPTY_DIGEST
from appliance.db.environment import Environment, ReadTransaction, WriteTransaction
from appliance.store import schema
from appliance.store.snapshot import Snapshot

if TYPE_CHECKING:
    from appliance.castore.directory import Node

_HEAD: Final = struct.Struct("<II")
_KEY: Final = struct.Struct(">Q")
_KEPT_NS: Final = 2 * 86_400 * 10**9
_REMOVED_AT_A_TIME: Final = 8
# How long ago a client may have asked for what it now takes to be there.
_ASKED_WITHIN_NS: Final = 86_400 * 10**9


class RecentPut(NamedTuple):
    """The objects of one commit, by their digests; `time_ns` is when it was made."""

    time_ns: int
    blobs: list[bytes]
    directories: list[bytes]


class RecentPuts:
    """Notes in the store in `env` what is put; every method runs in a transaction of it."""

    def __init__(self, env: Environment) -> None:
        self._meta = env.database(schema.META)
        # None in a store of an earlier release that is open for reading only.
        self._puts = env.newer_database(schema.RECENT_PUTS)
        self._path_times = env.newer_database(schema.PATH_TIMES)

    def note(
        self,
        txn: WriteTransaction,
        blobs: Iterable[bytes],
        directories: Iterable[bytes],
        paths: Iterable[bytes],
    ) -> None:
        """Note that a commit puts these objects, and PathInfos of these store paths, now."""
        now_ns = time.time_ns()
        for path_digest in paths:
            txn.put(path_digest, schema.pack_number(now_ns), db=self._path_times)
        blobs, directories = list(blobs), list(directories)
        if not blobs and not directories:
            return
        cursor = txn.cursor(db=self._puts)
        if cursor.last():
            now_ns = max(now_ns, _KEY.unpack(cursor.key())[0] + 1)
        value = b"".join([_HEAD.pack(len(blobs), len(directories)), *blobs, *directories])
        cursor.put(_KEY.pack(now_ns), value)
        self.remove_before(txn, now_ns - _KEPT_NS, _REMOVED_AT_A_TIME)

    def remove_before(self, txn: WriteTransaction, time_ns: int, at_most: int) -> int:
        """Remove up to `at_most` notes that are older than `time_ns`, and return their number."""
        cursor = txn.cursor(db=self._puts)
        cursor.first()
        num_removed = 0
        # At the end, the key is empty.
        while num_removed < at_most and (key := cursor.key()) and _KEY.unpack(key)[0] < time_ns:
            cursor.delete()
            num_removed += 1
        return num_removed

    def since(self, txn: "ReadTransaction | WriteTransaction", time_ns: int) -> Iterator[RecentPut]:
        """Yield the notes of `time_ns` and later, oldest first."""
        if self._puts is None:
            return
        cursor = txn.cursor(db=self._puts)
        if cursor.set_range(_KEY.pack(max(0, time_ns))):
            for key, value in cursor:
                yield _unpacked(_KEY.unpack(key)[0], bytes(value))

    def last_ns(self, txn: "ReadTransaction | WriteTransaction") -> int:
        """Return the time of the last note; 0 if there is none."""
        cursor = None if self._puts is None else txn.cursor(db=self._puts)
        return _KEY.unpack(cursor.key())[0] if cursor is not None and cursor.last() else 0

    def time_of_path(self, txn: "ReadTransaction | WriteTransaction", path_digest: bytes) -> int:
        """Return when the PathInfo of a store path was last put; 0 if that is not known."""
        if self._path_times is None:
            return 0
        return schema.unpack_number(txn.get(path_digest, None, self._path_times))

    def num_sweeps(self, txn: "ReadTransaction | WriteTransaction") -> int:
        """Return the number of commits that have removed something from the store."""
        return schema.unpack_number(txn.get(schema.SWEEPS_KEY, None, self._meta))

    def may_have_lost(self, txn: WriteTransaction, num_sweeps: int | None) -> bool:
        """Whether something may be gone that a writer takes to be there.

        Args:
            txn: the transaction in which it commits.
            num_sweeps: `num_sweeps` before the writer looked for anything; None if it is a client
                that may have asked at any time.
        """
        if num_sweeps is not None:
            return num_sweeps != self.num_sweeps(txn)
        swept_at_ns = schema.unpack_number(txn.get(schema.SWEPT_AT_KEY, None, self._meta))
        return swept_at_ns > time.time_ns() - _ASKED_WITHIN_NS

    def note_sweep(self, txn: WriteTransaction) -> None:
        """Note that the commit of `txn` removes something."""
        number = schema.pack_number(self.num_sweeps(txn) + 1)
        txn.put(schema.SWEEPS_KEY, number, db=self._meta)
        txn.put(schema.SWEPT_AT_KEY, schema.pack_number(time.time_ns()), db=self._meta)


def lost_object(view: Snapshot, root: "Node") -> str | None:
    """Return which object of a tree is not in the store, for a message; None if it is whole.

    A Directory that cannot be decoded has nothing below it here; `verify` reports it.

    Raises:
        OSError: the file of a blob cannot be examined.
    """
    # Loaded late, as in `Store`: most processes that commit never come here.
    from appliance.castore.directory import DirectoryNode, FileNode  # noqa: PLC0415 - see above
    from appliance.castore.references import digests_in  # noqa: PLC0415 - see above

    if isinstance(root, FileNode):
        return None if view.has_blob(root.digest) else f"blob {root.digest}"
    if not isinstance(root, DirectoryNode):
        return None
    seen: set[bytes] = {EMPTY_DIGEST, root.digest}
    stack: list[bytes] = [root.digest]
    while stack:
        digest = stack.pop()
        encoded = view.directory(digest)
        if encoded is None:
            return f"directory {digest.hex()}"
        directories, blobs = digests_in(encoded)
        for blob in blobs:
            if blob not in seen:
                seen.add(blob)
                if not view.has_blob(blob):
                    return f"blob {blob.hex()}"
        for child in directories:
            if child not in seen:
                seen.add(child)
                stack.append(child)
    return None


def missing_reference(view: Snapshot, path_info: bytes) -> str | None:
    """Return a path that a valid PathInfo refers to and the store lacks, for a message, or None."""
    from appliance.nix.path_info import read_path_info  # noqa: PLC0415 - as in `lost_object`
    from appliance.protos import pathinfo_pb2  # noqa: PLC0415 - as in `lost_object`

    info = read_path_info(path_info)
    names = pathinfo_pb2.PathInfo.FromString(path_info).narinfo.reference_names
    for number, digest in enumerate(info.references):
        if digest != info.path.digest and view.path_info(digest) is None:
            return f"path {names[number] if number < len(names) else digest.hex()}"
    return None


def _unpacked(time_ns: int, value: bytes) -> RecentPut:
    num_blobs, num_directories = _HEAD.unpack_from(value)
    end = _HEAD.size + DIGEST_SIZE * (num_blobs + num_directories)
    digests = [value[at : at + DIGEST_SIZE] for at in range(_HEAD.size, end, DIGEST_SIZE)]
    return RecentPut(time_ns, digests[:num_blobs], digests[num_blobs:])
