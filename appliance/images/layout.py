"""The layout of a directory image, and how it is read.

An image is a Directory in the form in which the kernel wants it: it holds the READDIRPLUS records
of the entries (linux/fuse.h: struct fuse_direntplus), complete but for the numbers that depend on
where in a store path the directory lies. `cffi_build/images.c` makes an image once, when the
Directory is stored, and the image is kept beside it. After that no request decodes protobuf, sorts
names or packs attributes:

    READDIRPLUS  the longest run of whole records that fits, copied from the cookie's record on
    READDIR      the same, without the first 128 bytes of each record
    LOOKUP       a binary search for the name, then the first 128 bytes of the record found

The numbers in question are nodeids and st_ino. One Directory may occur many times in many store
paths, so an image cannot have nodeids; it has *places* instead, which are relative to the
directory. The tree below the directory is numbered in pre-order: the first entry has place 1, and
every entry takes up one place and, if it is a directory, as many more as the `size` in its node.
The nodeid of the directory plus a place is the nodeid of an entry (see `places`), and replaces the
place in the copy of a record that is sent.

A directory of more than 8192 entries has several pieces, each a value of its own in the database,
so that nobody needs memory for the records of a million entries at once. The first piece has a
guide to the others: enough to tell which piece has a given name or place, without reading them.

All integers are little-endian. LMDB aligns values to 2 bytes only, so the C code loads by memcpy
and the Python code by `struct`.

Piece:

    offset        size   field
    0             4      magic, "IMG1"
    4             4      count: entries in this piece
    8             8      total: entries in the directory
    16            8      span: places that all entries take together
    24            4      first: index of this piece's first entry
    28            4      num_pieces
    32            4      offsets_at
    36            4      digests_at
    40            4      links: 2 in the first piece, for the records of "." and ".."; else 0
    44            4      guide_at: offset of the guide in the first of several pieces; else 0
    48            8 each places: count + 1 words; the last is the place after the last entry
    offsets_at    4 each offsets of the records: links + count + 1 words; the last is digests_at
                         records, without gaps; each offset is a multiple of 8
    digests_at   32 each one for each entry: the digest of a blob or Directory, or for a symlink
                         FNV-1a of its target (8), offset of the target (4), its length (4), zeros
                         targets of symlinks
    guide_at             for each piece but the first: place of its first entry (8), offset (4) and
                         length (4) of the name of its first entry; then these names

Record (a READDIRPLUS entry):

    0     8     entry_out.nodeid     place; 0 in "." and "..", which do not count as looked up
    8     8     generation           0
    16    24    both timeouts FOREVER_S
    40    88    attr                 attr.ino at 40: place
    128   8     dirent.ino           place; 0 in "." and ".."
    136   8     dirent.off           cookie of the next record: the index of this one + 1
    144   4     dirent.namelen
    148   4     dirent.type          mode >> 12
    152         name, then zeros up to a multiple of 8
"""

import struct
from bisect import bisect_right
from collections.abc import Callable
from enum import IntEnum
from typing import Final

from appliance.errors import StoreError

MAGIC: Final = int.from_bytes(b"IMG1", "little")
PIECE_ENTRIES: Final = 8192  # IMG_PIECE_ENTRIES of images.h
HEADER: Final = struct.Struct("<IIQQIIIIII")
# Sizes of the structures in a record. `fuse_proto._fuse_wire` has them too, but is slow to import.
ENTRY_OUT_SIZE: Final = 128
DIRENT_SIZE: Final = 24
GUIDE_AT: Final = 44  # offset of the header's field
GUIDE_ENTRY: Final = struct.Struct("<QII")
LINKS: Final = 2  # cookies of "." and ".."
NAME_AT: Final = ENTRY_OUT_SIZE + DIRENT_SIZE  # in a record
NAMELEN_AT: Final = ENTRY_OUT_SIZE + 16
# st_size of every directory; the size in a DirectoryNode depends on who wrote it (SizeDialect).
DIRECTORY_SIZE: Final = 4096

_MODE_AT: Final = 100
_SIZE_AT: Final = 48
_DIGEST_SIZE: Final = 32
_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")
_TWO_U64: Final = struct.Struct("<QQ")
_TARGET: Final = struct.Struct("<8xII")


class Kind(IntEnum):
    """What a node is; grants store the value."""

    DIRECTORY = ord("d")
    FILE = ord("f")
    EXECUTABLE = ord("x")
    SYMLINK = ord("l")


MODES: Final = {
    Kind.DIRECTORY: 0o040555,
    Kind.FILE: 0o100444,
    Kind.EXECUTABLE: 0o100555,
    Kind.SYMLINK: 0o120444,
}
_KINDS: Final = {mode: kind for kind, mode in MODES.items()}


