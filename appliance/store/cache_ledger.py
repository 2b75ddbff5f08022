"""The ledger of a cache: how much each of its entries counts, and when it was last used.

`blob_cache` documents the two databases and says what the entries stand for. Every method runs in
a transaction of the caller, so that the ledger changes together with what it accounts for.
"""

import struct
import time
from collections.abc import Container
from typing import Final

from appliance.db.environment import Environment, ReadTransaction, WriteTransaction
from appliance.store.schema import pack_number, unpack_number

ENTRIES: Final = b"cache"
USES: Final = b"cache_use"

_CHARGED_KEY: Final = b"charged"
# Time of the last use and charge.
_ENTRY: Final = struct.Struct("<QQ")
# The time, before the key of the entry; big-endian, so that the least recently used sorts first.
_TIME: Final = struct.Struct(">Q")


class CacheLedger:
    """The entries of a cache in `env`, which must have the databases `ENTRIES` and `USES`."""

    def __init__(self, env: Environment) -> None:
        self._entries = env.database(ENTRIES)
        self._uses = env.database(USES)

    def total(self, txn: "ReadTransaction | WriteTransaction") -> int:
        """Return the sum of all charges in bytes."""
        return unpack_number(txn.get(_CHARGED_KEY, None, self._entries))

    def charge(self, txn: WriteTransaction, key: bytes) -> int | None:
        """Return the charge of an entry, or None if there is no such entry."""
        value = txn.get(key, None, self._entries)
        return None if value is None else int(_ENTRY.unpack(value)[1])

    def put(self, txn: WriteTransaction, key: bytes, charge: int) -> None:
        """Put an entry that was used just now, in place of one with the same key."""
        self.remove(txn, key)
        self._put(txn, key, time.monotonic_ns(), charge)
        self._add(txn, charge)

    def touch(self, txn: WriteTransaction, key: bytes, time_ns: int) -> None:
        """Note that an entry, if it is there, was used at `time_ns` (CLOCK_MONOTONIC)."""
        value = txn.get(key, None, self._entries)
        if value is not None and key != _CHARGED_KEY:
            used_ns, charge = _ENTRY.unpack(value)
            txn.delete(_TIME.pack(used_ns) + key, db=self._uses)
            self._put(txn, key, time_ns, charge)

    def remove(self, txn: WriteTransaction, key: bytes) -> None:
        """Remove an entry, if it is there."""
        value = txn.get(key, None, self._entries)
        if value is not None:
            used_ns, charge = _ENTRY.unpack(value)
            txn.delete(key, db=self._entries)
            txn.delete(_TIME.pack(used_ns) + key, db=self._uses)
            self._add(txn, -charge)

    def least_used(
        self, txn: WriteTransaction, wanted: int, keep: Container[bytes]
    ) -> list[tuple[bytes, int]] | None:
        """Return the least recently used entries that are charged `wanted` bytes together.

        Args:
            txn: a write transaction.
            wanted: how many bytes to find; if it is not positive, no entry is returned.
            keep: keys of entries that are passed over.

        Returns:
            Key and charge of each entry, or None if there are not enough.
        """
        found: list[tuple[bytes, int]] = []
        if wanted <= 0:
            return found
        for use in txn.cursor(self._uses).iternext(keys=True, values=False):
            key = use[_TIME.size :]
            if key not in keep:
                _used_ns, charge = _ENTRY.unpack(txn.get(key, b"", self._entries))
                found.append((key, charge))
                wanted -= charge
                if wanted <= 0:
                    return found
        return None

    def _put(self, txn: WriteTransaction, key: bytes, time_ns: int, charge: int) -> None:
        txn.put(key, _ENTRY.pack(time_ns, charge), db=self._entries)
        txn.put(_TIME.pack(time_ns) + key, b"", db=self._uses)

    def _add(self, txn: WriteTransaction, charge: int) -> None:
        txn.put(_CHARGED_KEY, pack_number(self.total(txn) + charge), db=self._entries)
