"""The messages between the importing processes.

    tree process     -- requests -->                    hashing process
    hashing process  -- HashRecords -->                 tree process
    tree process     -- objects, some of HashRecords --> committing process

Requests are byte strings that end with a NUL:

    NAME                    read the file NAME in the current directory
    /PATH                   PATH is the current directory from here on, relative to the root
    //DEVICE:INODE:PREFIX   the root of the next tree, see `OpenRoot`; the numbers are decimal

A `HashRecord` describes a file, or a piece of one, that is in the ring of the hashing process: the
content is the `size` bytes at `offset`. The record uses `used` bytes of the ring: the content, what
surrounds it, and what was skipped at the end of the ring. The committing process gives them back,
oldest first.

An object is an `ObjectHeader` followed by `size` bytes.
"""

import struct
from enum import IntEnum
from typing import Any, Final, NamedTuple, TypeAlias

from appliance.importer.roots import Identity, OpenRoot
from appliance.nix.store_path import StorePath

DIGEST_SIZE: Final = 32


class HashKind(IntEnum):
    """What a `HashRecord` describes."""

    # A piece of a file; more pieces follow.
    PIECE = 0
    # The last piece of a file, or the whole file.
    LAST = 1
    # The file cannot be imported. The content is an error message.
    REFUSED = 2
    # The disk for staged files is full. The content is an error message.
    FULL = 3
    # Staging failed for another reason. The content is an error message.
    FAILED = 4
    # After a piece of a file that is staged: the content is a list of chunks of the file (see
    # `castore/chunking.py`), the next ones after those in its earlier records.
    CHUNKS = 5


# Records that do not end their file.
INNER_KINDS: Final = frozenset({HashKind.PIECE, HashKind.CHUNKS})


class HashRecord(NamedTuple):
    """A file or a piece of one, read into the ring and hashed."""

    kind: int
    executable: bool
    # Bytes between the start of the frame and the content. The frame is the file as an entry of a
    # NAR; see `frame_size`.
    lead: int
    # Position of the content in the ring, and its size.
    offset: int
    size: int
    # Bytes of the ring to give back.
    used: int
    # Size of the whole file, in each of its records.
    file_size: int
    # Number of the staged file, or 0 if the file was not staged. Then the content is either small
    # enough to be kept inline, or was staged for an earlier file. If the file was read in one
    # piece, the whole content is in the ring in any case.
    staged: int
    # Size of the frame in the ring, or 0 if there is only the content.
    frame_size: int
    # BLAKE3 of the file; valid only in the last record of a file.
    digest: bytes


# A `HashRecord` as it is unpacked. Making the named tuple would take as long as using it.
HashTuple: TypeAlias = tuple[Any, ...]

HASH_RECORD: Final = struct.Struct("<B?HIIIQII32s")
# The fields `offset` and `size` alone.
HASH_RECORD_CONTENT: Final = struct.Struct("<4xII52x")
HASH_RECORD_DIGEST_AT: Final = HASH_RECORD.size - DIGEST_SIZE


class ObjectKind(IntEnum):
    """What the content of an object is."""

    # Records of one hashing process; the tree process has finished with their bytes in the ring.
    RECORDS = 0
    # An encoded Directory.
    DIRECTORY = 1
    # The PathInfo of a path that is complete, see `pack_path_info`.
    PATH_INFO = 2
    # An error message: the current path cannot be imported.
    REFUSED = 3
    # An error message: the disk for staged files is full, so the import ends.
    FULL = 4
    # An error message: staging failed for another reason, so the import ends.
    FAILED = 5
    # Nothing: the hashing process `hasher` has ended, so the import ends.
    ENDED = 6
    # The path of the current file; `num_files` and `num_bytes` have been done.
    PROGRESS = 7
    # A warning for the user; the import goes on.
    WARNING = 8
    # Nothing: the objects since the last PATH_INFO or REFUSED are not needed.
    ABANDONED = 9


class ObjectHeader(NamedTuple):
    """The header of an object; fields that do not apply to its kind are 0."""

    # An `ObjectKind`.
    kind: int
    # Index of the hashing process, for RECORDS and ENDED.
    hasher: int
    # Bytes of content that follow.
    size: int
    # For PROGRESS.
    num_files: int
    num_bytes: int
    # BLAKE3, for DIRECTORY.
    digest: bytes


OBJECT_HEADER: Final = struct.Struct("<BBxxIQQ32s")


def pack_root_request(root: OpenRoot) -> bytes:
    """Return the request that makes `root` the root of the requests after it."""
    return b"//%d:%d:%b\0" % (*root.identity, root.prefix)


def unpack_root_request(request: bytes) -> tuple[Identity, bytes] | None:
    """Return identity and prefix of the root that `request`, without its NUL, names.

    Return None if it is a request of another kind.
    """
    if not request.startswith(b"//"):
        return None
    device, inode, prefix = request[2:].split(b":", 2)
    return (int(device), int(inode)), prefix


def pack_path_info(path: StorePath, encoded: bytes) -> bytes:
    """Return the content of a PATH_INFO object."""
    return b"%b\0%b" % (path.basename().encode(), encoded)


def unpack_path_info(content: bytes) -> tuple[StorePath, bytes]:
    """Return the store path and the encoded PathInfo in the content of a PATH_INFO object."""
    path, _, encoded = content.partition(b"\0")
    return StorePath.parse(path), encoded