class Image:
    """One piece of an image.

    Args:
        view: the bytes of the piece. They are not copied, so what is read from this object is valid
            as long as they are.

    Raises:
        StoreError: the bytes are not those of an image.
    """

    __slots__ = (
        "_digests_at",
        "_guide_at",
        "count",
        "first",
        "links",
        "num_pieces",
        "offsets",
        "span",
        "total",
        "view",
    )

    _digests_at: int
    _guide_at: int
    count: int
    first: int
    links: int
    num_pieces: int
    span: int
    total: int

    def __init__(self, view: memoryview) -> None:
        (
            magic,
            self.count,
            self.total,
            self.span,
            self.first,
            self.num_pieces,
            offsets_at,
            self._digests_at,
            self.links,
            self._guide_at,
        ) = HEADER.unpack_from(view)
        if magic != MAGIC:
            raise StoreError(f"directory image has magic {magic:#010x}, expected {MAGIC:#010x}")
        self.view = view
        self.offsets = view[offsets_at : offsets_at + 4 * (self.links + self.count + 1)].cast("I")

    @property
    def first_cookie(self) -> int:
        """The cookie of the first record of this piece."""
        return self.first + LINKS - self.links

    # --- Entries: `index` counts the entries of this piece from 0 ---

    def find(self, name: bytes) -> int:
        """Return the index of the entry called `name`, or -1."""
        # Budget: 3 us in a directory of 60 entries; tests/fs/bench_handler.py measures it.
        view = self.view
        offsets = self.offsets
        low = self.links
        high = low + self.count
        while low < high:
            middle = (low + high) >> 1
            at = offsets[middle]
            (size,) = _U32.unpack_from(view, at + NAMELEN_AT)
            found = bytes(view[at + NAME_AT : at + NAME_AT + size])
            if found < name:
                low = middle + 1
            elif found == name:
                return middle - self.links
            else:
                high = middle
        return -1

    def index_at(self, place: int) -> int:
        """Return the index of the last entry whose place is at most `place`, or -1."""
        places = self.view[HEADER.size : HEADER.size + 8 * self.count].cast("Q")
        return bisect_right(places, place) - 1

    def place(self, index: int) -> int:
        """Return the place of an entry."""
        place: int = _U64.unpack_from(self.view, HEADER.size + 8 * index)[0]
        return place

    def size_stated(self, index: int) -> int:
        """Return the number of places below an entry: the stated size of a directory, else 0."""
        place, following = _TWO_U64.unpack_from(self.view, HEADER.size + 8 * index)
        return int(following - place - 1)

    def record(self, index: int) -> memoryview:
        """Return the READDIRPLUS record of an entry."""
        index += self.links
        return self.view[self.offsets[index] : self.offsets[index + 1]]

    def digest(self, index: int) -> memoryview:
        """Return the 32 bytes that describe the content of an entry; see the layout."""
        at = self._digests_at + _DIGEST_SIZE * index
        return self.view[at : at + _DIGEST_SIZE]

    def target(self, index: int) -> bytes:
        """Return the target of the symlink at `index`."""
        at, size = _TARGET.unpack_from(self.view, self._digests_at + _DIGEST_SIZE * index)
        return bytes(self.view[at : at + size])

    # --- Pieces: these methods are for the first piece, which has the guide ---

    def piece_of_name(self, name: bytes) -> int:
        """Return the number of the only piece that can have the entry called `name`."""
        return self._last_piece(lambda number: self._guide_name(number) <= name)

    def piece_of_place(self, place: int) -> int:
        """Return the number of the piece with the last entry whose place is at most `place`."""
        return self._last_piece(lambda number: self._guide_place(number) <= place)

    def piece_of_cookie(self, cookie: int) -> int:
        """Return the number of the piece with the record at `cookie`; past the end, the last."""
        return min(max(cookie - LINKS, 0) // PIECE_ENTRIES, self.num_pieces - 1)

    def _last_piece(self, begins_before: Callable[[int], bool]) -> int:
        low, high = 0, self.num_pieces - 1
        while low < high:
            middle = (low + high + 1) >> 1
            if begins_before(middle):
                low = middle
            else:
                high = middle - 1
        return low

    def _guide_place(self, number: int) -> int:
        place: int = _U64.unpack_from(self.view, self._guide_entry_at(number))[0]
        return place

    def _guide_name(self, number: int) -> bytes:
        _place, at, size = GUIDE_ENTRY.unpack_from(self.view, self._guide_entry_at(number))
        return bytes(self.view[at : at + size])

    def _guide_entry_at(self, number: int) -> int:
        return self._guide_at + GUIDE_ENTRY.size * (number - 1)


def kind_of(record: memoryview) -> Kind:
    """Return the kind of the node that a record describes."""
    return _KINDS[_U32.unpack_from(record, _MODE_AT)[0]]


def st_size_of(record: memoryview) -> int:
    """Return the st_size in a record."""
    return int(_U64.unpack_from(record, _SIZE_AT)[0])


def name_of(record: memoryview) -> bytes:
    """Return the name in a record."""
    (size,) = _U32.unpack_from(record, NAMELEN_AT)
    return bytes(record[NAME_AT : NAME_AT + size])
