"""The grants of a session: which store paths it may see, and which nodeids their nodes have.

A grant is a row (base, span) with the root node of a store path. The nodes of that path have the
nodeids from `base` to `base + span - 1`: the nodeid of a node is the base plus the node's place.
Bases begin at 2, because 1 is the root directory with the names of the paths. A session whose root
directory is itself a store path has a single grant, and its base is 1.
Rows are ordered by base and their nodeid ranges do not overlap, so the grant of a nodeid is found
by binary search. Only the supervisor appends rows, when the session first resolves a name in the
root. Workers map the same memory read-only and need nothing else to find any node of the session.

    offset            size  field
    0                 8     num: number of complete rows
    8                 8     index: offset of the hash table << 8 | log2 of its number of slots
    16                8     root_generation: every path that the store had at this generation has
                            been granted
    24                8     root_fresh_until: when the root must be listed again, for a service that
                            has no generations: CLOCK_MONOTONIC in ns; 0 if it was never listed
    32                4     generation in every entry of this session (linux/fuse.h: fuse_entry_out)
    36                4     1 if st_ino is derived from content (--inodes=content), else 0
    40                8     num_revoked: number of revoked rows
    48                8     view_state: 0 if every path of the store may be granted; else the number
                            of the present state of the session's view, from 1 on. The root lists
                            that state when root_generation has reached it.
    56                8     open_files: how many blob files each worker may hold open
    64                8     next_base: the base of the next grant; for the next supervisor, as is:
    72                8     end: where the heap ends
    4096              32 each rows: base (8), span (8), offset of the root record (8),
                            state (8): 0, or 1 if the grant was revoked
    ROWS_END                the heap: root records and hash tables, each a multiple of 8 bytes long

A root record has: kind (4), length of the symlink target (4), size as the node states it (8),
digest (32), a READDIRPLUS record as in an image but with nodeids in place of places, and the
target of a symlink.

The hash table has a power of two of slots, 4 bytes each: 0 if free, else the number of a row,
counted from 1. A name is stored in slot crc32(name) modulo the number of slots, or in the next free
one. If a name is granted again after its grant was revoked, its slot gets the number of the new
row. When the table is half full, one of twice the size is appended to the heap and replaces it.

The writer and the readers share no lock. The writer stores a row, its record and its slot before it
increments `num`, and publishes each word by one aligned store. A reader that misses a row which has
just been added asks the supervisor, and looks again after the answer. Nothing that was published
moves or changes, except for the state of a row. The file grows at its end; a reader maps it again
when an offset lies beyond what it has mapped.
"""

import contextlib
import mmap
import os
import struct
from typing import Final, NamedTuple
from zlib import crc32

from appliance.bounds import GRANTS_MAX
from appliance.castore.directory import DirectoryNode, FileNode, Node
from appliance.images.layout import NAME_AT, NAMELEN_AT, Kind, name_of

ROOT_NODEID: Final = 1
FIRST_BASE: Final = 2
# All nodeids are below this, because st_ino must fit a signed number in many programs.
NODEID_LIMIT: Final = 1 << 63
LINKS: Final = 2

ROWS_AT: Final = 4096
ROW_BYTES: Final = 32
ROW_WORDS: Final = ROW_BYTES // 8
ROWS_END: Final = ROWS_AT + GRANTS_MAX * ROW_BYTES
NUM, INDEX, ROOT_GENERATION, FRESH_UNTIL = range(4)  # words
NUM_REVOKED: Final = 5
VIEW_STATE: Final = 6
OPEN_FILES: Final = 7
NEXT_BASE: Final = 8
HEAP_END: Final = 9
NUMBERS: Final = struct.Struct("<II")
NUMBERS_AT: Final = 32
RECORD_HEAD: Final = struct.Struct("<IIQ32s")
# No root record is longer. The file always has this many bytes after the start of the last one.
RECORD_MAX: Final = 8192
REVOKED: Final = 1
_U32: Final = struct.Struct("<I")


