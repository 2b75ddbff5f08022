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
import fcntl
import mmap
import os
import secrets
import struct
from collections.abc import Iterator, Sequence
from errno import EOVERFLOW
from typing import Final, NamedTuple
from zlib import crc32

from appliance.bounds import GRANTS_MAX
from appliance.castore.digest import Digest
from appliance.castore.directory import DirectoryNode, FileNode, Node
from appliance.errors import StoreError
from appliance.fuse_proto.encode import FOREVER_S
from appliance.images.entries import content_ino, pack_record
from appliance.images.layout import NAME_AT, NAMELEN_AT, Kind, name_of

ROOT_NODEID: Final = 1
FIRST_BASE: Final = 2
# All nodeids are below this, because st_ino must fit a signed number in many programs.
NODEID_LIMIT: Final = 1 << 63
LINKS: Final = 2

_ROWS_AT: Final = 4096
_ROW_BYTES: Final = 32
_ROW_WORDS: Final = _ROW_BYTES // 8
_ROWS_END: Final = _ROWS_AT + GRANTS_MAX * _ROW_BYTES
_NUM, _INDEX, _ROOT_GENERATION, _FRESH_UNTIL = range(4)  # words
_NUM_REVOKED: Final = 5
_VIEW_STATE: Final = 6
_OPEN_FILES: Final = 7
_NEXT_BASE: Final = 8
_HEAP_END: Final = 9
_NUMBERS: Final = struct.Struct("<II")
_NUMBERS_AT: Final = 32
_RECORD_HEAD: Final = struct.Struct("<IIQ32s")
# No root record is longer. The file always has this many bytes after the start of the last one.
_RECORD_MAX: Final = 8192
_REVOKED: Final = 1
_OPEN_FILES_FIRST: Final = 64
# The file grows in multiples of this many bytes.
_GROWTH: Final = 1 << 20
_FIRST_SLOTS_LOG2: Final = 6
_U32: Final = struct.Struct("<I")
# The name of rows that no name is found by.
_NOTHING: Final = b"-"


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


