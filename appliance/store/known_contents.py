"""What a store knows of contents while a PathInfo is put into it."""

from typing import TYPE_CHECKING

from appliance.castore.digest import Digest
from appliance.castore.nodes import Directory
from appliance.store.lmdb_env import WriteTransaction

if TYPE_CHECKING:
    from appliance.store.store import Store


class KnownContents:
    """What is in `store`; see `path_info_rules.Known`."""

    def __init__(self, store: "Store", txn: WriteTransaction) -> None:
        self._store = store
        self._txn = txn

    def nar_of(self, key: Digest) -> tuple[int, bytes] | None:
        """See `Known.nar_of`."""
        return self._store.nar_info(self._txn, key)

    def directory_of(self, digest: Digest) -> Directory | None:
        """See `Known.directory_of`."""
        encoded = self._store.directory(self._txn, digest)
        if encoded is None or Digest.of(encoded) != digest:
            return None
        return Directory.from_bytes(encoded)
