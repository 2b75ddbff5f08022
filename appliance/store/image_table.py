"""The images of Directories in an environment: reading them, putting them, removing them.

An image is visible by its first piece, which is put last. A Directory with a great many entries has
several pieces, and LMDB keeps what a transaction writes in memory: so `put_ahead` puts all but the
first in transactions of their own, before the one that makes the Directory visible.
"""

from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

from appliance.db.environment import Environment, WriteTransaction
from appliance.errors import DirectoryError, StoreError
from appliance.images import builder, layout
from appliance.store.schema import IMAGES, image_key
from appliance.store.snapshot import Snapshot

# A Directory whose image has several pieces is not encoded in less: 8 bytes an entry at the least.
_PIECES_MIN_BYTES: Final = 8 * layout.PIECE_ENTRIES


class ImageTable:
    """The database `images1` of `env`; a store that is only read may be older than it."""

    def __init__(self, env: Environment) -> None:
        self._env = env
        self._database = env.newer_database(IMAGES)

    def put(self, txn: WriteTransaction, directories: Mapping[bytes, bytes]) -> None:
        """Put the images that are not there yet, of Directories by digest in canonical encoding.

        One that is not a Directory gets none, and keeps no other from its image: whoever walks into
        it is told.
        """
        images = txn.cursor(db=self._database)
        for digest, encoded in sorted(directories.items()):
            if not images.set_key(digest):
                with suppress(DirectoryError):
                    for number, piece in builder.pieces(encoded):
                        # Pieces of an image that was never finished are the same bytes.
                        images.put(image_key(digest, number), piece, overwrite=False)

    def put_pieces(
        self, txn: WriteTransaction, digest: bytes, pieces: Mapping[int, bytearray]
    ) -> None:
        """Put an image that was made already."""
        for number, piece in pieces.items():
            txn.put(image_key(digest, number), piece, db=self._database)

    def put_ahead(self, directories: Mapping[bytes, bytes]) -> None:
        """Put all pieces but the first of images that have several, in transactions of their own.

        Raises:
            StoreError: LMDB failed.
        """
        for digest, encoded in directories.items():
            if len(encoded) >= _PIECES_MIN_BYTES and not self._is_there(digest):
                with suppress(DirectoryError):  # as in `put`
                    for number, piece in builder.pieces(encoded):
                        if number:
                            self._put_piece(image_key(digest, number), piece)

    def remove(self, txn: WriteTransaction, digest: bytes) -> None:
        """Remove an image, if it is there, and all pieces of one that was never finished."""
        cursor = txn.cursor(db=self._database)
        is_there = cursor.set_range(digest)
        while is_there and cursor.key().startswith(digest):
            is_there = cursor.delete()

    def _put_piece(self, key: bytes, piece: bytearray) -> None:
        self._env.write(lambda txn: txn.put(key, piece, overwrite=False, db=self._database))

    def _is_there(self, digest: bytes) -> bool:
        with self._env.read() as txn:
            return txn.get(digest, None, self._database) is not None


# --- Images that a worker makes, of a store that nobody here can write and that has none ---

_BYTES_MAX: Final = 4 << 20


class MadeImages:
    """The images made last, up to 4 MiB of them, or one that is larger."""

    def __init__(self) -> None:
        self._made: OrderedDict[bytes, dict[int, bytearray]] = OrderedDict()
        self._num_bytes = 0

    def piece(self, snapshot: Snapshot, digest: bytes, piece: int) -> memoryview:
        """Return a piece of the image of a Directory.

        Raises:
            StoreError: the store does not have the Directory.
            DirectoryError: what it has is none.
        """
        pieces = self._made.get(digest)
        if pieces is None:
            pieces = self._make(snapshot, digest)
        return memoryview(pieces[piece])

    def _make(self, snapshot: Snapshot, digest: bytes) -> dict[int, bytearray]:
        encoded = snapshot.directory(digest)
        if encoded is None:
            raise StoreError("it is not in the store")
        pieces = self._made[digest] = dict(builder.pieces(encoded))
        self._num_bytes += _size_of(pieces)
        while self._num_bytes > _BYTES_MAX and len(self._made) > 1:
            _digest, oldest = self._made.popitem(last=False)
            self._num_bytes -= _size_of(oldest)
        return pieces


def _size_of(pieces: dict[int, bytearray]) -> int:
    return sum(map(len, pieces.values()))
