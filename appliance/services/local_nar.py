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
from collections.abc import Generator, Iterator
from contextlib import closing
from itertools import chain
from typing import Final, NamedTuple, TypeAlias

from blake3 import blake3

from appliance.castore.digest import Digest
from appliance.castore.directory import Directory, DirectoryNode, Node
from appliance.errors import CorruptBlobError, StoreError
from appliance.nix.nar_frames import DIRECTORY, NarFrames, frames_of_root
from appliance.nix.path_info import read_path_info
from appliance.services.nar_plan import PLANNED_ENTRIES_MAX, NarPlan, plan_nar
from appliance.services.paths_in_store import display_path, parse_path
from appliance.services.stored_trees import (
    KEPT_ENTRIES,
    Measured,
    StoredTrees,
    check_digest,
    open_whole,
    read_encoded,
)
from appliance.store.blob_files import BlobFile
from appliance.store.snapshot import Snapshot
from appliance.store.store import Store

# In bytes. A piece of small files has about this size, and a part of a large file at most. It stays
# in the processor's cache from being read to being written.
PIECE_SIZE: Final = 1 << 18
_YIELDED_MAX: Final = 1 << 20

Piece: TypeAlias = "bytes | memoryview"


def keep_piece_memory() -> None:
    """Have malloc keep the memory of a piece for the next one, instead of faulting it in anew."""
    from appliance.system import libc  # noqa: PLC0415 - ctypes is slow to load

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
            entries = Directory.from_bytes(read_encoded(snapshot, node.digest)).nodes()
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
    """

    def __init__(
        self,
        store: Store,
        node: Node,
        *,
        kept_entries: int = KEPT_ENTRIES,
    ) -> None:
        self._store = store
        self._node = node
        self._trees = StoredTrees(kept_entries)
        self._measured: Measured | None = None

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

    def plan(self) -> NarPlan | None:
        """Return the plan of the NAR, or None if that would take too much memory.

        Raises:
            StoreError, NarTooLargeError: see `measure`.
        """
        if self.measure().extent.num_entries > PLANNED_ENTRIES_MAX:
            return None
        with self._store.snapshot() as snapshot:
            return plan_nar(self._trees, snapshot, self._node)

    def pieces(self, start: int = 0, end: int | None = None) -> Generator[Piece, None, None]:
        """Yield the NAR in pieces, each of which is valid until the next one.

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
        while True:
            with self._store.snapshot() as snapshot:
                piece, large = rendering.render(snapshot)
            # Only the structure of a huge directory is larger than a piece.
            view = memoryview(piece)
            for start in range(0, len(piece), _YIELDED_MAX):
                yield view[start : start + _YIELDED_MAX]
            if rendering.is_done:
                return
            if large is not None:
                yield from large.pieces(self._store)


class _LargeFile(NamedTuple):
    """A blob in a file, of which `start` bytes are left out."""

    blob: BlobFile
    start: int

    def pieces(self, store: Store) -> Iterator[memoryview]:
        """Yield the content from `store` in pieces, each of which is valid until the next one.

        It is compared with the digest at the end if nothing was left out.
        """
        buffer = memoryview(bytearray(PIECE_SIZE))
        digest = Digest(self.blob.digest)
        fd = open_whole(store, self.blob)
        try:
            hasher = None if self.start else blake3()
            offset = self.start
            while offset < self.blob.size:
                size = os.preadv(fd, [buffer[: self.blob.size - offset]], offset)
                if not size:
                    raise CorruptBlobError(f"blob {digest}: its file is too short")
                offset += size
                if hasher is not None:
                    hasher.update(buffer[:size])
                yield buffer[:size]
            if hasher is not None:
                check_digest("blob", digest, hasher.digest())
        except OSError as exc:
            raise StoreError(f"blob {digest}: {exc.strerror}") from exc
        finally:
            os.close(fd)


class _Level:
    """A body that is being rendered: of its structure, `at` bytes have been."""

    __slots__ = ("at", "items", "structure")

    def __init__(self, frames: NarFrames) -> None:
        self.structure = frames.structure
        self.items = frames.items()
        self.at = 0


class _Rendering:
    """How far the NAR of a tree has been rendered.

    Args:
        trees: has the contents.
        root: the root of the tree.
        sizes: of directories in the NAR, in bytes; needed if `start` is not 0.
        start: offset in bytes of where to begin.
    """

    def __init__(
        self, trees: StoredTrees, root: Node, sizes: dict[Digest, int], start: int
    ) -> None:
        self._trees = trees
        self._sizes = sizes
        self._num_to_skip = start
        # The root, and below it the directories that are open.
        self._levels = [_Level(frames_of_root(root))]
        self._parts: list[Piece] = []

    @property
    def is_done(self) -> bool:
        """Whether all of the NAR was returned."""
        return not self._levels

    def render(self, snapshot: Snapshot) -> tuple[bytes, _LargeFile | None]:
        """Return the next bytes, and the large file whose content follows them, if one does."""
        large = self._skip(snapshot) if self._num_to_skip else None
        if large is None:
            large = self._fill(snapshot)
        # Parts may be views of the map, so they are copied before the snapshot ends.
        data = b"".join(self._parts)
        self._parts.clear()
        return data, large

    def _fill(self, snapshot: Snapshot) -> _LargeFile | None:
        """Add parts up to the next large file, which is returned, or until there are enough."""
        # Budget: 3 us for each small file besides hashing it.
        parts = self._parts
        blob = snapshot.blob
        size = 0
        while self._levels and size < PIECE_SIZE:
            level = self._levels[-1]
            structure, at = level.structure, level.at
            for file_size, end, kind, digest in level.items:
                parts.append(structure[at:end])
                size += end - at
                level.at = at = end
                if kind == DIRECTORY:
                    self._levels.append(_Level(self._trees.frames(snapshot, digest)))
                    break
                content = blob(digest)
                if (
                    not isinstance(content, memoryview)
                    or len(content) != file_size
                    or blake3(content).digest() != digest
                ):
                    return self._add_content(snapshot, digest, file_size)
                parts.append(content)
                size += file_size
                if size >= PIECE_SIZE:
                    break
            else:
                parts.append(structure[at:])
                size += len(structure) - at
                self._levels.pop()
        return None

    def _add_content(
        self, snapshot: Snapshot, digest: bytes, size: int, start: int = 0
    ) -> _LargeFile | None:
        """Add a content without its first bytes, or return it if it is in a file."""
        content = self._trees.content(snapshot, Digest(digest), size)
        if isinstance(content, BlobFile):
            return _LargeFile(content, start)
        self._parts.append(content[start:])
        return None

    def _skip(self, snapshot: Snapshot) -> _LargeFile | None:
        """Go to where to begin, without reading what comes before, and add a content cut there."""
        left, self._num_to_skip = self._num_to_skip, 0
        while True:
            level = self._levels[-1]
            for item in level.items:
                size, end, kind, digest = item
                if left < end - level.at:
                    level.at += left
                    level.items = chain((item,), level.items)
                    return None
                left -= end - level.at
                level.at = end
                if kind == DIRECTORY:
                    size = self._sizes[Digest(digest)]
                if left >= size:
                    left -= size
                elif kind == DIRECTORY:
                    self._levels.append(_Level(self._trees.frames(snapshot, digest)))
                    break
                else:
                    return self._add_content(snapshot, digest, size, left)
            else:
                level.at += left
                return None


def _first(pieces: Generator[Piece, None, None], size: int) -> Generator[Piece, None, None]:
    with closing(pieces):
        for piece in pieces:
            if len(piece) >= size:
                yield piece[:size]
                return
            size -= len(piece)
            yield piece
