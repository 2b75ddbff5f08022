"""NARs of trees in a local store, rendered by one thread without an event loop.

`nar_render` asks services for each blob and each Directory, which takes a switch of threads each
time. Here the thread that renders reads the store itself.

A NAR is rendered in pieces. The parts of a piece come from one snapshot of the store, which is
closed before the piece is yielded: a consumer that stops reading keeps no pages of LMDB from being
used again. Nothing can change between two snapshots, since the digests in a Directory determine all
that is below it.

All content is checked against its digest: Directories and small blobs before any of them is
yielded, blobs in files while they are read. A part of a blob in a file, where a range begins or
ends within it, is yielded unchecked.
"""

import os
import stat
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from operator import attrgetter
from typing import Final, NamedTuple, TypeAlias

from blake3 import blake3

from appliance.castore.digest import Digest
from appliance.castore.directory import Directory, DirectoryNode, FileNode, Node, SymlinkNode
from appliance.errors import (
    ContentMissingError,
    CorruptBlobError,
    DirectoryError,
    NarError,
    StoreError,
    WrongDigestError,
)
from appliance.nix import nar
from appliance.nix.path_info import read_path_info
from appliance.services.nar_extent import ROOT_SIZE, Extent, Part, body_size, part_of
from appliance.services.paths_in_store import display_path, parse_path
from appliance.store.blob_files import BlobFile
from appliance.store.snapshot import Snapshot
from appliance.store.store import Store
from appliance.system import libc

# In bytes. A piece of small files has about this size, and a part of a large file at most. It stays
# in the processor's cache from being read to being written.
PIECE_SIZE: Final = 1 << 18
# What an entry counts in a piece besides its content, in bytes.
_ENTRY_COST: Final = 256
# The number of Directories kept decoded from measuring to rendering, plus that of their entries.
_KEPT_ENTRIES: Final = 1 << 16

Piece: TypeAlias = "bytes | memoryview"

_by_name = attrgetter("name")


class Measured(NamedTuple):
    """How large a tree is, and how many bytes each of its directories takes in a NAR."""

    extent: Extent
    sizes: dict[Digest, int]


def keep_piece_memory() -> None:
    """Have malloc keep the memory of a piece for the next one, instead of faulting it in anew."""
    libc.tune_malloc(mmap_threshold=4 * PIECE_SIZE, trim_threshold=16 * PIECE_SIZE, num_arenas=2)


def find_node(store: Store, path: str) -> Node:
    """Return the node at a store path, or below one; symlinks are not followed.

    Raises:
        ConfigError: `path` is not a store path.
        StoreError: there is no such path.
    """
    store_path, names = parse_path(path)
    with store.snapshot() as snapshot:
        encoded = snapshot.path_info(store_path.digest)
        info = None if encoded is None else read_path_info(encoded)
        if info is None or info.path != store_path:
            raise StoreError(f"path {store_path.absolute()} is not valid")
        node: Node | None = info.node
        for name in names:
            if not isinstance(node, DirectoryNode):
                raise StoreError(f"path {display_path(path)} does not exist")
            entries = _read_directory(snapshot, node).nodes()
            node = next((child for child in entries if child.name == name), None)
    if node is None:
        raise StoreError(f"path {display_path(path)} does not exist")
    return node


class LocalNar:
    """The NAR of one tree in a local store.

    Args:
        store: has the contents.
        node: the root of the tree; its name does not matter.
        kept_entries: how many entries, of Directories read by `measure`, are kept for `pieces`.
        num_valid: how many pieces are valid at a time: the last one and those before it.
    """

    def __init__(
        self,
        store: Store,
        node: Node,
        *,
        kept_entries: int = _KEPT_ENTRIES,
        num_valid: int = 1,
    ) -> None:
        self._store = store
        self._node = node
        self._trees = _Trees(kept_entries)
        self._measured: Measured | None = None
        self._num_valid = num_valid

    def measure(self) -> Measured:
        """Return how large the tree is; each of its Directories is read once.

        Raises:
            StoreError: a Directory is missing, or its content is wrong.
            NarTooLargeError: the tree has too many entries, or its NAR too many bytes.
        """
        if self._measured is None:
            with self._store.snapshot() as snapshot:
                self._measured = self._trees.measure(snapshot, self._node)
            self._measured.extent.check("the tree")
        return self._measured

    def pieces(self, start: int = 0, end: int | None = None) -> Generator[Piece, None, None]:
        """Yield the NAR in pieces, of which the last `num_valid` are valid.

        Args:
            start: offset in bytes of the first byte to yield; contents before it are not read.
            end: offset of the byte after the last one to yield; None for the end of the NAR.

        Raises:
            StoreError: content is missing or wrong (ContentMissingError, WrongDigestError), or
                cannot be read.
            NarError: a blob is not as long as its node says.
            NarTooLargeError: see `measure`; nothing is yielded.
        """
        measured = self.measure()
        if start == 0:  # The sizes of directories are not needed, and may be many.
            measured = measured._replace(sizes={})
            self._measured = None
        pieces = self._pieces(_Rendering(self._trees, self._node, measured.sizes, start))
        if end is None or end >= measured.extent.nar_size:
            return pieces
        return _first(pieces, end - start)

    def _pieces(self, rendering: "_Rendering") -> Generator[Piece, None, None]:
        buffers: deque[memoryview] = deque(maxlen=self._num_valid)
        while True:
            with self._store.snapshot() as snapshot:
                piece, large = rendering.render(snapshot)
            if piece:
                yield piece
            if rendering.is_done:
                return
            if large is not None:
                yield from large.pieces(self._store, buffers)