class Grant(NamedTuple):
    """A row with its root record."""

    base: int
    span: int
    kind: Kind
    size: int
    """As the root node states it: bytes of a file, entries below a directory."""
    digest: bytes
    record: memoryview
    """The READDIRPLUS record of the root node, a view of the grants' memory."""
    target: bytes
    """The target of a symlink, else empty."""

    @property
    def name(self) -> bytes:
        """The name in the root directory."""
        return name_of(self.record)


class GrantsMapping:
    """A mapped file of this layout, for the writer and the readers. The descriptor is lent."""

    def __init__(self, fd: int, access: int) -> None:
        self._fd = fd
        self._access = access
        self._map()

    def _map(self) -> None:
        self._mmap = mmap.mmap(self._fd, os.fstat(self._fd).st_size, access=self._access)
        memory = memoryview(self._mmap)
        self.bytes = memory
        self.words = memory[:ROWS_END].cast("Q")
        self.size = len(memory)

    def close(self) -> None:
        """Unmap it, but for what is still looked at."""
        self.words.release()
        self.bytes.release()
        with contextlib.suppress(BufferError):  # a view still exists and keeps the mapping alive
            self._mmap.close()

    def at(self, offset: int, size: int) -> memoryview:
        """Return `size` bytes from `offset` on; map the file again if it has grown that far."""
        if offset + size > self.size:
            self._map()
        return self.bytes[offset : offset + size]

    def numbers(self) -> tuple[int, bool]:
        """Return the generation of entries, and whether st_ino is derived from content."""
        generation, is_by_content = NUMBERS.unpack_from(self.bytes, NUMBERS_AT)
        return generation, bool(is_by_content)

    def put_numbers(self, generation: int, *, is_by_content: bool) -> None:
        """Store what `numbers` returns; only the writer can."""
        NUMBERS.pack_into(self.bytes, NUMBERS_AT, generation, is_by_content)

    def grant(self, row: int) -> Grant:
        """Return a row, which must be below `num`, with its root record."""
        word = ROWS_AT // 8 + row * ROW_WORDS
        base, span, at = self.words[word : word + 3].tolist()
        found = self.at(at, RECORD_MAX)
        kind, target_size, size, digest = RECORD_HEAD.unpack_from(found)
        (name_size,) = _U32.unpack_from(found, RECORD_HEAD.size + NAMELEN_AT)
        end = RECORD_HEAD.size + padded(NAME_AT + name_size)
        record = found[RECORD_HEAD.size : end]
        target = bytes(found[end : end + target_size])
        return Grant(base, span, Kind(kind), size, digest, record, target)

    def is_revoked(self, row: int) -> bool:
        """Return whether the grant of this row was revoked."""
        return self.words[ROWS_AT // 8 + row * ROW_WORDS + 3] == REVOKED

    def find(self, name: bytes) -> int:
        """Return the row of `name`, or -1."""
        index = self.words[INDEX]
        num_slots = 1 << (index & 0xFF)
        slots = self.at(index >> 8, 4 * num_slots)
        mask = num_slots - 1
        slot = crc32(name) & mask
        while number := _U32.unpack_from(slots, 4 * slot)[0]:
            if self.has_name(number - 1, name):
                return int(number) - 1
            slot = (slot + 1) & mask
        return -1

    def has_name(self, row: int, name: bytes) -> bool:
        """Return whether the grant of this row has this name."""
        at = self.words[ROWS_AT // 8 + row * ROW_WORDS + 2]
        record = self.at(at, RECORD_MAX)[RECORD_HEAD.size :]
        (size,) = _U32.unpack_from(record, NAMELEN_AT)
        return bytes(record[NAME_AT : NAME_AT + size]) == name


def content_of(node: Node) -> tuple[Kind, bytes, int, bytes]:
    """Return the kind, digest (zeros for a symlink), size and target (or nothing) of a node."""
    if isinstance(node, DirectoryNode):
        return Kind.DIRECTORY, node.digest, node.size, b""
    if isinstance(node, FileNode):
        kind = Kind.EXECUTABLE if node.executable else Kind.FILE
        return kind, node.digest, node.size, b""
    return Kind.SYMLINK, bytes(32), len(node.target), node.target


def padded(size: int) -> int:
    """Round up to a multiple of 8 bytes."""
    return (size + 7) & ~7
