"""The directory service of an object store; `object_layout` says where what is.

A closure is one object under the digest of its root, so a Directory inside it cannot be asked for
by its own digest. Whoever walks through a tree does just that, so closures that were read or put
are kept for a while, and it is remembered in which of them a Directory is.
"""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable, Mapping
from itertools import islice
from typing import Final

from appliance.castore.closure import ClosureChecker, TopologicalOrder
from appliance.castore.digest import EMPTY_DIGEST, Digest
from appliance.castore.directory import Directory
from appliance.errors import (
    ContentMissingError,
    CorruptBlobError,
    DirectoryError,
    InvalidRequestError,
)
from appliance.services.contracts import DirectoryPutter
from appliance.services.lmdb_directories import put_one
from appliance.services.object_bucket import Bucket
from appliance.services.object_layout import (
    CLOSURE_OBJECT_MAX,
    closure_key,
    compress_closure,
    directories_untrusted,
)

# Directories that are decompressed in one visit to a thread.
_VISIT_DIRECTORIES: Final = 256
# Closures are kept up to this many bytes of Directories altogether, and a larger one not at all.
_KEPT_BYTES_MAX: Final = 32 << 20
# Directories of which it is remembered in which closure they are.
_PLACES_MAX: Final = 1 << 17


class ObjectDirectoryService:
    """The closures in a bucket, verified as they are read."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._closures = _RecentClosures()
        self._loading = asyncio.Lock()

    async def get(self, digest: Digest) -> Directory | None:
        """Return one directory: the root of a closure, or one inside a closure that was read."""
        if digest == EMPTY_DIGEST:
            return Directory()
        async with self._loading:
            encoded = self._closures.find(digest)
            if encoded is not None:
                return Directory.from_bytes(encoded)
            return await self._load(self._closures.root_of(digest) or digest, digest)

    async def get_recursive(self, digest: Digest) -> AsyncIterator[Directory]:
        """Yield the directory and all below it, as the object has them: parents first."""
        if digest == EMPTY_DIGEST:
            yield Directory()
            return
        name = f"{self._bucket.name}: {closure_key(digest)}"
        compressed = await self._bucket.get(closure_key(digest), CLOSURE_OBJECT_MAX)
        if compressed is None:
            return
        expected, received = {digest}, set[Digest]()
        encoded = directories_untrusted(compressed)
        while True:
            try:
                part = await asyncio.to_thread(_decoded, encoded)
            except (CorruptBlobError, DirectoryError) as exc:
                raise CorruptBlobError(f"{name}: {exc}") from exc
            if not part:
                break
            for directory in part:
                actual = directory.digest()
                if actual in received:
                    continue
                if actual not in expected:
                    raise CorruptBlobError(f"{name}: {actual} is no directory below its root")
                expected.remove(actual)
                received.add(actual)
                below = {node.digest for node in directory.directories}
                expected |= below - received
                self._closures.note(below, digest)
                yield directory
        expected.discard(EMPTY_DIGEST)
        if expected:
            raise ContentMissingError(f"{name}: {len(expected)} directories are missing from it")

    async def put(self, directory: Directory) -> Digest:
        """Put a directory without subdirectories."""
        return await put_one(self, directory)

    def put_multiple_start(self) -> DirectoryPutter:
        """Begin a closure."""
        return _ObjectDirectoryPutter(self._bucket, self._closures)

    async def _load(self, root: Digest, wanted: Digest) -> Directory | None:
        """Read a closure, keep it if it is small enough, and return a directory in it."""
        found = None
        kept: dict[Digest, bytes] = {}
        num_bytes = 0
        async for directory in self.get_recursive(root):
            digest = directory.digest()
            if digest == wanted:
                found = directory
            num_bytes += len(directory.to_bytes())
            if num_bytes <= _KEPT_BYTES_MAX:
                kept[digest] = directory.to_bytes()
            elif found is not None:
                return found
        if kept and num_bytes <= _KEPT_BYTES_MAX:
            self._closures.add(root, kept)
        return found


def _decoded(encoded: Iterable[bytes]) -> list[Directory]:
    return [Directory.from_bytes(one) for one in islice(encoded, _VISIT_DIRECTORIES)]


class _RecentClosures:
    """Closures that were read or put last, and in which closure a Directory is."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Digest, Mapping[Digest, bytes]] = OrderedDict()
        self._num_bytes = 0
        self._roots: OrderedDict[Digest, Digest] = OrderedDict()

    def find(self, digest: Digest) -> bytes | None:
        root = self._roots.get(digest, digest)
        closure = self._kept.get(root)
        if closure is None:
            return None
        self._kept.move_to_end(root)
        return closure.get(digest)

    def root_of(self, digest: Digest) -> Digest | None:
        return self._roots.get(digest)

    def note(self, digests: Iterable[Digest], root: Digest) -> None:
        for digest in digests:
            if digest != EMPTY_DIGEST:
                self._roots[digest] = root
        while len(self._roots) > _PLACES_MAX:
            self._roots.popitem(last=False)

    def add(self, root: Digest, closure: Mapping[Digest, bytes]) -> None:
        self.note((digest for digest in closure if digest != root), root)
        size = sum(map(len, closure.values()))
        if size > _KEPT_BYTES_MAX or root in self._kept:
            return
        self._kept[root] = closure
        self._num_bytes += size
        while self._num_bytes > _KEPT_BYTES_MAX:
            _root, oldest = self._kept.popitem(last=False)
            self._num_bytes -= sum(map(len, oldest.values()))


class _ObjectDirectoryPutter:
    """Keeps a closure until it is complete, and puts it as one object."""

    def __init__(self, bucket: Bucket, closures: _RecentClosures) -> None:
        self._bucket = bucket
        self._closures = closures
        self._checker = ClosureChecker()
        self._encoded: dict[Digest, bytes] = {}

    async def put(self, directory: Directory) -> None:
        if self._checker.add(directory):
            self._encoded[directory.digest()] = directory.to_bytes()

    async def close(self) -> Digest:
        root = self._checker.finish()
        key = closure_key(root)
        if not await self._bucket.has(key):
            await self._bucket.put(key, await asyncio.to_thread(self._compressed, root))
        self._closures.add(root, self._encoded)
        return root

    async def abort(self) -> None:
        # What was closed is in use elsewhere.
        self._encoded = {}

    def _compressed(self, root: Digest) -> bytes:
        order = TopologicalOrder(root)
        while (digest := order.next_undiscovered()) is not None:
            order.discover(self._directory(digest))
        ordered = []
        while (digest := order.next_ready()) is not None:
            order.release(self._directory(digest))
            ordered.append(self._encoded[digest])
        compressed = compress_closure(ordered)
        if len(compressed) > CLOSURE_OBJECT_MAX:
            raise InvalidRequestError(
                f"directory {root}: its closure has {len(compressed)} bytes, at most "
                f"{CLOSURE_OBJECT_MAX} are read again"
            )
        return compressed

    def _directory(self, digest: Digest) -> Directory:
        return Directory.from_bytes(self._encoded[digest])
