"""Blobs of a cache that are there in part: which bytes, and in which file.

The record of such a blob, in the database `blobs`, states the size of the whole blob, a random
token, the digest of the list of chunks that the parts were verified by, and the ranges of bytes
that are there: start and end of each as u64 LE, in ascending order, neither overlapping nor
adjacent.

The file is sparse and as long as the whole blob. Its name is that of a blob file with the token
added. So whoever has read a record can only open the file that the record speaks of: if the blob is
evicted and fetched anew, the new file has another name.

A range enters the record only after its bytes were verified and are in the file; other bytes are
never written there. So readers may send to a guest whatever they find in the record.
"""

import os
import struct
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from appliance.castore.digest import DIGEST_SIZE
from appliance.db.environment import WriteTransaction
from appliance.store.schema import PARTIAL

if TYPE_CHECKING:
    import lmdb

_HEADER: Final = struct.Struct("<B7xQ8s32s")
_TOKEN_SIZE: Final = 8
# Of the keys that name the files, see `PartialBlob.key`.
KEY_SIZE: Final = DIGEST_SIZE + _TOKEN_SIZE


class PartialBlob(NamedTuple):
    """The record of a blob that is there in part.

    Attributes:
        digest: digest of the blob.
        size: size of the whole blob in bytes.
        token: tells this file of the blob from others.
        list_digest: digest of the list of chunks that the parts were verified by.
        bounds: start and end of each range that is there, alternating.
    """

    digest: bytes
    size: int
    token: bytes
    list_digest: bytes
    bounds: Sequence[int]

    @classmethod
    def new(cls, digest: bytes, size: int, list_digest: bytes) -> Self:
        """Return the record of a blob of which nothing is there."""
        return cls(digest, size, os.urandom(_TOKEN_SIZE), list_digest, array("Q"))

    @classmethod
    def unpack(cls, digest: bytes, record: bytes | memoryview) -> Self:
        """Decode a record; if it is a memoryview, the result lives no longer than it does."""
        _, size, token, list_digest = _HEADER.unpack_from(record)
        bounds = memoryview(record)[_HEADER.size :].cast("Q")
        return cls(digest, int(size), token, list_digest, bounds)

    def pack(self) -> bytes:
        """Encode the record."""
        header = _HEADER.pack(PARTIAL, self.size, self.token, self.list_digest)
        return header + array("Q", self.bounds).tobytes()

    @property
    def key(self) -> bytes:
        """What names the file, in place of the digest of a blob that is there as a whole."""
        return self.digest + self.token

    @property
    def is_whole(self) -> bool:
        """Whether all bytes are there."""
        return list(self.bounds[:2]) == [0, self.size]

    def has(self, start: int, end: int) -> bool:
        """Whether the bytes from `start` to `end`, which is greater, are there."""
        index = bisect_right(self.bounds, start)
        return index % 2 == 1 and self.bounds[index] >= end

    def with_ranges(self, ranges: Iterable[tuple[int, int]]) -> Self:
        """Return a copy in which the bytes of `ranges` are there, too."""
        bounds = array("Q", self.bounds)
        for start, end in ranges:
            first, last = bisect_left(bounds, start), bisect_right(bounds, end)
            # A bound that lies inside another range, or touches one, is none any more.
            kept = [bound for bound, at in ((start, first), (end, last)) if at % 2 == 0]
            bounds[first:last] = array("Q", kept)
        return self._replace(bounds=bounds)


def partial_in(txn: WriteTransaction, blobs: "lmdb._Database", digest: bytes) -> PartialBlob | None:
    """Return what is there of a blob of which a part is there, read in a write transaction."""
    record = txn.get(digest, db=blobs)
    if record is None or record[0] != PARTIAL:
        return None
    return PartialBlob.unpack(digest, record)
