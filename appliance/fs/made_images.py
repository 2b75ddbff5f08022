"""Images made in a worker: of a store that cannot be written and was filled without them."""

from collections import OrderedDict
from typing import Final

from appliance.errors import StoreError
from appliance.images import builder
from appliance.store.lmdb_env import ReadTransaction
from appliance.store.store import Store

_BYTES_MAX: Final = 4 << 20


class MadeImages:
    """The images made last, of the Directories in `store`; up to 4 MiB, or one that is larger."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._made: OrderedDict[bytes, dict[int, bytearray]] = OrderedDict()
        self._num_bytes = 0

    def piece(self, txn: ReadTransaction, digest: bytes, piece: int) -> memoryview:
        """Return a piece of the image of a Directory.

        Raises:
            StoreError: the store does not have the Directory.
            DirectoryError: what it has is none.
        """
        pieces = self._made.get(digest)
        if pieces is None:
            pieces = self._make(txn, digest)
        return memoryview(pieces[piece])

    def _make(self, txn: ReadTransaction, digest: bytes) -> dict[int, bytearray]:
        encoded = self._store.directory(txn, digest)
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
