"""An encoder that takes a directory entry by entry and holds little more than its encoding.

castore.proto: Directory. Protobuf encodings of one message type, joined, decode to a message with
the repeated fields of both, so an encoding can be made in parts.
"""

from typing import Final

from appliance.castore.directory import WrongSortingError
from appliance.castore.size_dialect import SizeDialect
from appliance.protos import castore_pb2

# The largest encoded directory, in bytes, that we receive over gRPC; and that peers receive, whose
# limit is the default of gRPC.
ENCODED_MAX: Final = 16 << 20
PEER_ENCODED_MAX: Final = 4 << 20
# The least number of bytes that an entry takes besides its name: a symlink, with a target of one
# byte; and a file or directory, with its digest.
ENTRY_MIN: Final = 7
NODE_MIN: Final = 38

# The number of entries held as messages, which take ten times the memory of their encoding.
_PENDING_MAX: Final = 512


class DirectoryEncoder:
    """Makes the canonical encoding of one directory.

    The caller adds entries of all kinds by ascending name, with valid names and targets. The adding
    methods raise `WrongSortingError` for a name that does not come after the last one.
    """

    __slots__ = ("_child_sizes", "_last", "_num_entries", "_num_pending", "_parts", "_pending")

    def __init__(self) -> None:
        self._last = b""
        self._num_entries = 0
        self._child_sizes = 0
        self._num_pending = 0
        self._pending = castore_pb2.Directory()
        # Encoded directories, files and symlinks, in the order of their fields in the message.
        self._parts = (bytearray(), bytearray(), bytearray())

    def __len__(self) -> int:
        """Return the number of entries."""
        return self._num_entries

    def add_directory(self, name: bytes, digest: bytes, size: int) -> None:
        """Add a directory; `size` is the size in its node."""
        self._count(name)
        self._pending.directories.add(name=name, digest=digest, size=size)
        self._child_sizes += size

    def add_file(self, name: bytes, digest: bytes, size: int, *, executable: bool) -> None:
        """Add a file of `size` bytes."""
        self._count(name)
        self._pending.files.add(name=name, digest=digest, size=size, executable=executable)

    def add_symlink(self, name: bytes, target: bytes) -> None:
        """Add a symlink."""
        self._count(name)
        self._pending.symlinks.add(name=name, target=target)

    def size(self, dialect: SizeDialect) -> int:
        """Return the `size` that a node for this directory must have."""
        return self._num_entries * dialect.value + self._child_sizes

    def to_bytes(self) -> bytes:
        """Return the encoding of all entries added so far."""
        if not any(self._parts):
            return self._pending.SerializeToString(deterministic=True)
        self._flush()
        return b"".join(self._parts)

    def _count(self, name: bytes) -> None:
        if name <= self._last:
            raise WrongSortingError(name)
        self._last = name
        self._num_entries += 1
        self._num_pending += 1
        if self._num_pending > _PENDING_MAX:
            self._flush()
            self._num_pending = 1

    def _flush(self) -> None:
        pending, self._pending = self._pending, castore_pb2.Directory()
        directories, files, symlinks = self._parts
        symlinks += castore_pb2.Directory(symlinks=pending.symlinks).SerializeToString(
            deterministic=True
        )
        del pending.symlinks[:]
        files += castore_pb2.Directory(files=pending.files).SerializeToString(deterministic=True)
        del pending.files[:]
        directories += pending.SerializeToString(deterministic=True)