class _LargeFile(NamedTuple):
    """A blob in a file, of which `start` bytes are left out."""

    node: FileNode
    file: BlobFile
    start: int

    def pieces(self, store: Store, buffers: deque[memoryview]) -> Iterator[memoryview]:
        """Yield the content, and check it at the end if nothing was left out.

        Args:
            store: has the file.
            buffers: what is yielded are views of these, in turn; more are made up to its maximum.
        """
        fd = self._open(store)
        try:
            hasher = None if self.start else blake3()
            offset = self.start
            while offset < self.node.size:
                if len(buffers) < (buffers.maxlen or 0):
                    buffers.append(memoryview(bytearray(PIECE_SIZE)))
                buffers.rotate()
                buffer = buffers[0]
                size = os.preadv(fd, [buffer[: self.node.size - offset]], offset)
                if not size:
                    raise CorruptBlobError(f"blob {self.node.digest}: its file is too short")
                offset += size
                if hasher is not None:
                    hasher.update(buffer[:size])
                yield buffer[:size]
            if hasher is not None:
                _check_digest("blob", self.node.digest, hasher.digest())
        except OSError as exc:
            raise StoreError(f"blob {self.node.digest}: {exc.strerror}") from exc
        finally:
            os.close(fd)

    def _open(self, store: Store) -> int:
        try:
            fd = store.open_blob(self.file)
        except FileNotFoundError as exc:
            raise _blob_not_found(self.node) from exc
        except OSError as exc:
            raise StoreError(f"blob {self.node.digest}: {exc.filename}: {exc.strerror}") from exc
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size != self.node.size:
            os.close(fd)
            raise _blob_not_found(self.node)
        return fd


class _Trees:
    """Directories and blobs of a store, checked; some Directories are kept decoded."""

    def __init__(self, kept_entries: int) -> None:
        self._kept: dict[Digest, list[Node]] = {}
        self._num_to_keep = kept_entries

    def nodes(self, snapshot: Snapshot, node: DirectoryNode) -> list[Node]:
        """Return the entries of a directory by ascending name."""
        kept = self._kept.get(node.digest)
        return _sorted(_read_directory(snapshot, node)) if kept is None else kept

    def content(self, snapshot: Snapshot, node: FileNode) -> memoryview | BlobFile:
        """Return the content of a file, checked; or the file that has it, which is not checked."""
        digest = node.digest
        content = snapshot.blob(digest)
        if isinstance(content, memoryview):
            size = len(content)
            if size == node.size and (actual := blake3(content).digest()) != digest:
                raise WrongDigestError("blob", digest, Digest(actual))
        elif content is None:
            raise _blob_not_found(node)
        else:
            size = content.size
        if size != node.size:
            raise NarError(
                f"blob {digest} has {size} bytes, but its node says {node.size}",
                rule="blob-too-long" if size > node.size else "blob-too-short",
            )
        return content

    def measure(self, snapshot: Snapshot, root: Node) -> Measured:
        """Return how large a tree is."""
        if not isinstance(root, DirectoryNode):
            return Measured(Extent(0, ROOT_SIZE + body_size(root)), {})
        parts: dict[Digest, Part] = {}
        extents: dict[Digest, tuple[int, int]] = {}
        left = [root]
        while left:
            node = left[-1]
            part = parts.get(node.digest)
            if part is None:
                directory = self._read(snapshot, node)
                parts[node.digest] = part_of(directory)
                left.extend(below for below in directory.directories if below.digest not in parts)
                continue
            left.pop()
            if node.digest not in extents:
                below = [extents[digest] for digest in part.below]
                extents[node.digest] = (
                    part.num_entries + sum(num_entries for num_entries, _size in below),
                    part.size + sum(size for _num_entries, size in below),
                )
        num_entries, size = extents[root.digest]
        sizes = {digest: size for digest, (_num_entries, size) in extents.items()}
        return Measured(Extent(num_entries, ROOT_SIZE + size), sizes)

    def _read(self, snapshot: Snapshot, node: DirectoryNode) -> Directory:
        directory = _read_directory(snapshot, node)
        self._num_to_keep -= 1 + len(directory)
        if self._num_to_keep >= 0:
            self._kept[node.digest] = _sorted(directory)
        return directory


