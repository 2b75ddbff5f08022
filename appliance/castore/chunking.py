"""Chunks: the parts into which large blobs are cut, so that a reader can fetch and verify a part.

A chunk is a blob of its own, named by its BLAKE3. Where a blob is cut depends on its content alone
(FastCDC, version 2020, in C), so blobs that have a long run of bytes in common have chunks in
common. The parameters are those of Snix, so that this is true across both.

A list of chunks is kept packed: digest, and size in bytes as u32 LE, of each chunk in order.
"""

import struct
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from blake3 import blake3

from appliance._fastcdc import ffi, lib
from appliance.castore.digest import DIGEST_SIZE, Digest

# Blobs of more bytes than this are cut; a smaller one is fetched whole as quickly.
UNCHUNKED_MAX: Final = 1 << 20

_ENTRY: Final = struct.Struct(f"<{DIGEST_SIZE}sI")
ENTRY_SIZE: Final = _ENTRY.size
# Bytes that C takes in one call.
_SLICE: Final = 1 << 20


class Parameters(NamedTuple):
    """The sizes, in bytes, and masks of FastCDC; `min` and `normal` are even."""

    min: int
    normal: int
    max: int
    mask_short: int
    mask_long: int


# An average of 256 KiB, half of it at least and twice of it at most; the masks are those of 512 KiB
# and 128 KiB in the table of the crate `fastcdc`, as normalization level 1 has it.
SNIX: Final = Parameters(128 << 10, 256 << 10, 512 << 10, 0x0000D91707537000, 0x0000D90703537000)


class BlobChunk(NamedTuple):
    """A part of a blob that is a blob of its own; `size` is in bytes."""

    digest: Digest
    size: int


class Chunker:
    """Cuts one blob, whose content passes through `update` once, into chunks."""

    def __init__(self, parameters: Parameters = SNIX) -> None:
        self._cdc = ffi.new("struct fastcdc *")
        self._cdc.min, self._cdc.normal, self._cdc.max = parameters[:3]
        self._cdc.mask_short, self._cdc.mask_long = parameters[3:]
        self._ends = ffi.new("uint64_t[]", _SLICE // parameters.min + 2)
        self._hasher = blake3()
        # Offsets in the blob: where the current chunk began, and up to where it was hashed.
        self._start = 0
        self._hashed = 0
        # The byte there, if it was not settled which chunk it belongs to when the data ended.
        self._held = b""
        self._packed = bytearray()

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Take the next part of the content; the caller may reuse the buffer afterwards."""
        view = memoryview(data)
        for at in range(0, len(view), _SLICE):
            self._take(view[at : at + _SLICE])

    def take_packed(self) -> bytes:
        """Return the chunks that have ended since the last call, packed."""
        packed = bytes(self._packed)
        self._packed.clear()
        return packed

    def finish(self) -> bytes:
        """End the blob, and return the chunks that have ended since the last call, packed."""
        self._hasher.update(self._held)
        self._hashed += len(self._held)
        self._held = b""
        if self._hashed > self._start:
            self._end_chunk()
        return self.take_packed()

    def _take(self, data: memoryview) -> None:
        start = self._hashed + len(self._held)
        num_ends = lib.fastcdc_take(self._cdc, ffi.from_buffer(data), len(data), self._ends)
        for index in range(num_ends):
            self._hash(data, start, self._ends[index])
            self._end_chunk()
        self._hash(data, start, self._cdc.settled)
        if self._hashed == start + len(data) - 1:
            self._held = bytes(data[-1:])

    def _hash(self, data: memoryview, start: int, end: int) -> None:
        # Up to the offset `end` in the blob; `data` begins at `start`.
        if end > self._hashed and self._held:
            self._hasher.update(self._held)
            self._held = b""
            self._hashed = start
        self._hasher.update(data[max(self._hashed - start, 0) : max(end - start, 0)])
        self._hashed = max(self._hashed, end)

    def _end_chunk(self) -> None:
        size = self._hashed - self._start
        self._packed += _ENTRY.pack(self._hasher.digest(), size)
        self._hasher.reset()
        self._start = self._hashed


def pack(chunks: Iterable[BlobChunk]) -> bytes:
    """Pack a list of chunks."""
    return b"".join(_ENTRY.pack(*chunk) for chunk in chunks)


def unpack(packed: bytes | memoryview) -> Iterator[BlobChunk]:
    """Yield the chunks of a packed list, in order."""
    for digest, size in _ENTRY.iter_unpack(packed):
        yield BlobChunk(Digest(digest), size)