class _Mapping:
    # A mapped file of this layout. The descriptor is lent. Used by the writer and the readers.

    def __init__(self, fd: int, access: int) -> None:
        self._fd = fd
        self._access = access
        self._map()

    def _map(self) -> None:
        self._mmap = mmap.mmap(self._fd, os.fstat(self._fd).st_size, access=self._access)
        memory = memoryview(self._mmap)
        self.bytes = memory
        self.words = memory[:_ROWS_END].cast("Q")
        self.size = len(memory)

    def close(self) -> None:
        self.words.release()
        self.bytes.release()
        with contextlib.suppress(BufferError):  # a view still exists and keeps the mapping alive
            self._mmap.close()

    def at(self, offset: int, size: int) -> memoryview:
        """Return `size` bytes from `offset` on; map the file again if it has grown that far."""
        if offset + size > self.size:
            self._map()
        return self.bytes[offset : offset + size]

    def grant(self, row: int) -> Grant:
        word = _ROWS_AT // 8 + row * _ROW_WORDS
        base, span, at = self.words[word : word + 3].tolist()
        found = self.at(at, _RECORD_MAX)
        kind, target_size, size, digest = _RECORD_HEAD.unpack_from(found)
        (name_size,) = _U32.unpack_from(found, _RECORD_HEAD.size + NAMELEN_AT)
        end = _RECORD_HEAD.size + _padded(NAME_AT + name_size)
        record = found[_RECORD_HEAD.size : end]
        target = bytes(found[end : end + target_size])
        return Grant(base, span, Kind(kind), size, digest, record, target)

    def is_revoked(self, row: int) -> bool:
        return self.words[_ROWS_AT // 8 + row * _ROW_WORDS + 3] == _REVOKED

    def find(self, name: bytes) -> int:
        """Return the row of `name`, or -1."""
        index = self.words[_INDEX]
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
        at = self.words[_ROWS_AT // 8 + row * _ROW_WORDS + 2]
        record = self.at(at, _RECORD_MAX)[_RECORD_HEAD.size :]
        (size,) = _U32.unpack_from(record, NAMELEN_AT)
        return bytes(record[NAME_AT : NAME_AT + size]) == name


class Grants:
    """A worker's read-only view of the grants of its session.

    Args:
        fd: `GrantTable.fd`, lent; it must stay open, because the file is mapped again as it grows.
    """

    def __init__(self, fd: int) -> None:
        self._memory = _Mapping(fd, mmap.ACCESS_READ)
        self.generation, is_by_content = _NUMBERS.unpack_from(self._memory.bytes, _NUMBERS_AT)
        self.is_by_content = bool(is_by_content)

    def __len__(self) -> int:
        return self._memory.words[_NUM]

    @property
    def has_path_as_root(self) -> bool:
        """Whether the root directory is a store path, and has no names of store paths."""
        words = self._memory.words
        return bool(words[_NUM]) and words[_ROWS_AT // 8] == ROOT_NODEID

    @property
    def view_state(self) -> int:
        """The number of the present state of the session's view; 0 if it has none."""
        return self._memory.words[_VIEW_STATE]

    def by_name(self, name: bytes) -> Grant | None:
        """Return the grant of a name in the root; None if there is none or it was revoked."""
        memory = self._memory
        row = memory.find(name)
        return None if row < 0 or memory.is_revoked(row) else memory.grant(row)

    def by_nodeid(self, nodeid: int) -> Grant | None:
        """Return the grant whose range contains `nodeid`, which may be any number.

        The result is None if there is no such grant or it was revoked.
        """
        memory = self._memory
        words = memory.words
        low, high = 0, words[_NUM]
        while low < high:
            middle = (low + high) >> 1
            if words[_ROWS_AT // 8 + middle * _ROW_WORDS] <= nodeid:
                low = middle + 1
            else:
                high = middle
        row = low - 1
        if row < 0 or memory.is_revoked(row):
            return None
        grant = memory.grant(row)
        return grant if nodeid - grant.base < grant.span else None

    def rows(self) -> Iterator[tuple[Grant, bool]]:
        """Yield each row in the order of the bases, and whether it was revoked."""
        memory = self._memory
        for row in range(memory.words[_NUM]):
            yield memory.grant(row), memory.is_revoked(row)

    @property
    def next_base(self) -> int:
        """The base that the next grant will have."""
        return self._memory.words[_NEXT_BASE]

    def listing(self, first: int) -> Iterator[memoryview]:
        """Yield the READDIRPLUS records of the root from row `first` on, without revoked rows."""
        memory = self._memory
        for row in range(first, memory.words[_NUM]):
            if not memory.is_revoked(row):
                yield memory.grant(row).record

    @property
    def num_revoked(self) -> int:
        """How many grants were revoked. When it changes, grants cached before must be dropped."""
        return self._memory.words[_NUM_REVOKED]

    @property
    def root_generation(self) -> int:
        """The generation of the store up to which all paths were granted."""
        return self._memory.words[_ROOT_GENERATION]

    @property
    def root_fresh_until_ns(self) -> int:
        """When the root must be listed again, on CLOCK_MONOTONIC; 0 if it was never listed."""
        return self._memory.words[_FRESH_UNTIL]


class GrantTable:
    """The supervisor's side: appends grants. Owns the memory, which nobody else can write to.

    The fork server keeps the memory for the next supervisor, which reads back what this one knows.

    `fd` is a read-only descriptor of the memory, to be passed to workers.

    Args:
        is_by_content: whether st_ino is derived from content.
        writable_fd: the memory that another supervisor has filled, which this object owns from now
            on; None: new memory.

    Raises:
        OSError: there is not enough memory or no free descriptor.
    """

    def __init__(self, *, is_by_content: bool = False, writable_fd: int | None = None) -> None:
        fd = _new_memory() if writable_fd is None else writable_fd
        try:
            # Workers get this descriptor, through which they cannot write.
            self.fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            os.close(fd)
            raise
        self.writable_fd = fd
        self._memory = _Mapping(fd, mmap.ACCESS_WRITE)
        self._is_by_content = is_by_content
        # The row of each name, of those rows that were not revoked.
        self._rows: dict[bytes, int] = {}
        self._num_rows = 0
        self._num_revoked = 0
        self._next_base = FIRST_BASE
        self._root_generation = 0
        self._end = _ROWS_END
        self._slots_log2 = 0
        if writable_fd is not None:
            self._read_back()
            return
        generation = secrets.randbelow((1 << 32) - 1) + 1
        _NUMBERS.pack_into(self._memory.bytes, _NUMBERS_AT, generation, is_by_content)
        self._memory.words[_NEXT_BASE] = FIRST_BASE
        self.set_open_files(_OPEN_FILES_FIRST)
        self._grow_index()

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, name: bytes) -> bool:
        """Return whether the session sees `name`."""
        return name in self._rows

    def names(self) -> Sequence[bytes]:
        """Return the names that the session sees."""
        return tuple(self._rows)

    def start_apart(self) -> None:
        """Begin at a high random base, because the guest may hold nodeids of an earlier session.

        Those nodeids are then stale here instead of denoting other nodes. This has an effect only
        before the first grant. It has none where a store path is the root directory: that path has
        the same nodeids in every session.
        """
        if not self._num_rows:
            self._next_base = (secrets.randbits(20) + 1) << 41
            self._memory.words[_NEXT_BASE] = self._next_base

    @property
    def has_path_as_root(self) -> bool:
        """Whether the root directory is a store path."""
        return bool(self._num_rows) and self._memory.words[_ROWS_AT // 8] == ROOT_NODEID

    @property
    def is_by_content(self) -> bool:
        """Whether st_ino is derived from content."""
        return self._is_by_content

    def begin_again(self, generation: int) -> None:
        """Forget every grant, and have entries carry `generation`, a number of 32 bits.

        What the view's state is, and how many files may be open, stays. No worker may have the
        memory mapped, because what it has found there moves.
        """
        words = self._memory.words
        words[_NUM] = 0
        self._memory.bytes[_ROWS_AT : _ROWS_AT + self._num_rows * _ROW_BYTES] = bytes(
            self._num_rows * _ROW_BYTES
        )
        self._rows.clear()
        self._num_rows = self._num_revoked = self._root_generation = self._slots_log2 = 0
        words[_NUM_REVOKED] = words[_ROOT_GENERATION] = words[_FRESH_UNTIL] = 0
        self._next_base = words[_NEXT_BASE] = FIRST_BASE
        self._end = words[_HEAP_END] = _ROWS_END
        _NUMBERS.pack_into(self._memory.bytes, _NUMBERS_AT, generation, self._is_by_content)
        self._grow_index()

    def go_on_at(self, base: int) -> None:
        """Give the next grant the base `base`, which is not below the one that it would have.

        For the first grant, it may be ROOT_NODEID.
        """
        self._next_base = self._memory.words[_NEXT_BASE] = base

    def leave_out(self, span: int) -> None:
        """Append a row that is revoked already, so that its nodeids are stale and stay so.

        Raises:
            OSError, StoreError: as for `grant`.
        """
        self._append(DirectoryNode(_NOTHING, Digest(bytes(32)), span - 1), 0)
        self._revoke_row(self._rows.pop(_NOTHING))

    def grant_root(self, node: DirectoryNode) -> None:
        """Make `node` the root directory; this must be the first and only grant.

        Raises:
            OSError: EOVERFLOW if there are too few nodeids for its size.
        """
        self._next_base = ROOT_NODEID
        self.grant(node)

    def grant(self, node: Node, *, name_valid_s: int = FOREVER_S) -> None:
        """Let the session see `node` under its name; do nothing if it sees a node of that name.

        Args:
            node: the root node of a store path, or another node for the root directory.
            name_valid_s: how long the guest may take the name to be that of this node, in seconds.

        Raises:
            OSError: EOVERFLOW if too few nodeids are left for its size.
            StoreError: there is not enough memory, or there are too many grants.
        """
        if node.name not in self._rows:
            self._append(node, name_valid_s)

    def replace(self, node: Node, *, name_valid_s: int) -> None:
        """Let a name that the session sees be that of `node`; nodeids of the old one become stale.

        Readers see the one node or the other under the name at any time.

        Raises:
            KeyError: the session does not see the name.
            OSError, StoreError: as for `grant`; nothing is changed then.
        """
        old = self._rows[node.name]
        self._append(node, name_valid_s)
        self._revoke_row(old)

    def _append(self, node: Node, name_valid_s: int) -> None:
        row = self._num_rows
        if row >= GRANTS_MAX:
            raise StoreError(f"a session can be granted {GRANTS_MAX} store paths, not more")
        span = 1 + (node.size if isinstance(node, DirectoryNode) else 0)
        if span > NODEID_LIMIT - self._next_base:
            left = NODEID_LIMIT - self._next_base
            raise OSError(EOVERFLOW, f"{node.name!r}: {span} nodeids needed, {left} left")
        at = self._put(self._root_record(node, row, name_valid_s))
        words = self._memory.words
        word = _ROWS_AT // 8 + row * _ROW_WORDS
        words[word], words[word + 1], words[word + 2] = self._next_base, span, at
        self._rows[node.name] = row
        self._num_rows = row + 1
        self._next_base += span
        if 2 * self._num_rows > 1 << self._slots_log2:
            self._grow_index()
        else:
            self._put_slot(node.name, row)
        words[_NUM] = row + 1
        words[_NEXT_BASE] = self._next_base

    def set_open_files(self, number: int) -> None:
        """Let each worker hold `number` blob files open, from its next batch of requests on."""
        self._memory.words[_OPEN_FILES] = number

    def revoke(self, name: bytes) -> None:
        """Hide a granted name and everything below it; nodeids that the guest holds become stale.

        If the name is granted again, its nodes have other nodeids.

        Raises:
            KeyError: the session does not see the name.
        """
        self._revoke_row(self._rows.pop(name))

    def _revoke_row(self, row: int) -> None:
        self._num_revoked += 1
        self._memory.words[_ROWS_AT // 8 + row * _ROW_WORDS + 3] = _REVOKED
        self._memory.words[_NUM_REVOKED] = self._num_revoked

    def digest_of(self, name: bytes) -> bytes:
        """Return the digest of the node that the session sees under `name`.

        Raises:
            KeyError: the session does not see the name.
        """
        return self._memory.grant(self._rows[name]).digest

    def directories(self) -> Iterator[bytes]:
        """Yield the digests of the directories that the session was granted last, newest first."""
        for row in reversed([*self._rows.values()]):
            grant = self._memory.grant(row)
            if grant.kind is Kind.DIRECTORY:
                yield grant.digest

    @property
    def view_state(self) -> int:
        """The number that was set last; 0 if the session has no view."""
        return self._memory.words[_VIEW_STATE]

    def set_view_state(self, number: int) -> None:
        """Note that the session's view is now in the state with this number, from 1 on."""
        self._memory.words[_VIEW_STATE] = number

    @property
    def root_generation(self) -> int:
        """The generation of the store up to which all paths were granted."""
        return self._root_generation

    def set_root_generation(self, generation: int) -> None:
        """Note that every path that the store had at `generation` has been granted."""
        self._root_generation = generation
        self._memory.words[_ROOT_GENERATION] = generation

    def set_root_fresh_until(self, time_ns: int) -> None:
        """Note when the root must be listed again: `time_ns` on CLOCK_MONOTONIC."""
        self._memory.words[_FRESH_UNTIL] = time_ns

    def close(self) -> None:
        """Unmap the memory and close its descriptors."""
        self._memory.close()
        os.close(self.fd)
        os.close(self.writable_fd)

    def _read_back(self) -> None:
        # The writer may have been killed at any instruction. Rows below `num` are complete. The
        # next base is stored after them, and the end of the heap before anything is put there. The
        # hash table may have a row that is not complete; another one takes its place.
        memory = self._memory
        self._end = memory.words[_HEAP_END]
        self._next_base = memory.words[_NEXT_BASE]
        self._root_generation = memory.words[_ROOT_GENERATION]
        for row in range(memory.words[_NUM]):
            grant = memory.grant(row)
            self._next_base = max(self._next_base, grant.base + grant.span)
            if memory.is_revoked(row):
                continue
            name = grant.name
            if name in self._rows:
                self._revoke_row(self._rows[name])  # it was about to be replaced
            self._rows[name] = row
        self._num_rows = memory.words[_NUM]
        self._num_revoked = memory.words[_NUM_REVOKED]
        self._slots_log2 = max(_FIRST_SLOTS_LOG2, (2 * self._num_rows).bit_length()) - 1
        self._grow_index()

    def _root_record(self, node: Node, row: int, name_valid_s: int) -> bytes:
        kind, digest, size, target = content_of(node)
        ino = content_ino(kind, digest, target) if self._is_by_content else self._next_base
        generation: int = _NUMBERS.unpack_from(self._memory.bytes, _NUMBERS_AT)[0]
        if self._next_base == ROOT_NODEID:
            generation = 0  # Linux requires that of the root's inode
        record = pack_record(
            node.name,
            kind,
            nodeid=self._next_base,
            generation=generation,
            ino=ino,
            st_size=len(target) if kind == Kind.SYMLINK else size,
            off=row + 1 + LINKS,
            name_valid_s=name_valid_s,
        )
        return _RECORD_HEAD.pack(kind, len(target), size, digest) + record + target

    def _put(self, item: bytes) -> int:
        at = self._end
        end = at + _padded(len(item))
        if end + _RECORD_MAX > self._memory.size:
            self._enlarge(end + _RECORD_MAX)
        self._end = self._memory.words[_HEAP_END] = end
        self._memory.bytes[at : at + len(item)] = item
        return at

    def _enlarge(self, end: int) -> None:
        try:
            os.ftruncate(self.writable_fd, -(-end // _GROWTH) * _GROWTH)
        except OSError as exc:
            raise StoreError(f"memory of the grants: {exc.strerror}") from exc
        self._memory.at(end - 1, 1)  # maps the file again

    def _grow_index(self) -> None:
        self._slots_log2 = max(_FIRST_SLOTS_LOG2, self._slots_log2 + 1)
        at = self._put(bytes(4 << self._slots_log2))
        self._index_at = at
        for name, row in self._rows.items():
            self._put_slot(name, row)
        self._memory.words[_INDEX] = at << 8 | self._slots_log2

    def _put_slot(self, name: bytes, row: int) -> None:
        mask = (1 << self._slots_log2) - 1
        slots = self._memory.bytes[self._index_at : self._index_at + 4 * (mask + 1)].cast("I")
        slot = crc32(name) & mask
        while slots[slot] and not self._memory.has_name(slots[slot] - 1, name):
            slot = (slot + 1) & mask
        slots[slot] = row + 1


def _new_memory() -> int:
    fd = os.memfd_create("grants", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, _ROWS_END + _GROWTH)
        # If a holder could shrink the file, the others would get SIGBUS.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    except OSError:
        os.close(fd)
        raise
    return fd


def content_of(node: Node) -> tuple[Kind, bytes, int, bytes]:
    """Return the kind, digest (zeros for a symlink), size and target (or nothing) of a node."""
    if isinstance(node, DirectoryNode):
        return Kind.DIRECTORY, node.digest, node.size, b""
    if isinstance(node, FileNode):
        kind = Kind.EXECUTABLE if node.executable else Kind.FILE
        return kind, node.digest, node.size, b""
    return Kind.SYMLINK, bytes(32), len(node.target), node.target


def _padded(size: int) -> int:
    return (size + 7) & ~7
