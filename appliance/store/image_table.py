"""Directory images of a store: the table that keeps them, and images made in memory instead.

`ImageTable` writes the database `images1`; `Snapshot.image` reads it. A reader takes an image to be
there when its first piece is, so that piece is put last. LMDB keeps in memory whatever a
transaction writes, and the image of a Directory with very many entries is large: `put_ahead` puts
all pieces but the first in transactions of their own, before the transaction that makes the
Directory visible.

`MadeImages` is for the worker of a store that has no images and that this host can only read: an
older release filled it, and nobody here can put what is missing.
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

# An entry is encoded in 8 bytes or more, so a shorter Directory has an image of one piece.
_PIECES_MIN_BYTES: Final = 8 * layout.PIECE_ENTRIES
# Images that `MadeImages` keeps.
_MADE_BYTES_MAX: Final = 4 << 20


# --- Images in the store ---


class ImageTable:
    """Writes the images of Directories in `env`, which must be writable."""

    def __init__(self, env: Environment) -> None:
        self._env = env
        # None in a store of a release without images that is open for reading only.
        self._database = env.newer_database(IMAGES)

    def put(self, txn: WriteTransaction, directories: Mapping[bytes, bytes]) -> None:
        """Put the images of Directories, unless they are there already.

        An encoding that breaks a rule is skipped: it gets no image, and a guest that enters the
        directory gets an error.

        Args:
            txn: a write transaction of `env`.
            directories: canonical encodings by digest.
        """
        images = txn.cursor(db=self._database)
        for digest, encoded in sorted(directories.items()):
            if not images.set_key(digest):
                with suppress(DirectoryError):
                    for number, piece in builder.pieces(encoded):
                        # A piece left by an unfinished `put_ahead` has the same bytes.
                        images.put(image_key(digest, number), piece, overwrite=False)

    def put_pieces(
        self, txn: WriteTransaction, digest: bytes, pieces: Mapping[int, bytearray]
    ) -> None:
        """Put all pieces of one image, by their numbers."""
        for number, piece in pieces.items():
            txn.put(image_key(digest, number), piece, db=self._database)

    def put_ahead(self, directories: Mapping[bytes, bytes]) -> None:
        """Put the later pieces of large images, each in a transaction of its own.

        `put` must follow, to put the first pieces and the images of one piece.

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
        """Remove all pieces of an image, including those of an unfinished one."""
        cursor = txn.cursor(db=self._database)
        is_there = cursor.set_range(digest)
        while is_there and cursor.key().startswith(digest):
            is_there = cursor.delete()

    def _put_piece(self, key: bytes, piece: bytearray) -> None:
        self._env.write(lambda txn: txn.put(key, piece, overwrite=False, db=self._database))

    def _is_there(self, digest: bytes) -> bool:
        with self._env.read() as txn:
            return txn.get(digest, None, self._database) is not None


# --- Images in memory ---


class MadeImages:
    """The images that were made last: 4 MiB of them, or a single larger one."""

    def __init__(self) -> None:
        self._made: OrderedDict[bytes, dict[int, bytearray]] = OrderedDict()
        self._num_bytes = 0

    def piece(self, snapshot: Snapshot, digest: bytes, piece: int) -> memoryview:
        """Return a piece of the image of a Directory, which is made if it is not kept.

        Raises:
            StoreError: the store does not have the Directory.
            DirectoryError: what the store has breaks a rule of Directories.
        """
        pieces = self._made.get(digest)
        if pieces is None:
            pieces = self._make(snapshot, digest)
        return memoryview(pieces[piece])

    def _make(self, snapshot: Snapshot, digest: bytes) -> dict[int, bytearray]:
        encoded = snapshot.directory(digest)
        if encoded is None:
            raise StoreError("not in the store")
        pieces = self._made[digest] = dict(builder.pieces(encoded))
        self._num_bytes += _size_of(pieces)
        while self._num_bytes > _MADE_BYTES_MAX and len(self._made) > 1:
            _digest, oldest = self._made.popitem(last=False)
            self._num_bytes -= _size_of(oldest)
        return pieces


def _size_of(pieces: dict[int, bytearray]) -> int:
    return sum(map(len, pieces.values()))
