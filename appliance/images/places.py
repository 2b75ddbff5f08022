"""From nodeids to nodes and back, by arithmetic over the images of directories.

A FUSE server usually keeps a table of every node that the kernel knows. Here there is none: a
nodeid says by itself where its node is. So any worker can answer for it, even one that has just
been started, and no memory grows with the number of files that a guest has looked at.

Numbering. A session may see some store paths, and for each it has a grant with a base. The root of
the path has nodeid `base`; if that is the root directory of the session itself, the base is 1. The
tree below it is numbered in pre-order; the position of a node in that order, counted from the root,
is its place (see `layout`), and its nodeid is `base` plus its place. The node of a directory states
the `size` of everything below it, so the numbers of a whole subtree are known without looking into
it: a directory with nodeid n and size s owns exactly the nodeids n + 1 to n + s. Its image has the
places of its entries relative to the directory itself. An entry that is a directory owns the
numbers from its own place up to that of the next entry:

    etc        n      size 5     places in the image of etc: conf 1, d 2, z 5
      conf     n + 1
      d        n + 2  size 2     places in the image of d: x 1, y 2
        x      n + 3
        y      n + 4
      z        n + 5

From a node to a nodeid is one addition: the nodeid of an entry is that of its directory plus its
place in the directory's image.

From a nodeid to a node is a walk down, which starts at the root of the grant that owns the nodeid.
In the image of the current directory, the last entry whose place is not greater than the target's
is either the node itself, or a directory that owns it, in which the walk goes on. To find n + 4 in
the example: its place in etc is 4, the last entry not beyond 4 is d at 2, the place in d is
4 - 2 = 2, and that is y. Each step is a binary search in one image, so without a cache a node costs
as many searches as it is deep.

The cache. Directories that were walked through are kept, with a sorted list of their nodeids. Two
directories either contain one another or are disjoint. So among the known directories that start
before a nodeid, the one that starts last either owns it or lies below a directory that does, which
is found by following `parent` from there. A walk starts at the directory that was used last, if
that one owns the nodeid, or else at the nearest known one. Entries that are no directories are one
step away from theirs, so only some of them are kept. What is cached follows from the grants and the
images, and neither changes: it becomes wrong only when a grant is revoked (`Places.forget`).

Untrusted numbers. A nodeid comes from the guest and may be any number. One that no grant owns is
ESTALE. So is one inside a directory that is the place of no entry: where `size` counts every entry
twice (`castore.size_dialect`), every other number is unused. The store may be wrong, too: if the
entries of a directory take up more numbers than its node states, they would reach into the numbers
of its neighbours, and the directory is refused (`CorruptSizeError`).
"""

import struct
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable
from errno import EIO, ENOTDIR, ESTALE
from typing import Final, NamedTuple, Protocol

from appliance.images.entries import ino_of_content
from appliance.images.layout import ENTRY_OUT_SIZE, Image, Kind, kind_of, st_size_of

ROOT_NODEID: Final = 1

# Nodes in the cache, of some 450 bytes each.
_DIRECTORIES_MAX: Final = 2048
_OTHERS_MAX: Final = 256
_ENTRY_HEAD: Final = struct.Struct("<QQ")
# attr.ino in an entry_out.
_INO_AT: Final = 40
_U64: Final = struct.Struct("<Q")


class PlacedNode(NamedTuple):
    """A node of a granted path.

    Attributes:
        nodeid: its nodeid.
        parent: the nodeid of the directory that it is in; for the root of a store path, that of the
            root directory, even if it is that itself.
        kind: its kind.
        size: st_size, or for a directory the size that its node states.
        digest: its digest; a symlink has none, and its bytes here mean nothing.
        ino: its st_ino.
        entry: the packed reply to a LOOKUP of it.
        target: the target of a symlink, else empty.
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
    """A grant, as far as this module needs it: the root node of a store path."""

    @property
    def base(self) -> int:
        """The nodeid of the root node."""

    @property
    def kind(self) -> Kind:
        """Its kind."""

    @property
    def size(self) -> int:
        """The size that the node states."""

    @property
    def digest(self) -> bytes:
        """Its digest."""

    @property
    def record(self) -> memoryview:
        """Its READDIRPLUS record, with its nodeid and st_ino."""

    @property
    def target(self) -> bytes:
        """The target, if the root node is a symlink."""


class GrantsView(Protocol):
    """The grants of a session, as far as this module needs them."""

    generation: int
    is_by_content: bool

    def by_nodeid(self, nodeid: int) -> GrantView | None:
        """Return the grant that owns `nodeid`, or None."""


class Places:
    """The nodes of one session.

    Args:
        grants: the grants of the session.
        image_of: returns a piece of a Directory's image, given digest and number of the piece; what
            it raises if there is none is passed on to the caller of any method here.
    """

    def __init__(self, grants: GrantsView, image_of: Callable[[bytes, int], Image]) -> None:
        self.is_by_content = grants.is_by_content
        self._grants = grants
        self._image_of = image_of
        self._others: dict[int, PlacedNode] = {}
        self._directories: dict[int, PlacedNode] = {}
        # The keys of `_directories`, sorted.
        self._starts: list[int] = []
        self._last_directory: PlacedNode | None = None

    def forget(self) -> None:
        """Empty the cache, because a grant was revoked."""
        self._others.clear()
        self._directories.clear()
        self._starts.clear()
        self._last_directory = None

    def node(self, nodeid: int) -> PlacedNode:
        """Return the node with `nodeid`, a node of a granted path.

        Raises:
            OSError: ESTALE, the session has no such node.
            CorruptSizeError: a directory above the node is corrupt.
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
        """Return the reply to a LOOKUP of `name` in `directory`, or None if there is no such entry.

        Raises:
            OSError: ENOTDIR, `directory` is not a directory.
            CorruptSizeError: `directory` is corrupt.
        """
        # No PlacedNode is made or cached: from `directory`, which is now the last one used, the
        # entry can be found again in one step.
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
            OSError: ENOTDIR, `directory` is not a directory.
            CorruptSizeError: `directory` is corrupt.
        """
        if directory.kind != Kind.DIRECTORY:
            raise OSError(ENOTDIR, f"nodeid {directory.nodeid:#x}")
        image = self._image_of(directory.digest, 0)
        if image.span > directory.size:
            raise CorruptSizeError(directory, image.span)
        self._last_directory = directory
        return image

    def piece_at(self, directory: PlacedNode, cookie: int) -> Image:
        """Return the piece of the image of `directory` that has the record at `cookie`.

        Raises:
            OSError, CorruptSizeError: as for `image`.
        """
        image = self.image(directory)
        if image.num_pieces == 1:
            return image
        return self._piece(directory, image, image.piece_of_cookie(cookie))

    def ino(self, directory: PlacedNode, image: Image, index: int) -> int:
        """Return the st_ino of the entry at `index` in a piece of the image of `directory`."""
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
        # The last known directory that starts before `nodeid` owns it, or lies below the one that
        # does; `parent` leads there, as long as the directories on the way are known.
        index = bisect_right(self._starts, nodeid) - 1
        near = self._directories.get(self._starts[index]) if index >= 0 else None
        while near is not None and nodeid > near.nodeid + near.size:
            is_root = near.parent == near.nodeid
            near = None if is_root else self._directories.get(near.parent)
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
    """A directory's node states a smaller size than its entries take up; an EIO.

    Attributes:
        directory: the node.
        span: the number of places that the entries take up.
    """

    def __init__(self, directory: PlacedNode, span: int) -> None:
        super().__init__(EIO, f"entries take up {span} places, node states {directory.size}")
        self.directory = directory
        self.span = span