class _Rendering:
    """How far the NAR of a tree has been rendered.

    `_parts` are rendered and not returned yet. Bytes before the range wanted are dropped:
    `_num_to_drop` counts those that are still to come, `_parts` included.
    """

    def __init__(self, trees: _Trees, root: Node, sizes: dict[Digest, int], start: int) -> None:
        self._trees = trees
        self._sizes = sizes
        self._num_to_drop = start
        self._root: Node | None = root
        # For each open directory, the entries that follow.
        self._entries: list[Iterator[Node]] = []
        self._parts: list[Piece] = []
        self.is_done = False

    def render(self, snapshot: Snapshot) -> tuple[bytes, _LargeFile | None]:
        """Return the next bytes, and the large file whose content follows them, if one does.

        All of the NAR was returned once `is_done` is set.
        """
        # Budget: 8 us for each small file besides hashing it.
        parts = self._parts
        size = 0
        large = None
        while size < PIECE_SIZE and large is None:
            node = self._next_node()
            if node is None:
                self.is_done = True
                break
            size += _ENTRY_COST
            if isinstance(node, FileNode):
                large = self._render_file(snapshot, node)
                size += 0 if large else node.size
            elif isinstance(node, SymlinkNode):
                parts += (nar.SYMLINK, nar.string(node.target), self._close())
            else:
                self._render_directory(snapshot, node)
        # Parts may be views of the map, so they are copied before the snapshot ends.
        data = b"".join(parts)
        parts.clear()
        if large:
            parts += (nar.PADDING[large.node.size & 7], self._close())
        if self._num_to_drop:
            num_dropped = min(self._num_to_drop, len(data))
            self._num_to_drop -= num_dropped
            data = data[num_dropped:]
        return data, large

    def _next_node(self) -> Node | None:
        parts = self._parts
        if self._root is not None:
            node, self._root = self._root, None
            parts.append(nar.HEADER)
            return node
        while self._entries:
            for node in self._entries[-1]:
                name = node.name
                size = len(name)
                parts += (nar.ENTRY, nar.length(size), name, nar.PADDING[size & 7], nar.NODE)
                return node
            self._entries.pop()
            parts.append(self._close())
        return None

    def _render_file(self, snapshot: Snapshot, node: FileNode) -> _LargeFile | None:
        _name, _digest, size, executable = node
        parts = self._parts
        parts += (nar.EXECUTABLE if executable else nar.REGULAR, nar.length(size))
        start = self._drop(size) if self._num_to_drop else 0
        if start == size > 0:
            parts += (nar.PADDING[size & 7], self._close())
            return None
        content = self._trees.content(snapshot, node)
        if isinstance(content, BlobFile):
            return _LargeFile(node, content, start)
        parts += (content[start:] if start else content, nar.PADDING[size & 7], self._close())
        return None

    def _render_directory(self, snapshot: Snapshot, node: DirectoryNode) -> None:
        if self._num_to_drop:
            size = self._sizes[node.digest]
            held = sum(map(len, self._parts))
            if self._num_to_drop >= held + size:
                self._drop(size)
                self._parts.append(self._close())
                return
        self._parts.append(nar.DIRECTORY)
        self._entries.append(iter(self._trees.nodes(snapshot, node)))

    def _close(self) -> bytes:
        return nar.CLOSE_ENTRY if self._entries else nar.CLOSE

    def _drop(self, size: int) -> int:
        """Return how many of the next `size` bytes are before the range, and do not come."""
        num_held = sum(map(len, self._parts))
        if self._num_to_drop < num_held:
            return 0
        self._parts.clear()
        num_dropped = min(self._num_to_drop - num_held, size)
        self._num_to_drop -= num_held + num_dropped
        return num_dropped


def _first(pieces: Generator[Piece, None, None], size: int) -> Generator[Piece, None, None]:
    with closing(pieces):
        for piece in pieces:
            if len(piece) >= size:
                yield piece[:size]
                return
            size -= len(piece)
            yield piece


def _read_directory(snapshot: Snapshot, node: DirectoryNode) -> Directory:
    encoded = snapshot.directory(node.digest)
    if encoded is None:
        raise ContentMissingError(
            f"directory {node.digest}, named {node.name!r}, is not in the store",
            rule="directory-not-found",
        )
    _check_digest("directory", node.digest, blake3(encoded).digest())
    try:
        return Directory.from_bytes(encoded)
    except DirectoryError as exc:
        raise CorruptBlobError(f"directory {node.digest}: {exc}") from exc


def _sorted(directory: Directory) -> list[Node]:
    nodes: list[Node] = [*directory.directories, *directory.files, *directory.symlinks]
    nodes.sort(key=_by_name)
    return nodes


def _check_digest(what: str, expected: Digest, actual: bytes) -> None:
    if actual != expected:
        raise WrongDigestError(what, expected, Digest(actual))


def _blob_not_found(node: FileNode) -> ContentMissingError:
    return ContentMissingError(
        f"blob {node.digest}, named {node.name!r}, is not in the store", rule="blob-not-found"
    )
