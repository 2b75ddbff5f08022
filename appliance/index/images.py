"""The wire images in the node index: the one place that builds them, and their layout.

An image is a reply, or a run of replies, as it goes to a guest (linux/fuse.h structures), built
once when a directory is indexed and only copied afterwards. All integers are little-endian; LMDB
aligns values to 2 bytes only, so readers load by memcpy.

Directory image (one per content number of a directory):

    offset              size      field
    0                   4         magic, "DIR1"
    4                   4         count: records, "." and ".." included
    8                   4 each    table: count + 1 words. Word i is the offset of record i, from the
                                  start of the image; bit 0 says «a directory below this one». The
                                  last word is the size of the image.
    8 + 4 (count + 1)   0 or 4    zeros, up to a multiple of 8
    table[0]                      records, without gaps; each offset is a multiple of 8

Record (a READDIRPLUS entry, linux/fuse.h: struct fuse_direntplus):

    0     8     entry_out.nodeid     content number; 0 in "." and ".." (not counted as looked up)
    8     32    generation 0, both timeouts FOREVER_S
    40    88    attr                 attr.ino at 40 = content number
    128   8     dirent.ino           content number; PARENT_INO in ".."
    136   8     dirent.off           cookie of the next record: index of this one + 1
    144   4     dirent.namelen
    148   4     dirent.type          mode >> 12
    152         name, then zeros up to a multiple of 8

Records 0 and 1 are "." and "..", the others follow sorted by name, bytewise. So

* READDIRPLUS from cookie k is the bytes from table[k] on, as many whole records as fit;
* READDIR is the same records without their first 128 bytes;
* LOOKUP is a binary search over records 2..count-1, then the first 128 bytes of the record found.

In the copy (never here) bytes 4..7 of a record whose table word has bit 0 set become its position
(see `position`): where a directory stands is not a property of its content.

Content record (one per content number):

    0     104   attr_out             the reply to GETATTR
    104   1     kind                 one of Kind
    105   7     zeros
    112   32    digest               of the blob, the Directory, or (BLAKE3 of) the symlink target
    144         symlink target       a symlink's only; its length is attr.size

Root entry (one per name in the root): entry_out (128), position included, then the ordinal of its
record in the root's listing (8). A root record is a READDIRPLUS entry as above, position included.
"""

import struct
from array import array
from collections.abc import Sequence
from itertools import accumulate
from operator import or_
from typing import Final, NamedTuple
from zlib import crc32

from appliance.errors import StoreError
from appliance.fuse_proto._wire import (
    ATTR_OUT_SIZE,
    DIRENT_SIZE,
    ENTRY_OUT_SIZE,
    Attr,
    AttrOut,
    EntryOut,
    pack_attr_out,
    pack_entry_out,
)
from appliance.fuse_proto.encode import FOREVER_S, NO_ENTRY, negative_entry, pack_direntplus
from appliance.index.children import DIRECTORY_SIZE, Child, Kind

ROOT_NODEID: Final = 1
ROOT_NUMBER: Final = 1
NUMBER_MASK: Final = 0xFFFF_FFFF  # in a nodeid
# In ".." of a directory image: the parent is not known by content.
PARENT_INO: Final = 0xFFFF_FFFF
ROOT_ATTR_VALID_S: Final = 1
BLOCK_SIZE: Final = 4096

MAGIC: Final = int.from_bytes(b"DIR1", "little")
IS_DIRECTORY: Final = 1
TABLE_AT: Final = 8  # of the table, in a directory image
FIRST_NAMED: Final = 2  # index of the first record after "." and ".."
NAME_AT: Final = ENTRY_OUT_SIZE + DIRENT_SIZE  # in a record
NAMELEN_AT: Final = ENTRY_OUT_SIZE + 16
POSITION_AT: Final = 4  # upper half of entry_out.nodeid
ATTR_SIZE_AT: Final = 24  # attr.size in attr_out
KIND_AT: Final = ATTR_OUT_SIZE
DIGEST_AT: Final = ATTR_OUT_SIZE + 8
TARGET_AT: Final = DIGEST_AT + 32

