"""The chunks of large blobs: the list of each blob, and where a chunk is to be found.

A chunk is not stored by itself: it is a range of the file of a blob. Both tables say nothing of a
blob that an earlier release put; it gets its entries when it is put or imported again. They are no
part of what makes a blob visible, and their entries go with its record (`Store.remove_blob`).
"""

import struct
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

from appliance.castore.chunking import unpack
from appliance.castore.digest import DIGEST_SIZE
from appliance.db.environment import Environment, ReadTransaction, WriteTransaction
from appliance.store.schema import CHUNK_PLACES, CHUNKS

_PLACE: Final = struct.Struct("<QI")


class ChunkPlace(NamedTuple):
    """Where a chunk is: `size` bytes from `offset` on of the blob `blob`."""

    blob: bytes
    offset: int
    size: int


class ChunkTable:
    """Reads and writes the chunks of the store in `env`; every method runs in a transaction of it.

    A store of an earlier release that is open for reading only has no chunks.
    """

    def __init__(self, env: Environment) -> None:
        self._lists = env.newer_database(CHUNKS)
        self._places = env.newer_database(CHUNK_PLACES)

    def of_blob(self, txn: "ReadTransaction | WriteTransaction", digest: bytes) -> bytes | None:
        """Return the list of a blob's chunks, packed, or None if there is none."""
        if self._lists is None:
            return None
        packed = txn.get(digest, None, self._lists)
        return None if packed is None else bytes(packed)

    def places(
        self, txn: "ReadTransaction | WriteTransaction", digest: bytes
    ) -> Iterator[ChunkPlace]:
        """Yield every blob that has the chunk with this digest, and where in it."""
        if self._places is None:
            return
        cursor = txn.cursor(self._places)
        is_there = cursor.set_range(digest)
        while is_there and bytes(cursor.key()).startswith(digest):
            offset, size = _PLACE.unpack(cursor.value())
            yield ChunkPlace(bytes(cursor.key())[DIGEST_SIZE:], offset, size)
            is_there = cursor.next()

    def put(self, txn: WriteTransaction, lists: Mapping[bytes, bytes]) -> None:
        """Put the packed lists of chunks of blobs, in place of those that they have."""
        places: dict[bytes, bytes] = {}
        for digest, packed in lists.items():
            if txn.get(digest, db=self._lists) == packed:
                continue
            offset = 0
            for chunk in unpack(packed):
                places.setdefault(chunk.digest + digest, _PLACE.pack(offset, chunk.size))
                offset += chunk.size
            txn.put(digest, packed, db=self._lists)
        if places:
            txn.cursor(db=self._places).putmulti(sorted(places.items()))

    def remove(self, txn: WriteTransaction, digest: bytes) -> None:
        """Remove what is known of a blob's chunks, if anything is."""
        packed = txn.pop(digest, db=self._lists)
        if packed is not None:
            for chunk in unpack(packed):
                txn.delete(chunk.digest + digest, db=self._places)
