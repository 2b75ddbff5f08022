"""The layout of a directory image, and reading one.

An image holds the READDIRPLUS records of one Directory (linux/fuse.h: struct fuse_direntplus),
ready to be sent but for the numbers that depend on where the directory stands. It is built once, by
`cffi_build/images.c`, and kept in the store beside the Directory. A directory of more than 8192
entries has several pieces, each a value of its own: nobody ever holds the records of a million
entries at once.

The *place* of an entry is its position in a walk of the tree in pre-order, relative to the
directory that the image is of: the first entry has place 1, and each takes one place and, if it is
a directory, as many more as the `size` that its node states.

All integers are little-endian. LMDB aligns values to 2 bytes only, so readers load by memcpy.

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
    44            4      guide_at: 0, or where the guide is (first of several pieces only)
    48            8 each places: count + 1 words; the last is the place after the last entry
    offsets_at    4 each links + count + 1 words: where each record starts; the last is digests_at
                         records, without gaps; each offset is a multiple of 8
    digests_at    32 each, one for each entry: the digest of a blob or Directory; of a symlink
                         FNV-1a of the target (8), offset of the target (4), its length (4), zeros
                         targets of symlinks
    guide_at             for each piece but the first: place of its first entry (8), offset (4) and
                         length (4) of the name of its first entry; then these names

Record (a READDIRPLUS entry):

    0     8     entry_out.nodeid     place; 0 in "." and ".." (they are not counted as looked up)
    8     8     generation           0
    16    24    both timeouts FOREVER_S
    40    88    attr                 attr.ino at 40: place
    128   8     dirent.ino           place; 0 in "." and ".."
    136   8     dirent.off           cookie of the next record: index of this one + 1
    144   4     dirent.namelen
    148   4     dirent.type          mode >> 12
    152         name, then zeros up to a multiple of 8

So READDIRPLUS from a cookie is a run of whole records, READDIR is the same without their first 128
bytes, and LOOKUP is a binary search and then the first 128 bytes of the record found. In the copy
that is sent, places become nodeids.
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
# Of the structures in a record; `fuse_proto._fuse_wire` has them too, and takes long to import.
ENTRY_OUT_SIZE: Final = 128
DIRENT_SIZE: Final = 24
GUIDE_AT: Final = 44  # the field
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
    """What a node is; the value is the byte that stands for it in grants."""

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
    """One piece of an image; a view of `view`, and valid as long as that.

    Raises:
        StoreError: these bytes are no image.
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
            raise StoreError(f"a directory image begins with {magic:#010x}, not {MAGIC:#010x}")
        self.view = view
        self.offsets = view[offsets_at : offsets_at + 4 * (self.links + self.count + 1)].cast("I")

    @property
    def first_cookie(self) -> int:
        """The cookie of the first record of this piece."""
        return self.first + LINKS - self.links

    # --- Entries; `index` counts those of this piece from 0 ---

    def find(self, name: bytes) -> int:
        """Return the index of the entry `name`, or -1."""
        # Budget: 3 us in a directory of 60; tests/fs/bench_handler.py measures.
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
        """Return how many places below its own an entry takes: its `size` if it is a directory."""
        place, following = _TWO_U64.unpack_from(self.view, HEADER.size + 8 * index)
        return int(following - place - 1)

    def record(self, index: int) -> memoryview:
        """Return the READDIRPLUS record of an entry."""
        index += self.links
        return self.view[self.offsets[index] : self.offsets[index + 1]]

    def digest(self, index: int) -> memoryview:
        """Return the 32 bytes that stand for the content of an entry."""
        at = self._digests_at + _DIGEST_SIZE * index
        return self.view[at : at + _DIGEST_SIZE]

    def target(self, index: int) -> bytes:
        """Return the target of the symlink at `index`."""
        at, size = _TARGET.unpack_from(self.view, self._digests_at + _DIGEST_SIZE * index)
        return bytes(self.view[at : at + size])

    # --- Pieces; asked of the first ---

    def piece_of_name(self, name: bytes) -> int:
        """Return the number of the piece that has `name` if the directory has it."""
        return self._last_piece(lambda number: self._guide_name(number) <= name)

    def piece_of_place(self, place: int) -> int:
        """Return the number of the piece with the last entry whose place is at most `place`."""
        return self._last_piece(lambda number: self._guide_place(number) <= place)

    def piece_of_cookie(self, cookie: int) -> int:
        """Return the number of the piece whose record has `cookie`; past the end, the last."""
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
    """Return the kind of the node that a record is of."""
    return _KINDS[_U32.unpack_from(record, _MODE_AT)[0]]


def st_size_of(record: memoryview) -> int:
    """Return st_size in a record."""
    return int(_U64.unpack_from(record, _SIZE_AT)[0])


def name_of(record: memoryview) -> bytes:
    """Return the name in a record."""
    (size,) = _U32.unpack_from(record, NAMELEN_AT)
    return bytes(record[NAME_AT : NAME_AT + size])
