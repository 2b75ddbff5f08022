"""What the importing processes tell each other.

    hashing process --HashRecord--> tree process --the same, and objects--> process that commits

The content of files travels in a ring per hashing process, memory shared by all of them: `size`
bytes at `offset`. A record takes `used` bytes of its ring, with what is before and behind the
content and what is skipped at the end of the ring; the process that commits gives them back, oldest
first.

    tree process --requests--> hashing process

A request ends with a NUL. It is the name of a file to read; or, after a slash, the path from the
root of the directory that the files after it are in; or, after two slashes, the root.
"""

import struct
from enum import IntEnum
from typing import Any, Final, NamedTuple, TypeAlias

from appliance.importer.roots import Identity, OpenRoot
from appliance.nix.store_path import StorePath

DIGEST_SIZE: Final = 32


class HashKind(IntEnum):
    """What a `HashRecord` says."""

    # A piece of a file, more follow.
    PIECE = 0
    # The last piece of a file, or the only one.
    LAST = 1
    # The file cannot be imported; the content is the reason.
    REFUSED = 2
    # The disk of the store is full; the content is the reason.
    FULL = 3
    # The disk of the store fails; the content is the reason.
    FAILED = 4


class HashRecord(NamedTuple):
    """A piece of content, read and hashed."""

    kind: int
    executable: bool
    # In the ring, the content begins as far into its frame, its entry in a NAR.
    lead: int
    offset: int
    size: int
    used: int
    # Of the whole file, in every one of its records.
    file_size: int
    # Number of the staged file; 0 if there is none. The content in the ring is whole then, and the
    # byte before it is the prefix of its record in the store; if it is too large for that, it was
    # staged for an earlier file.
    staged: int
    # 0 if there is no frame.
    frame_size: int
    # In the last record of a file only.
    digest: bytes


# The fields as they are unpacked: naming them costs as much as using them.
HashTuple: TypeAlias = tuple[Any, ...]

HASH_RECORD: Final = struct.Struct("<B?HIIIQII32s")
# Content alone, of each of a row of records.
HASH_RECORD_CONTENT: Final = struct.Struct("<4xII52x")
HASH_RECORD_DIGEST_AT: Final = HASH_RECORD.size - DIGEST_SIZE


class ObjectKind(IntEnum):
    """What an object from the tree process is, by its content."""

    # Records of one hashing process, of which no more is needed than to store their files.
    RECORDS = 0
    DIRECTORY = 1
    # A path is complete.
    PATH_INFO = 2
    # A reason: the path in hand cannot be imported.
    REFUSED = 3
    # A reason: nothing more can be imported.
    FULL = 4
    FAILED = 5
    # Nothing more can be imported: the hashing process has ended.
    ENDED = 6
    # Path of the file in hand or just done; `num_files` and `num_bytes` are done.
    PROGRESS = 7
    # What a person should know; the import goes on.
    WARNING = 8
    # What was put since the last path was complete, or refused, is not needed.
    ABANDONED = 9


class ObjectHeader(NamedTuple):
    """What precedes the content of an object."""

    kind: int
    # Index of the hashing process that is meant.
    hasher: int
    size: int
    num_files: int
    num_bytes: int
    # Of a directory.
    digest: bytes


def pack_root_request(root: OpenRoot) -> bytes:
    """Return the request that says which root the paths after it are from."""
    return b"//%d:%d:%b\0" % (*root.identity, root.prefix)


def unpack_root_request(request: bytes) -> tuple[Identity, bytes] | None:
    """Return the identity of the root and its prefix if `request`, without its NUL, says them."""
    if not request.startswith(b"//"):
        return None
    device, inode, prefix = request[2:].split(b":", 2)
    return (int(device), int(inode)), prefix


def pack_path_info(path: StorePath, encoded: bytes) -> bytes:
    """Return the content of a PATH_INFO."""
    return b"%b\0%b" % (path.basename().encode(), encoded)


def unpack_path_info(content: bytes) -> tuple[StorePath, bytes]:
    """Return the path and the encoded PathInfo."""
    path, _, encoded = content.partition(b"\0")
    return StorePath.parse(path), encoded


OBJECT_HEADER: Final = struct.Struct("<BBxxIQQ32s")
