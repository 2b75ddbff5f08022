"""The read-only file system: every FUSE operation that has an answer of its own.

An answer below the root is copied from the node index, or is a piece of a blob; what the index
lacks is wanted from the resolver (`NotReady`) and the request runs again. The handler itself holds
nothing a guest could miss: open blob files are a cache. A nodeid comes from the guest and may be
any number: one the index never gave out is ESTALE.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from errno import EINVAL, EISDIR, ENODATA, ENOENT, ENOTDIR, EPERM, ESTALE
from typing import Final

from appliance.castore.store_path import StorePath, StorePathError
from appliance.fs import readdir, xattrs
from appliance.fs.blobs import Blobs, OpenBlob
from appliance.fs.cached_blobs import ALL_LOCAL, CachedBlobs, RemoteParts
from appliance.fs.statfs import Statfs
from appliance.fuse_proto.operations import Body, FileSlice, NotReady, Operations, Request
from appliance.index import images
from appliance.index.children import Kind
from appliance.index.images import NUMBER_MASK, ROOT_NODEID
from appliance.index.node_index import NodeIndex
from appliance.index.wants import DirectoryWanted, RootListWanted, RootNameWanted
from appliance.store.lmdb_env import ReadTransaction
from appliance.store.store import Store

_EMPTY: Final = memoryview(b"")


class _Batch:
    # What `contextmanager` makes of a generator costs three times as much, once per batch.

    def __init__(self, handler: "Handler") -> None:
        self._handler = handler

    def __enter__(self) -> None:
        self._handler.begin()

    def __exit__(self, *_exc: object) -> None:
        self._handler.end()


class Handler(Operations):
    """The operations over one index and one store; a batch of requests shares a snapshot of each.

    Args:
        index: the node index; read only.
        store: the store it was made from; read only.
        is_root_listable: whether the names in the root may be listed; looked up they always may be.
        remote: what the resolver has to fetch; then the store is a cache, or has no PathInfos.
    """

    def __init__(
        self,
        index: NodeIndex,
        store: Store,
        *,
        is_root_listable: bool,
        remote: RemoteParts = ALL_LOCAL,
    ) -> None:
        self._index = index
        self._store = store
        self._is_root_listable = is_root_listable
        self._blobs = CachedBlobs(store, remote.used) if remote.has_blobs else Blobs(store)
        self._has_remote_root = remote.has_root
        self._root_attr_out = b""
        self._root_attr_generation = -1
        self._statfs = Statfs(store.path)
        self._batch = _Batch(self)
        self._snapshots: list[AbstractContextManager[ReadTransaction]] = []
        self._txn: ReadTransaction
        self._store_txn: ReadTransaction | None = None

    def batch(self) -> AbstractContextManager[None]:
        """Answer requests inside; what operations return holds until the end of the block."""
        return self._batch

    def begin(self) -> None:
        """Open a batch; what operations return from now on holds until `end`."""
        snapshot = self._index.read()
        self._txn = snapshot.__enter__()
        self._snapshots.append(snapshot)

    def end(self) -> None:
        """Close the batch; every reply of it must have been delivered."""
        self._store_txn = None
        while self._snapshots:
            self._snapshots.pop().__exit__(None, None, None)
        self._blobs.close_evicted()

    def close(self) -> None:
        """Close the files held open; the index and the store stay the caller's."""
        self._blobs.close()

    def unanswered(self, request: memoryview) -> None:
        """Hear that the reply to `request` (all of it) found nobody who waits for it."""

    # --- Names and attributes ---

    def lookup(self, request: Request) -> Body:
        """See `Operations.lookup`; below the root absence is remembered for ever too."""
        nodeid = request.nodeid
        name = request.names[0]
        if nodeid == ROOT_NODEID:
            return self._lookup_in_root(name)
        image = self._image(nodeid)
        word = images.find_record(image, name)
        return images.entry_at(image, word, name, nodeid) if word else images.NEGATIVE_ENTRY

    def getattr(self, request: Request) -> Body:
        """See `Operations.getattr`."""
        if request.nodeid == ROOT_NODEID:
            return self._root_attributes()
        return images.attr_out_of(self._content(request.nodeid))

    def readlink(self, request: Request) -> Body:
        """See `Operations.readlink`; EINVAL for all but symlinks."""
        if request.nodeid == ROOT_NODEID:
            raise OSError(EINVAL, "the root is no symlink")
        content = self._content(request.nodeid)
        if images.kind_of(content) != Kind.SYMLINK:
            raise OSError(EINVAL, "not a symlink")
        return images.target_of(content)

    def getxattr(self, request: Request) -> Body:
        """See `Operations.getxattr`; the root and symlinks have none."""
        if request.nodeid == ROOT_NODEID:
            raise OSError(ENODATA, "the root has no attributes")
        content = self._content(request.nodeid)
        value = xattrs.value_of(
            images.kind_of(content), images.digest_of(content), request.names[0]
        )
        return xattrs.sized_reply(value, request.args.size)

    def listxattr(self, request: Request) -> Body:
        """See `Operations.listxattr`; the root and symlinks have none."""
        names = b""
        if request.nodeid != ROOT_NODEID:
            names = xattrs.names_of(images.kind_of(self._content(request.nodeid)))
        return xattrs.sized_reply(names, request.args.size)

    def release(self, request: Request) -> Body:  # noqa: ARG002 - nothing was kept for the open
        """See `Operations.release`."""
        return b""

    def statfs(self, request: Request) -> Body:  # noqa: ARG002 - one file system, one answer
        """See `Operations.statfs`; the figures of the file system that holds the store."""
        return self._statfs.reply()

    # --- Contents ---

    def read(self, request: Request) -> Body:
        """See `Operations.read`; EISDIR for directories, EINVAL for symlinks."""
        args = request.args
        offset = args.offset
        number = request.nodeid & NUMBER_MASK
        content: memoryview | OpenBlob | None = self._blobs.opened(number)
        if content is None:
            content = self._file_content(request.nodeid, offset)
        if isinstance(content, OpenBlob):
            left = content.size - offset
            return FileSlice(content.fd, offset, min(args.size, left)) if left > 0 else b""
        return content[offset : offset + args.size]

    def _file_content(self, nodeid: int, offset: int) -> memoryview | OpenBlob:
        if nodeid == ROOT_NODEID:
            raise OSError(EISDIR, "the root")
        content = self._content(nodeid)
        kind = images.kind_of(content)
        if kind == Kind.DIRECTORY:
            raise OSError(EISDIR, "a directory")
        if kind == Kind.SYMLINK:
            raise OSError(EINVAL, "a symlink")
        size = images.size_of(content)
        if offset >= size:
            return _EMPTY
        digest = images.digest_of(content)
        blob = self._blobs.content(self._in_store(), nodeid & NUMBER_MASK, digest, size)
        return blob if isinstance(blob, OpenBlob) else blob[:size]

    def readdir(self, request: Request) -> Body:
        """See `Operations.readdir`; ENOTDIR for all but directories."""
        args = request.args
        if request.nodeid == ROOT_NODEID:
            return readdir.plain_stream(self._root_listing(args.offset), args.size)
        return readdir.plain_slice(self._image(request.nodeid), args.offset, args.size)

    def readdirplus(self, request: Request) -> Body:
        """See `Operations.readdirplus`; ENOTDIR for all but directories."""
        args = request.args
        if request.nodeid == ROOT_NODEID:
            return readdir.plus_stream(self._root_listing(args.offset), args.size)
        image = self._image(request.nodeid)
        return readdir.plus_slice(image, request.nodeid, args.offset, args.size)

    # --- The root, and what all share ---

    def _lookup_in_root(self, name: bytes) -> Body:
        entry = self._index.root_entry(self._txn, name)
        if entry is None:
            try:
                StorePath.parse(name)
            except StorePathError as exc:
                raise OSError(ENOENT, str(exc)) from exc
            raise NotReady(RootNameWanted(name))
        return entry

    def _root_listing(self, cookie: int) -> Iterator[memoryview]:
        if not self._is_root_listable:
            raise OSError(EPERM, "listing the root is switched off")
        # A listing that has begun goes on: what is added meanwhile comes at its end, or next time.
        if cookie == 0 and self._is_root_stale():
            raise NotReady(RootListWanted())
        return self._index.root_listing(self._txn, cookie)

    def _is_root_stale(self) -> bool:
        if self._has_remote_root:
            return self._index.root_fresh_until_ns(self._txn) < time.monotonic_ns()
        reached = self._index.root_generation(self._txn)
        return reached < self._store.generation(self._in_store())

    def _root_attributes(self) -> bytes:
        if self._has_remote_root:
            # A guest that keeps the listing asks only for this: so it hears of what was added.
            if self._index.root_fresh_until_ns(self._txn) and self._is_root_stale():
                raise NotReady(RootListWanted())
            generation = self._index.num_root_entries(self._txn)
        else:
            generation = self._store.generation(self._in_store())
        if generation != self._root_attr_generation:
            self._root_attr_out = images.root_attr_out(generation)
            self._root_attr_generation = generation
        return self._root_attr_out

    def _in_store(self) -> ReadTransaction:
        # Opened by the first request that needs it, so never older than the index's snapshot.
        if self._store_txn is None:
            snapshot = self._store.read()
            self._store_txn = snapshot.__enter__()
            self._snapshots.append(snapshot)
        return self._store_txn

    def _content(self, nodeid: int) -> memoryview:
        content = self._index.record(self._txn, nodeid & NUMBER_MASK)
        if content is None:
            raise OSError(ESTALE, f"nodeid {nodeid:#x}")
        return content

    def _image(self, nodeid: int) -> memoryview:
        number = nodeid & NUMBER_MASK
        image = self._index.image(self._txn, number)
        if image is None:
            if images.kind_of(self._content(nodeid)) != Kind.DIRECTORY:
                raise OSError(ENOTDIR, f"nodeid {nodeid:#x}")
            raise NotReady(DirectoryWanted(number))
        return image
