"""Reads many small files into a ring with one call to the C module, and hashes them."""

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

# Upper bound in bytes for what the frame of a file (its NAR entry) has beside the content: tokens,
# lengths, padding, and a name of up to 255 bytes.
FRAME_EXTRA_MAX: Final = 512

# Stands for "no descriptor".
_NO_FD: Final = -1


class Reading(NamedTuple):
    """The result of one `FileReader.read`."""

    # Packed `HashRecord`s, in memory that the next call overwrites.
    records: memoryview
    # Byte offsets in `records` of the records with more than `INLINE_MAX` bytes of content. The
    # caller has to stage those contents.
    large: list[int]
    # Bytes of the requests that have been served.
    num_done: int
    # Whether the next request has to be served in another way: it names a root, or a file that is
    # too large, has been replaced by something else, or cannot be read.
    is_refused: bool


class FileReader:
    """Reads whole files into the ring, each framed as an entry of a NAR, and hashes them.

    Args:
        ring: writable shared memory.
        file_max: size in bytes of the largest file to read.
        records_max: maximum number of files for one call.
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
        reader.root = reader.directory = _NO_FD

    def begin_root(self, directory: int | None) -> None:
        """Resolve the paths of later requests below `directory`, which the caller keeps open.

        With None, `read` refuses every request.
        """
        reader = self._reader
        reader.root = _NO_FD if directory is None else directory
        if reader.directory >= 0:
            os.close(reader.directory)
        reader.directory = _NO_FD

    def read(
        self, requests: memoryview, position: int, room: int, skipped: int, records_max: int
    ) -> Reading:
        """Serve requests from the first one on, until one is refused or something is used up.

        Args:
            requests: names of files and paths of their directories, in the form that `records`
                describes.
            position: offset in the ring of the first frame.
            room: number of bytes from `position` on that may be written. A file takes at most
                `FRAME_EXTRA_MAX` bytes more than its size.
            skipped: bytes of the ring that were left unused before `position`; they are added to
                `used` in the first record.
            records_max: maximum number of files.
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
    """Point `token` at `value`; return the object that must be kept alive as long as `token`."""
    buffer = ffi.from_buffer(value)
    token.bytes = buffer
    token.size = len(value)
    return buffer


if ffi.sizeof("struct reader_record") != HASH_RECORD.size:
    raise ImportError("the C module was built from another version: its records have another size")
