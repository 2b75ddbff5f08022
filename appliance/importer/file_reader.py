"""Reading many small files into a ring in one call, by the C module."""

import mmap
import os
from typing import TYPE_CHECKING, Final, NamedTuple

from blake3 import blake3

from appliance._reader import ffi, lib
from appliance.importer.records import (
    DIGEST_SIZE,
    HASH_RECORD,
    HASH_RECORD_CONTENT,
    HASH_RECORD_DIGEST_AT,
    HashKind,
)
from appliance.nix import nar
from appliance.store.schema import INLINE_MAX

if TYPE_CHECKING:
    from appliance._reader import Token

# More than the frame of any file takes beside its content.
FRAME_EXTRA_MAX: Final = 512

# In place of a descriptor.
_NONE: Final = -1


class Reading(NamedTuple):
    """What one call has read."""

    # Packed; the next call overwrites them.
    records: memoryview
    # Where in `records` those are whose content does not go inline, and is not staged yet.
    large: list[int]
    # Bytes of the requests that are done.
    num_done: int
    # The next request is not for this reader: of a file, for whatever reason, or of a root.
    is_refused: bool


class FileReader:
    """Reads files whole, each framed as an entry of a NAR, and hashes them.

    Args:
        ring: shared memory, writable.
        file_max: bytes of the largest file that it reads.
        records_max: the most files in one call.
    """

    def __init__(self, ring: mmap.mmap, file_max: int, records_max: int) -> None:
        self._ring = memoryview(ring)
        self._ring_start = ffi.from_buffer("uint8_t[]", ring)
        self._array = ffi.new("struct reader_record[]", records_max)
        self._records = memoryview(ffi.buffer(self._array)).cast("B")  # type: ignore[arg-type]
        self._reader = reader = ffi.new("struct reader *")
        self._kept = [
            _set_token(reader.entry, nar.ENTRY),
            _set_token(reader.node, nar.NODE),
            _set_token(reader.regular, nar.REGULAR),
            _set_token(reader.executable, nar.EXECUTABLE),
            _set_token(reader.close, nar.CLOSE_ENTRY),
        ]
        reader.kind = HashKind.LAST
        reader.file_max = file_max
        reader.ring = self._ring_start
        reader.records = self._array
        reader.root = reader.directory = _NONE

    def begin_root(self, directory: int | None) -> None:
        """Read what is below the open directory from now on, or nothing; it stays the caller's."""
        reader = self._reader
        reader.root = _NONE if directory is None else directory
        if reader.directory >= 0:
            os.close(reader.directory)
        reader.directory = _NONE

    def read(
        self, requests: memoryview, position: int, room: int, skipped: int, records_max: int
    ) -> Reading:
        """Read files into the ring.

        Args:
            requests: names of files and paths of their directories, see `records`.
            position: where in the ring the first frame goes.
            room: bytes from there on that may be written; a file takes `FRAME_EXTRA_MAX` more than
                its size at most.
            skipped: bytes of the ring that the first record counts as used beside its own.
            records_max: the most files.
        """
        reader = self._reader
        reader.position, reader.room, reader.skipped = position, room, skipped
        reader.records_max = records_max
        num_done = lib.reader_read(reader, ffi.from_buffer(requests), len(requests))
        records = self._records[: reader.records_num * HASH_RECORD.size]
        ring = self._ring
        at = HASH_RECORD_DIGEST_AT
        large = []
        for offset, size in HASH_RECORD_CONTENT.iter_unpack(records):
            records[at : at + DIGEST_SIZE] = blake3(ring[offset : offset + size]).digest()
            if size > INLINE_MAX:
                large.append(at - HASH_RECORD_DIGEST_AT)
            at += HASH_RECORD.size
        return Reading(records, large, num_done, bool(reader.is_refused))


def _set_token(token: "Token", value: bytes) -> object:
    """Set, and return what must live as long as `token`."""
    buffer = ffi.from_buffer(value)
    token.bytes = buffer
    token.size = len(value)
    return buffer


if ffi.sizeof("struct reader_record") != HASH_RECORD.size:
    raise ImportError("the C module is of another version: its records have another size")
