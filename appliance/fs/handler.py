"""The operations of the read-only file system.

A reply about anything below the root is copied from the image of a directory, or is part of a blob.
If the store lacks it, the operation raises `NotReady` with what it wants from the supervisor, and
runs again later. The handler keeps caches only, nothing that a guest would miss if the worker died.
A nodeid comes from the guest and may be any number; one that the session was not granted is ESTALE.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from errno import EINVAL, EIO, EISDIR, ENODATA, ENOENT
from typing import Final

from appliance.castore.digest import Digest
from appliance.errors import DirectoryError, StoreError
from appliance.fs import attributes, readdir
from appliance.fs.attributes import DOTS, Statfs, root_attributes, root_entry
from appliance.fs.files import (
    ALL_LOCAL,
    Blobs,
    ByteRange,
    CachedBlobs,
    OpenBlob,
    RemoteParts,
    Usage,
)
from appliance.fs.readdir import Listing
from appliance.fuse_proto.encode import FOREVER_S, negative_entry
from appliance.fuse_proto.operations import Body, FileSlice, NotReady, Operations, Request
from appliance.images.layout import LINKS, Image, Kind
from appliance.images.places import ROOT_NODEID, CorruptSizeError, PlacedNode, Places
from appliance.nix.store_path import StorePath, StorePathError
from appliance.session.first_reads import FirstRead, FirstReads
from appliance.session.grants import Grants
from appliance.session.wants import DirectoryWanted, RootListWanted, RootNameWanted
from appliance.store.blob_cache import directory_key
from appliance.store.image_table import MadeImages
from appliance.store.snapshot import Snapshot
from appliance.store.store_reader import ReadableStore
from appliance.store.views import REGISTRATION, STORE_PATHS

_LOG: Final = logging.getLogger(__name__)
_EMPTY: Final = memoryview(b"")
# Names that a view may have in the root besides those of store paths.
_VIEW_FILES: Final = frozenset({REGISTRATION.encode(), STORE_PATHS.encode()})
# The reply to LOOKUP of a name that a directory does not have, and never will.
_NEGATIVE_ENTRY: Final = negative_entry(FOREVER_S)


class _Batch:
    # A class, as a generator with `contextmanager` would take three times as long for each batch.

    def __init__(self, handler: "Handler") -> None:
        self._handler = handler

    def __enter__(self) -> None:
        self._handler.begin()

    def __exit__(self, *_exc: object) -> None:
        self._handler.end()


class Handler(Operations):
    """The operations for one session, over one store.

    The requests of a batch share a snapshot of the store.

    Args:
        grants: what the session may see.
        store: the store, which is only read.
        is_root_listable: whether the names in the root may be listed; each can always be looked up.
            Those of a view always may.
        remote: what the supervisor fetches; if anything, the store is a cache or has no PathInfos.
        makes_images: whether images that the store lacks are made here, because no process on this
            host can put them there.
        first_reads: notes what was answered with, if the session is recorded.
    """

    def __init__(
        self,
        grants: Grants,
        store: ReadableStore,
        *,
        is_root_listable: bool,
        remote: RemoteParts = ALL_LOCAL,
        makes_images: bool = False,
        first_reads: FirstReads | None = None,
    ) -> None:
        self._grants = grants
        self._store = store
        # The nodeid of the directory with the names of store paths; -1 if a store path is the root.
        self._names_nodeid = -1 if grants.has_path_as_root else ROOT_NODEID
        self._has_view = grants.view_state > 0
        self._is_root_listable = is_root_listable or self._has_view
        usage = Usage(remote.used)
        self._blobs = CachedBlobs(store, usage) if remote.has_blobs else Blobs(store)
        self._image_usage = usage if remote.has_directories else None
        self._made_images = MadeImages() if makes_images else None
        self._first_reads = first_reads
        self._has_remote_root = remote.has_root
        self._places = Places(grants, self._image)
        self._num_revoked = grants.num_revoked
        self._images: dict[tuple[bytes, int], Image] = {}
        self._root_attr_out = b""
        self._root_attr_generation = -1
        self._statfs = Statfs(store.files.statvfs)
        self._batch = _Batch(self)
        self._snapshot: Snapshot | None = None
        self._snapshot_exit = ExitStack()

    def batch(self) -> AbstractContextManager[None]:
        """Open a batch; the bodies that operations return are valid until the end of the block."""
        return self._batch

    def begin(self) -> None:
        """Open a batch; the bodies that operations return from now on are valid until `end`."""
        if self._grants.num_revoked != self._num_revoked:
            self._num_revoked = self._grants.num_revoked
            self._places.forget()

    def end(self) -> None:
        """Close the batch; all its replies must have been delivered."""
        self._images.clear()
        if self._snapshot is not None:
            self._snapshot = None
            self._snapshot_exit.close()
        self._blobs.close_evicted()
        if self._first_reads is not None:
            self._first_reads.flush()

    def close(self) -> None:
        """Close the files that are held open; the caller closes the store."""
        self._blobs.close()

    def unanswered(self, request: memoryview) -> None:
        """Called when the kernel no longer wants the reply to `request`, given as raw bytes."""

    # --- Names and attributes ---

    def lookup(self, request: Request) -> Body:
        """See `Operations.lookup`; below the root, the kernel may cache absence for ever."""
        nodeid = request.nodeid
        name = request.names[0]
        if nodeid == self._names_nodeid:
            return self._lookup_in_root(name)
        node = self._node(nodeid)
        if name in {b".", b"/"}:
            return node.entry
        if name == b"..":
            if node.parent == self._names_nodeid:
                return self._root_entry()
            return self._node(node.parent).entry
        try:
            entry = self._places.entry(node, name)
        except CorruptSizeError as exc:
            raise self._corrupt(exc) from exc
        return _NEGATIVE_ENTRY if entry is None else entry

    def getattr(self, request: Request) -> Body:
        """See `Operations.getattr`."""
        if request.nodeid == self._names_nodeid:
            return self._root_attributes()
        return attr_out_of(self._node(request.nodeid).entry)

    def readlink(self, request: Request) -> Body:
        """See `Operations.readlink`; EINVAL unless the node is a symlink."""
        if request.nodeid == self._names_nodeid:
            raise OSError(EINVAL, "the root is not a symlink")
        node = self._node(request.nodeid)
        if node.kind != Kind.SYMLINK:
            raise OSError(EINVAL, "not a symlink")
        return node.target

    def getxattr(self, request: Request) -> Body:
        """See `Operations.getxattr`; the root and symlinks have no attributes."""
        if request.nodeid == self._names_nodeid:
            raise OSError(ENODATA, "the root has no attributes")
        node = self._node(request.nodeid)
        value = attributes.value_of(node.kind, node.digest, request.names[0])
        return attributes.sized_reply(value, request.args.size)

    def listxattr(self, request: Request) -> Body:
        """See `Operations.listxattr`.

        No attribute is listed. A program that copies a file with all listed attributes would give
        the copy a digest, which would be wrong as soon as the copy is changed.
        """
        if request.nodeid != self._names_nodeid:
            self._node(request.nodeid)
        return attributes.sized_reply(b"", request.args.size)

    def release(self, request: Request) -> Body:  # noqa: ARG002 - an open keeps no state
        """See `Operations.release`."""
        return b""

    def statfs(self, request: Request) -> Body:  # noqa: ARG002 - the same for every node
        """See `Operations.statfs`; reports the file system that the store is on."""
        return self._statfs.reply()

    # --- Contents ---

    def read(self, request: Request) -> Body:
        """See `Operations.read`; EISDIR for directories, EINVAL for symlinks."""
        args = request.args
        offset = args.offset
        if request.nodeid == self._names_nodeid:
            raise OSError(EISDIR, "the root is a directory")
        node = self._node(request.nodeid)
        if node.kind == Kind.DIRECTORY:
            raise OSError(EISDIR, "the node is a directory")
        if node.kind == Kind.SYMLINK:
            raise OSError(EINVAL, "the node is a symlink")
        left = node.size - offset
        if left <= 0:
            return _EMPTY
        part = ByteRange(offset, min(args.size, left))
        if part.length == 0:
            return _EMPTY
        content = self._blobs.content(self._in_store(), node.digest, node.size, part)
        if self._first_reads is not None:
            first = FirstRead(node.digest, time.monotonic_ns(), node.size)
            self._first_reads.note_range(first, *part)
        if isinstance(content, OpenBlob):
            return FileSlice(content.fd, *part)
        return content[offset : offset + part.length]

    def readdir(self, request: Request) -> Body:
        """See `Operations.readdir`; ENOTDIR unless the node is a directory."""
        args = request.args
        if request.nodeid == self._names_nodeid:
            return readdir.plain_stream(self._root_listing(args.offset), args.size)
        return self._listing(request).plain(args.size)

    def readdirplus(self, request: Request) -> Body:
        """See `Operations.readdirplus`; ENOTDIR unless the node is a directory."""
        args = request.args
        if request.nodeid == self._names_nodeid:
            return readdir.plus_stream(self._root_listing(args.offset), args.size)
        return self._listing(request).plus(args.size)

    def _listing(self, request: Request) -> Listing:
        directory = self._node(request.nodeid)
        parent = directory.parent
        try:
            return Listing(
                self._places,
                directory,
                parent_ino=parent if parent == self._names_nodeid else self._node(parent).ino,
                generation=self._grants.generation,
                cookie=request.args.offset,
            )
        except CorruptSizeError as exc:
            raise self._corrupt(exc) from exc

    # --- The root ---

    def _lookup_in_root(self, name: bytes) -> Body:
        if name in {b".", b"..", b"/"}:
            return self._root_entry()
        grant = self._grants.by_name(name)
        if grant is not None:
            return self._places.of_grant(grant).entry
        if not (self._has_view and name in _VIEW_FILES):
            try:
                StorePath.parse(name)
            except StorePathError as exc:
                raise OSError(ENOENT, str(exc)) from exc
        raise NotReady(RootNameWanted(name))

    def _root_listing(self, cookie: int) -> Iterator[memoryview]:
        yield from DOTS[cookie:]
        if not self._is_root_listable:
            return
        # Only a new listing waits for the root to be brought up to date. A path that is added
        # during a listing appears at its end, or in the next one.
        if cookie == 0 and self._is_root_stale():
            raise NotReady(RootListWanted())
        yield from self._grants.listing(max(cookie - LINKS, 0))

    def _is_root_stale(self) -> bool:
        if self._has_view:
            return self._grants.root_generation < self._grants.view_state
        if self._has_remote_root:
            return self._grants.root_fresh_until_ns < time.monotonic_ns()
        return self._grants.root_generation < self._in_store().generation

    def _root_attributes(self) -> bytes:
        # A guest with a cached listing of the root sends only GETATTR. So the root is brought up to
        # date here, too, and a new mtime makes the guest list it again.
        is_listed = (
            self._has_remote_root and not self._has_view and self._grants.root_fresh_until_ns
        )
        if is_listed and self._is_root_listable and self._is_root_stale():
            raise NotReady(RootListWanted())
        generation = self._root_generation()
        if generation != self._root_attr_generation:
            self._root_attr_out = root_attributes(generation, is_listable=self._is_root_listable)
            self._root_attr_generation = generation
        return self._root_attr_out

    def _root_entry(self) -> bytes:
        return root_entry(self._root_generation(), is_listable=self._is_root_listable)

    def _root_generation(self) -> int:
        if self._has_view:
            return self._grants.view_state
        if self._has_remote_root:
            return len(self._grants)
        return self._in_store().generation

    # --- Nodes and images ---

    def _node(self, nodeid: int) -> PlacedNode:
        try:
            return self._places.node(nodeid)
        except CorruptSizeError as exc:
            raise self._corrupt(exc) from exc

    def _in_store(self) -> Snapshot:
        # Opened by the first request of a batch that needs it, and closed by `end`.
        snapshot = self._snapshot
        if snapshot is None:
            snapshot = self._snapshot = self._snapshot_exit.enter_context(self._store.snapshot())
        return snapshot

    def _image(self, digest: bytes, piece: int) -> Image:
        image = self._images.get((digest, piece))
        if image is None:
            image = self._images[digest, piece] = Image(self._image_bytes(digest, piece))
        return image

    def _image_bytes(self, digest: bytes, piece: int) -> memoryview:
        if self._first_reads is None:
            return self._unnoted_image_bytes(digest, piece)
        found = self._unnoted_image_bytes(digest, piece)
        self._first_reads.note(FirstRead(digest, time.monotonic_ns()))
        return found

    def _unnoted_image_bytes(self, digest: bytes, piece: int) -> memoryview:
        found = self._in_store().image(digest, piece)
        if found is not None:
            if self._image_usage is not None:
                self._image_usage.note(directory_key(digest))
            return found
        if self._made_images is None:
            raise NotReady(DirectoryWanted(digest))
        try:
            return self._made_images.piece(self._in_store(), digest, piece)
        except (DirectoryError, StoreError) as exc:
            _LOG.error("directory %s: %s", Digest(digest), exc)
            raise OSError(EIO, str(exc)) from exc

    def _corrupt(self, exc: CorruptSizeError) -> OSError:
        directory = exc.directory
        _LOG.error(
            "directory %s, nodeid %#x: its node states size %d, but its entries take up %d places",
            Digest(directory.digest),
            directory.nodeid,
            directory.size,
            exc.span,
        )
        return OSError(EIO, "the entries of a directory take up more places than its node states")


def attr_out_of(entry: bytes) -> bytes:
    """Return the reply to GETATTR of a node, given its packed `EntryOut`."""
    return _ATTR_VALID + entry[40:]


_ATTR_VALID: Final = FOREVER_S.to_bytes(8, "little") + bytes(8)
