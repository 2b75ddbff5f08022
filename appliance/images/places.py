"""From nodeids to nodes and back: arithmetic over the images of directories.

The nodeid of a node is the base of its store path's grant plus its place in the path's tree. So the
way from a nodeid to a node is a walk down from the root of the grant: in the image of a directory
the last entry whose place is not beyond is the node itself, or a directory above it. Nothing is
kept for a node but by a small cache, of directories above all: a walk begins at the nearest one
that is known and on the way.

A nodeid comes from the guest and may be any number. One that lies in no grant, or between the
places of a directory (where sizes count entries twice, every other number is unused), is stale.
"""

import struct
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable
from errno import EIO, ENOTDIR, ESTALE
from typing import Final, NamedTuple, Protocol

from appliance.images.entries import ino_of_content
from appliance.images.layout import ENTRY_OUT_SIZE, Image, Kind, kind_of, st_size_of

ROOT_NODEID: Final = 1

# Nodes kept; some 450 bytes each.
_DIRECTORIES_MAX: Final = 2048
_OTHERS_MAX: Final = 256
_ENTRY_HEAD: Final = struct.Struct("<QQ")
_INO_AT: Final = 40
_U64: Final = struct.Struct("<Q")


class PlacedNode(NamedTuple):
    """A node of a granted path.

    `size` is st_size, of a directory the size that its node states. `entry` is the reply to a
    LOOKUP of it, `ino` its st_ino, `parent` the nodeid of the directory it is in.
    """

    nodeid: int
    parent: int
    kind: Kind
    size: int
    digest: bytes
    ino: int
    entry: bytes
    target: bytes


class GrantView(Protocol):
    """What a grant says of the root of its store path."""

    @property
    def base(self) -> int:
        """The nodeid of that root."""

    @property
    def kind(self) -> Kind:
        """Its kind."""

    @property
    def size(self) -> int:
        """Its size, as its node states it."""

    @property
    def digest(self) -> bytes:
        """Its digest."""

    @property
    def record(self) -> memoryview:
        """Its READDIRPLUS record, with its nodeid and st_ino."""

    @property
    def target(self) -> bytes:
        """The target of a symlink."""


class GrantsView(Protocol):
    """The grants of a session, as far as nodeids are concerned."""

    generation: int
    is_by_content: bool

    def by_nodeid(self, nodeid: int) -> GrantView | None:
        """Return the grant that `nodeid` lies in."""