_SECTOR: Final = 512
_NS_PER_S: Final = 1_000_000_000
_IMAGE_SIZE_MAX: Final = 0xFFFF_FFF8  # a table word
_IMAGE_HEADER: Final = struct.Struct("<II")
# A record without its name; the byte strings are what the kind alone decides of entry_out.
_RECORD: Final = struct.Struct("<Q32sQQQ64sQQII")
_ATTR_OUT: Final = struct.Struct("<16sQQQ64s")
_CONTENT_TAIL: Final = struct.Struct("<B7x32s")
_U64: Final = struct.Struct("<Q")
_PADDING: Final = tuple(bytes(-length % 8) for length in range(8))


class Entry(NamedTuple):
    """A named node with its content number; `size` is st_size."""

    name: bytes
    kind: int
    number: int
    size: int


class _Template(NamedTuple):
    # What the kind alone decides: entry_out without nodeid, attr.ino, size and blocks.
    head: bytes
    tail: bytes
    type: int


def _attr(mode: int) -> Attr:
    return Attr(
        ino=0,
        size=0,
        blocks=0,
        atime=1,
        mtime=1,
        ctime=1,
        atimensec=0,
        mtimensec=0,
        ctimensec=0,
        mode=mode,
        nlink=1,
        uid=0,
        gid=0,
        rdev=0,
        blksize=BLOCK_SIZE,
        flags=0,
    )


def _template(mode: int) -> _Template:
    image = pack_entry_out(EntryOut(0, 0, FOREVER_S, FOREVER_S, 0, 0, _attr(mode)))
    return _Template(image[8:40], image[64:], mode >> 12)


_TEMPLATES: Final[dict[int, _Template]] = {
    Kind.DIRECTORY: _template(0o040555),
    Kind.FILE: _template(0o100444),
    Kind.EXECUTABLE: _template(0o100555),
    Kind.SYMLINK: _template(0o120444),
}
_ATTR_OUT_HEAD: Final = pack_attr_out(AttrOut(FOREVER_S, 0, _attr(0)))[:16]

# The answer to LOOKUP of a name that a directory does not have, and never will.
NEGATIVE_ENTRY: Final = negative_entry(FOREVER_S)


def position(name: bytes, parent_nodeid: int) -> int:
    """Return the upper 32 bits of the nodeid of the directory `name` below `parent_nodeid`."""
    return crc32(name, crc32(_U64.pack(parent_nodeid)))


# --- Building ---


def record(entry: Entry, off: int, nodeid: int) -> bytes:
    """Return the READDIRPLUS record of `entry`; `off` is the cookie after it."""
    name, kind, number, size = entry
    head, tail, entry_type = _TEMPLATES[kind]
    blocks = (size + _SECTOR - 1) // _SECTOR
    name_size = len(name)
    fixed = _RECORD.pack(
        nodeid, head, number, size, blocks, tail, number, off, name_size, entry_type
    )
    return fixed + name + _PADDING[name_size & 7]


def dot_record(name: bytes, ino: int, off: int) -> bytes:
    """Return the record of "." or ".."; its entry part is empty, as nothing is looked up by it."""
    return pack_direntplus(NO_ENTRY, ino, off, _TEMPLATES[Kind.DIRECTORY].type, name)


