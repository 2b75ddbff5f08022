"""What a hashing process tells the importing one, a fixed-size record per piece of content.

The content itself lies in the ring, memory shared by the two: `size` bytes at `offset`. A record
takes `used` bytes of the ring, what was skipped at its end included; the reader gives them back.
"""

import struct
from enum import IntEnum
from typing import Final, NamedTuple


class Kind(IntEnum):
    """What a record says."""

    # A piece of a file, more follow.
    PIECE = 0
    # The last piece of a file, or the only one.
    LAST = 1
    # The file cannot be imported; the content is the reason, UTF-8.
    REFUSED = 2
    # The disk of the store is full; the content is the reason.
    FULL = 3
    # The disk of the store fails; the content is the reason.
    FAILED = 4


class Record(NamedTuple):
    """One record."""

    kind: int
    executable: bool
    offset: int
    size: int
    used: int
    # Of the whole file, in every one of its records.
    file_size: int
    # Number of the staged file, if there is one.
    staged: int
    # In the last record of a file only.
    digest: bytes


RECORD: Final = struct.Struct("<B?xxIIIQQ32s")
NO_STAGED: Final = 0
NO_DIGEST: Final = bytes(32)
