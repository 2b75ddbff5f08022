"""What the importing processes tell each other, in records of a fixed size.

    hashing process --HashRecord--> tree process --ObjectRecord--> process that commits

The content of files travels in a ring per hashing process, memory shared by all of them: `size`
bytes at `offset`. A record takes `used` bytes of its ring, those before the content and those
skipped at the end of the ring included; the process that commits gives them back, oldest first.
"""

import struct
from enum import IntEnum
from typing import Final, NamedTuple

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
    offset: int
    size: int
    used: int
    # Of the whole file, in every one of its records.
    file_size: int
    # Number of the staged file; 0 if there is none, and the byte before the content in the ring is
    # the prefix of its record in the store.
    staged: int
    # In the last record of a file only.
    digest: bytes


HASH_RECORD: Final = struct.Struct("<B?xxIIIQQ32s")


class ObjectKind(IntEnum):
    """What an `ObjectRecord` says."""

    # Nothing but the bytes to give back.
    USED = 0
    # A blob whose record for the store is in the ring.
    BLOB = 1
    # A blob of `number` bytes in a staged file.
    FILE = 2
    # The rest has its content in the frame's payload. A directory.
    DIRECTORY = 3
    # A PathInfo: the path in hand is complete.
    PATH_INFO = 4
    # A reason: the path in hand cannot be imported.
    REFUSED = 5
    # A reason: nothing more can be imported.
    FULL = 6
    FAILED = 7
    # Nothing more can be imported: the hashing process has ended.
    ENDED = 8
    # Path of the file just done; `number` bytes are done, of `staged` files.
    PROGRESS = 9


class ObjectRecord(NamedTuple):
    """An object for the store, or what becomes of the path in hand."""

    kind: int
    # Index of the hashing process that has the ring.
    hasher: int
    offset: int
    size: int
    used: int
    number: int
    staged: int
    digest: bytes


OBJECT_RECORD: Final = struct.Struct("<BBxxIIIQQ32s")

# A frame: number of records, size of the payload; the records; the payload.
FRAME: Final = struct.Struct("<II")
