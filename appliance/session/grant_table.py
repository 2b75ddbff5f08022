"""Grants as the supervisor writes them; `grants_layout` says what they are, and their layout."""

import fcntl
import mmap
import os
import secrets
from collections.abc import Iterator, Sequence
from errno import EOVERFLOW
from typing import Final
from zlib import crc32

from appliance.bounds import GRANTS_MAX
from appliance.castore.digest import Digest
from appliance.castore.directory import DirectoryNode, Node
from appliance.errors import StoreError
from appliance.fuse_proto.encode import FOREVER_S
from appliance.images.entries import content_ino, pack_record
from appliance.images.layout import Kind
from appliance.session import grants_layout as layout
from appliance.session.grants_layout import (
    FIRST_BASE,
    LINKS,
    NODEID_LIMIT,
    ROOT_NODEID,
    content_of,
)

_FIRST_SLOTS_LOG2: Final = 6
# The file grows in multiples of this many bytes.
_GROWTH: Final = 1 << 20
# The name of rows that no name is found by.
_NOTHING: Final = b"-"
_OPEN_FILES_FIRST: Final = 64


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
        self._memory = layout.GrantsMapping(fd, mmap.ACCESS_WRITE)
        self._is_by_content = is_by_content
        # The row of each name, of those rows that were not revoked.
        self._rows: dict[bytes, int] = {}
        self._num_rows = 0
        self._num_revoked = 0
        self._next_base = FIRST_BASE
        self._root_generation = 0
        self._end = layout.ROWS_END
        self._slots_log2 = 0
        if writable_fd is not None:
            self._read_back()
            return
        generation = secrets.randbelow((1 << 32) - 1) + 1
        self._memory.put_numbers(generation, is_by_content=is_by_content)
        self._memory.words[layout.NEXT_BASE] = FIRST_BASE
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
            self._memory.words[layout.NEXT_BASE] = self._next_base

    @property
    def has_path_as_root(self) -> bool:
        """Whether the root directory is a store path."""
        return bool(self._num_rows) and self._memory.words[layout.ROWS_AT // 8] == ROOT_NODEID

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
        words[layout.NUM] = 0
        self._memory.bytes[layout.ROWS_AT : layout.ROWS_AT + self._num_rows * layout.ROW_BYTES] = (
            bytes(self._num_rows * layout.ROW_BYTES)
        )
        self._rows.clear()
        self._num_rows = self._num_revoked = self._root_generation = self._slots_log2 = 0
        words[layout.NUM_REVOKED] = words[layout.ROOT_GENERATION] = words[layout.FRESH_UNTIL] = 0
        self._next_base = words[layout.NEXT_BASE] = FIRST_BASE
        self._end = words[layout.HEAP_END] = layout.ROWS_END
        self._memory.put_numbers(generation, is_by_content=self._is_by_content)
        self._grow_index()

    def go_on_at(self, base: int) -> None:
        """Give the next grant the base `base`, which is not below the one that it would have.

        For the first grant, it may be ROOT_NODEID.
        """
        self._next_base = self._memory.words[layout.NEXT_BASE] = base

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
        word = layout.ROWS_AT // 8 + row * layout.ROW_WORDS
        words[word], words[word + 1], words[word + 2] = self._next_base, span, at
        self._rows[node.name] = row
        self._num_rows = row + 1
        self._next_base += span
        if 2 * self._num_rows > 1 << self._slots_log2:
            self._grow_index()
        else:
            self._put_slot(node.name, row)
        words[layout.NUM] = row + 1
        words[layout.NEXT_BASE] = self._next_base

    def set_open_files(self, number: int) -> None:
        """Let each worker hold `number` blob files open, from its next batch of requests on."""
        self._memory.words[layout.OPEN_FILES] = number

    def revoke(self, name: bytes) -> None:
        """Hide a granted name and everything below it; nodeids that the guest holds become stale.

        If the name is granted again, its nodes have other nodeids.

        Raises:
            KeyError: the session does not see the name.
        """
        self._revoke_row(self._rows.pop(name))

    def _revoke_row(self, row: int) -> None:
        self._num_revoked += 1
        self._memory.words[layout.ROWS_AT // 8 + row * layout.ROW_WORDS + 3] = layout.REVOKED
        self._memory.words[layout.NUM_REVOKED] = self._num_revoked

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
        return self._memory.words[layout.VIEW_STATE]

    def set_view_state(self, number: int) -> None:
        """Note that the session's view is now in the state with this number, from 1 on."""
        self._memory.words[layout.VIEW_STATE] = number

    @property
    def root_generation(self) -> int:
        """The generation of the store up to which all paths were granted."""
        return self._root_generation

    def set_root_generation(self, generation: int) -> None:
        """Note that every path that the store had at `generation` has been granted."""
        self._root_generation = generation
        self._memory.words[layout.ROOT_GENERATION] = generation

    def set_root_fresh_until(self, time_ns: int) -> None:
        """Note when the root must be listed again: `time_ns` on CLOCK_MONOTONIC."""
        self._memory.words[layout.FRESH_UNTIL] = time_ns

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
        self._end = memory.words[layout.HEAP_END]
        self._next_base = memory.words[layout.NEXT_BASE]
        self._root_generation = memory.words[layout.ROOT_GENERATION]
        for row in range(memory.words[layout.NUM]):
            grant = memory.grant(row)
            self._next_base = max(self._next_base, grant.base + grant.span)
            if memory.is_revoked(row):
                continue
            name = grant.name
            if name in self._rows:
                self._revoke_row(self._rows[name])  # it was about to be replaced
            self._rows[name] = row
        self._num_rows = memory.words[layout.NUM]
        self._num_revoked = memory.words[layout.NUM_REVOKED]
        self._slots_log2 = max(_FIRST_SLOTS_LOG2, (2 * self._num_rows).bit_length()) - 1
        self._grow_index()

    def _root_record(self, node: Node, row: int, name_valid_s: int) -> bytes:
        kind, digest, size, target = content_of(node)
        ino = content_ino(kind, digest, target) if self._is_by_content else self._next_base
        generation, _is_by_content = self._memory.numbers()
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
        return layout.RECORD_HEAD.pack(kind, len(target), size, digest) + record + target

    def _put(self, item: bytes) -> int:
        at = self._end
        end = at + layout.padded(len(item))
        if end + layout.RECORD_MAX > self._memory.size:
            self._enlarge(end + layout.RECORD_MAX)
        self._end = self._memory.words[layout.HEAP_END] = end
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
        self._memory.words[layout.INDEX] = at << 8 | self._slots_log2

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
        os.ftruncate(fd, layout.ROWS_END + _GROWTH)
        # If a holder could shrink the file, the others would get SIGBUS.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    except OSError:
        os.close(fd)
        raise
    return fd