def directory_image(number: int, entries: Sequence[Entry]) -> bytes:
    """Return the image of directory `number`; `entries` are sorted by name.

    Raises:
        StoreError: the image would outgrow its 32-bit offsets.
    """
    records = [dot_record(b".", number, 1), dot_record(b"..", PARENT_INO, 2)]
    records += [record(entry, off, entry.number) for off, entry in enumerate(entries, 3)]
    flags = [0, 0]
    flags += [IS_DIRECTORY if entry.kind == Kind.DIRECTORY else 0 for entry in entries]
    count = len(records)
    table_end = TABLE_AT + 4 * (count + 1)
    start = (table_end + 7) & ~7
    ends = list(accumulate(map(len, records), initial=start))
    if ends[-1] > _IMAGE_SIZE_MAX:
        raise StoreError(f"a directory of {len(entries)} entries is too big for the node index")
    table = array("I", map(or_, ends, [*flags, 0]))
    parts = [_IMAGE_HEADER.pack(MAGIC, count), table.tobytes(), bytes(start - table_end)]
    return b"".join(parts + records)


def content_record(number: int, child: Child) -> bytes:
    """Return the content record of `child`, whose name plays no part in it."""
    _name, kind, digest, size, target = child
    blocks = (size + _SECTOR - 1) // _SECTOR
    tail = _TEMPLATES[kind].tail
    fixed = _ATTR_OUT.pack(_ATTR_OUT_HEAD, number, size, blocks, tail)
    return fixed + _CONTENT_TAIL.pack(kind, digest) + target


def root_entry(root_record: bytes, ordinal: int) -> bytes:
    """Return the root entry to the record that stands at `ordinal`."""
    return root_record[:ENTRY_OUT_SIZE] + _U64.pack(ordinal)


def root_attr_out(generation: int) -> bytes:
    """Return the attributes of the root; its mtime tells a guest that paths were added.

    Args:
        generation: of the store; a later one gives a later mtime.
    """
    seconds, nanoseconds = divmod(generation, _NS_PER_S)
    attr = _attr(0o040555)._replace(
        ino=ROOT_NUMBER,
        size=DIRECTORY_SIZE,
        blocks=DIRECTORY_SIZE // _SECTOR,
        mtime=1 + seconds,
        mtimensec=nanoseconds,
    )
    return pack_attr_out(AttrOut(ROOT_ATTR_VALID_S, 0, attr))


# --- Reading ---


def find_record(image: memoryview, name: bytes) -> int:
    """Return the table word of the record of `name` in a directory image, or 0: no such name."""
    # Budget: 3 us in a directory of 60, of a LOOKUP's 6; tests/fs/bench_handler.py measures.
    words = image.cast("I")
    low, high = FIRST_NAMED, words[1]
    while low < high:
        middle = (low + high) >> 1
        word = words[2 + middle]
        at = word & ~IS_DIRECTORY
        name_at = at + NAME_AT
        found = image[name_at : name_at + words[(at + NAMELEN_AT) >> 2]].tobytes()
        if found < name:
            low = middle + 1
        elif found == name:
            return word
        else:
            high = middle
    return 0


def entry_at(image: memoryview, word: int, name: bytes, parent_nodeid: int) -> bytes | memoryview:
    """Return entry_out of the record of `name` at table word `word`, position included."""
    at = word & ~IS_DIRECTORY
    if word == at:
        return image[at : at + ENTRY_OUT_SIZE]
    upper = position(name, parent_nodeid).to_bytes(4, "little")
    return b"".join((image[at : at + POSITION_AT], upper, image[at + 8 : at + ENTRY_OUT_SIZE]))


def attr_out_of(content: memoryview) -> memoryview:
    """Return the attributes in a content record, as GETATTR's reply."""
    return content[:ATTR_OUT_SIZE]


def kind_of(content: memoryview) -> int:
    """Return the kind in a content record."""
    return content[KIND_AT]


def size_of(content: memoryview) -> int:
    """Return st_size in a content record."""
    return int.from_bytes(content[ATTR_SIZE_AT : ATTR_SIZE_AT + 8], "little")


def digest_of(content: memoryview) -> memoryview:
    """Return the digest in a content record."""
    return content[DIGEST_AT:TARGET_AT]


def target_of(content: memoryview) -> memoryview:
    """Return the symlink target in a content record, empty unless it is a symlink's."""
    return content[TARGET_AT:]