class Places:
    """The nodes of one session.

    Args:
        grants: of the session.
        image_of: returns a piece of the image of a Directory, by digest and number of the piece;
            it may raise what it likes if there is none.
    """

    def __init__(self, grants: GrantsView, image_of: Callable[[bytes, int], Image]) -> None:
        self.is_by_content = grants.is_by_content
        self._grants = grants
        self._image_of = image_of
        self._others: dict[int, PlacedNode] = {}
        self._directories: dict[int, PlacedNode] = {}
        # Their nodeids, sorted.
        self._starts: list[int] = []
        self._last_directory: PlacedNode | None = None

    def forget(self) -> None:
        """Drop what is cached: a grant was revoked."""
        self._others.clear()
        self._directories.clear()
        self._starts.clear()
        self._last_directory = None

    def node(self, nodeid: int) -> PlacedNode:
        """Return the node of `nodeid`, which is not the root's.

        Raises:
            OSError: ESTALE, this session has no such node; EIO, a directory above it is corrupt.
        """
        node = self._directories.get(nodeid) or self._others.get(nodeid)
        if node is None:
            node = self._walk(self._start(nodeid), nodeid)
            if node.kind != Kind.DIRECTORY:
                self._keep_other(node)
        return node

    def of_grant(self, grant: GrantView) -> PlacedNode:
        """Return the root node of a granted path."""
        record = grant.record
        return PlacedNode(
            grant.base,
            ROOT_NODEID,
            grant.kind,
            grant.size,
            grant.digest,
            _U64.unpack_from(record, _INO_AT)[0],
            bytes(record[:ENTRY_OUT_SIZE]),
            grant.target,
        )

    def entry(self, directory: PlacedNode, name: bytes) -> bytes | None:
        """Return the reply to a LOOKUP of `name` in `directory`, or None: there is no such entry.

        Raises:
            OSError: ENOTDIR, `directory` is none; EIO, it is corrupt.
        """
        # No node is made: what the guest asks next of the entry is one step from `directory`.
        image = self.image(directory)
        if image.num_pieces > 1:
            image = self._piece(directory, image, image.piece_of_name(name))
        index = image.find(name)
        if index < 0:
            return None
        nodeid = directory.nodeid + image.place(index)
        ino = self.ino(directory, image, index) if self.is_by_content else nodeid
        return self._entry_out(image.record(index), nodeid, ino)

    def image(self, directory: PlacedNode) -> Image:
        """Return the first piece of the image of `directory`.

        Raises:
            OSError: ENOTDIR, `directory` is none; EIO, it is corrupt.
        """
        if directory.kind != Kind.DIRECTORY:
            raise OSError(ENOTDIR, f"nodeid {directory.nodeid:#x}")
        image = self._image_of(directory.digest, 0)
        if image.span > directory.size:
            raise CorruptSizeError(directory, image.span)
        self._last_directory = directory
        return image

    def piece_at(self, directory: PlacedNode, cookie: int) -> Image:
        """Return the piece of the image of `directory` that has the record with `cookie`.

        Raises:
            OSError: as `image`.
        """
        image = self.image(directory)
        if image.num_pieces == 1:
            return image
        return self._piece(directory, image, image.piece_of_cookie(cookie))

    def ino(self, directory: PlacedNode, image: Image, index: int) -> int:
        """Return st_ino of an entry of `directory`."""
        if not self.is_by_content:
            return directory.nodeid + image.place(index)
        (content,) = _U64.unpack_from(image.digest(index))
        return ino_of_content(kind_of(image.record(index)), content)

    # --- The walk ---

    def _start(self, nodeid: int) -> PlacedNode:
        near = self._last_directory
        if near is None or not near.nodeid < nodeid <= near.nodeid + near.size:
            near = self._nearest(nodeid)
        if near is not None:
            return near
        grant = self._grants.by_nodeid(nodeid)
        if grant is None:
            raise OSError(ESTALE, f"nodeid {nodeid:#x}")
        return self.of_grant(grant)

    def _nearest(self, nodeid: int) -> PlacedNode | None:
        # Of the directories that begin before `nodeid`, the last is above it, or below one that
        # is: directories lie within each other, or apart.
        index = bisect_right(self._starts, nodeid) - 1
        near = self._directories.get(self._starts[index]) if index >= 0 else None
        while near is not None and nodeid > near.nodeid + near.size:
            near = self._directories.get(near.parent)
        return near

    def _walk(self, node: PlacedNode, nodeid: int) -> PlacedNode:
        while True:
            if node.kind == Kind.DIRECTORY and node.nodeid not in self._directories:
                self._keep_directory(node)
            if node.nodeid == nodeid:
                return node
            if node.kind != Kind.DIRECTORY or nodeid - node.nodeid > node.size:
                raise OSError(ESTALE, f"nodeid {nodeid:#x}")
            image = self.image(node)
            place = nodeid - node.nodeid
            if image.num_pieces > 1:
                image = self._piece(node, image, image.piece_of_place(place))
            index = image.index_at(place)
            if index < 0:
                raise OSError(ESTALE, f"nodeid {nodeid:#x}")
            node = self._entry(node, image, index)

    def _piece(self, directory: PlacedNode, head: Image, number: int) -> Image:
        return head if number == 0 else self._image_of(directory.digest, number)

    def _entry(self, directory: PlacedNode, image: Image, index: int) -> PlacedNode:
        record = image.record(index)
        kind = kind_of(record)
        nodeid = directory.nodeid + image.place(index)
        ino = self.ino(directory, image, index)
        entry = self._entry_out(record, nodeid, ino)
        size = image.size_stated(index) if kind == Kind.DIRECTORY else st_size_of(record)
        target = image.target(index) if kind == Kind.SYMLINK else b""
        digest = bytes(image.digest(index))
        return PlacedNode(nodeid, directory.nodeid, kind, size, digest, ino, entry, target)

    def _entry_out(self, record: memoryview, nodeid: int, ino: int) -> bytes:
        entry = bytearray(record[:ENTRY_OUT_SIZE])
        _ENTRY_HEAD.pack_into(entry, 0, nodeid, self._grants.generation)
        _U64.pack_into(entry, _INO_AT, ino)
        return bytes(entry)

    def _keep_directory(self, node: PlacedNode) -> None:
        if len(self._directories) >= _DIRECTORIES_MAX:
            oldest = next(iter(self._directories))
            del self._directories[oldest]
            del self._starts[bisect_left(self._starts, oldest)]
        self._directories[node.nodeid] = node
        insort(self._starts, node.nodeid)

    def _keep_other(self, node: PlacedNode) -> None:
        if len(self._others) >= _OTHERS_MAX:
            del self._others[next(iter(self._others))]
        self._others[node.nodeid] = node


class CorruptSizeError(OSError):
    """A node states a size that does not hold the entries of its directory: answered EIO."""

    def __init__(self, directory: PlacedNode, span: int) -> None:
        super().__init__(EIO, f"a directory of size {directory.size} has entries for {span}")
        self.directory = directory
        self.span = span
