"""The Nix store of this machine, or one below another root: its database, read-only, and its trees.

ValidPaths    path, hash (sha256:HEX), deriver, narSize, sigs (separated by spaces), ca
Refs          referrer and reference, both ids of ValidPaths

The database is in WAL mode. While there is a log beside it, some process of Nix has it open, and
it is read as SQLite does that. Without a log it is read as an immutable file: nothing is written
beside it then, and a user who may not write there can read it. After each query the file is checked
for a change, which makes for another try.
"""

import os
import sqlite3
import threading
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import quote

from appliance.copier.claims import claim_of
from appliance.copier.file_tree import tree_events
from appliance.errors import StoreError
from appliance.nix.content_address import ContentAddress
from appliance.nix.hashes import NixHash
from appliance.nix.nar import Event
from appliance.nix.narinfo import NarInfoFile
from appliance.nix.signing import Signature
from appliance.nix.store_path import STORE_DIR, StorePath

_BUSY_TIMEOUT_S: Final = 10.0
# More than there are processors: the commits of those at work are made together.
_NUM_READERS: Final = 8
_TRIES: Final = 5

_PATH: Final = "SELECT id, hash, deriver, narSize, sigs, ca FROM ValidPaths WHERE path = ?"
_REFERENCES: Final = (
    "SELECT path FROM Refs JOIN ValidPaths ON reference = ValidPaths.id WHERE referrer = ?"
)


class NixStorePlace(NamedTuple):
    """Where a Nix store is: the directory of its trees, and its database."""

    directory: Path
    database: Path

    @classmethod
    def below(cls, root: Path) -> "NixStorePlace":
        """Return where Nix has them below a root, which is `/` by default."""
        nix = root / "nix"
        return cls(nix / "store", nix / "var" / "nix" / "db" / "db.sqlite")


class StoreDirectory:
    """Trees in the directory of a Nix store."""

    num_readers = _NUM_READERS
    needs_signatures = False

    def __init__(self, directory: Path) -> None:
        self._directory = os.fsencode(directory)

    def events(self, claim: NarInfoFile) -> Generator[Event, None, None]:
        """See `CopySource.events`."""
        return tree_events(b"%b/%b" % (self._directory, claim.path.basename().encode()))


class ListedPaths(StoreDirectory):
    """Paths of a list that says what is known of them, and their trees in a store's directory."""

    def __init__(self, directory: Path, claims: Mapping[StorePath, NarInfoFile]) -> None:
        super().__init__(directory)
        self._claims = claims

    def claim(self, path: StorePath) -> NarInfoFile | None:
        """See `CopySource.claim`."""
        return self._claims.get(path)


class NixStore(StoreDirectory):
    """A Nix store by its database.

    Raises:
        StoreError: the database cannot be opened.
    """

    def __init__(self, place: NixStorePlace) -> None:
        super().__init__(place.directory)
        self._path = place.database
        self._lock = threading.Lock()
        # Of a file that counts as immutable: what tells that it is not.
        self._status: tuple[int, int] | None = None
        try:
            self._connection = self._open()
        except (sqlite3.Error, OSError) as exc:
            raise StoreError(f"{self._path}: cannot be read as the database of Nix: {exc}") from exc

    def claim(self, path: StorePath) -> NarInfoFile | None:
        """See `CopySource.claim`."""
        try:
            with self._lock:
                row, references = self._rows(path)
        except (sqlite3.Error, OSError) as exc:
            raise StoreError(f"{self._path}: {exc}") from exc
        if row is None:
            return None
        _id, nar_hash, deriver, nar_size, signatures, ca = row
        return claim_of(
            path,
            nar_hash=NixHash.parse(nar_hash),
            nar_size=nar_size or 0,
            references=map(StorePath.parse_absolute, references),
            deriver=StorePath.parse_absolute(deriver) if deriver else None,
            signatures=map(Signature.parse, (signatures or "").split()),
            ca=ContentAddress.parse(ca) if ca else None,
        )

    def close(self) -> None:
        """Close the database."""
        self._connection.close()

    def _rows(self, path: StorePath) -> tuple[tuple[Any, ...] | None, list[str]]:
        for _try in range(_TRIES):
            try:
                row = self._connection.execute(_PATH, (path.absolute(),)).fetchone()
                found = self._connection.execute(_REFERENCES, row[:1]) if row else ()
                references = [reference for (reference,) in found]
            except sqlite3.DatabaseError:
                if not self._has_changed():
                    raise
            else:
                if not self._has_changed():
                    return row, references
            self._connection.close()
            self._connection = self._open()
        raise StoreError(f"{self._path}: changed again and again while it was read")

    def _open(self) -> sqlite3.Connection:
        log = self._path.with_name(f"{self._path.name}-wal")
        self._status = None
        if log.exists():
            try:
                return self._connect("mode=ro")
            except sqlite3.OperationalError:
                if log.exists() and log.stat().st_size:
                    raise
        self._status = self._current_status()
        return self._connect("mode=ro&immutable=1")

    def _connect(self, options: str) -> sqlite3.Connection:
        uri = f"file:{quote(os.fsencode(self._path))}?{options}"
        connection = sqlite3.connect(
            uri, uri=True, check_same_thread=False, timeout=_BUSY_TIMEOUT_S, isolation_level=None
        )
        try:
            # One snapshot for all that is asked.
            connection.execute("BEGIN")
            connection.execute("SELECT id FROM ValidPaths LIMIT 1").fetchone()
        except BaseException:
            connection.close()
            raise
        return connection

    def _has_changed(self) -> bool:
        return self._status is not None and self._status != self._current_status()

    def _current_status(self) -> tuple[int, int]:
        status = self._path.stat()
        return status.st_size, status.st_mtime_ns


def logical_path(path: str, directory: Path) -> str:
    """Return `path` as the store calls it, if it lies in the directory of a store."""
    prefix = f"{directory}/"
    return f"{STORE_DIR}/{path.removeprefix(prefix)}" if path.startswith(prefix) else path
