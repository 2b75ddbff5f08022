"""The Nix store of this machine, or of another root: its database, read-only, and its trees.

ValidPaths    path, hash (sha256:HEX), deriver, narSize, sigs (separated by spaces), ca
Refs          referrer and reference, both ids of ValidPaths

The database is in WAL mode. If there is a log beside it, a Nix process has it open, and SQLite
reads it in the ordinary way. Without a log it is opened as an immutable file: then SQLite writes
nothing beside it, and users without the right to write there can read it. After each query the file
is checked for changes; if there are any, it is opened anew and asked again.
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
from appliance.copier.ingest import TreeEvent
from appliance.errors import StoreError
from appliance.nix.content_address import ContentAddress
from appliance.nix.hashes import NixHash
from appliance.nix.narinfo import NarInfoFile
from appliance.nix.signing import Signature
from appliance.nix.store_path import STORE_DIR, StorePath

_BUSY_TIMEOUT_S: Final = 10.0
# A few more than most machines have processors for one program: reading also waits for the disk.
_NUM_READERS: Final = 4
_TRIES: Final = 5

_PATH: Final = "SELECT id, hash, deriver, narSize, sigs, ca FROM ValidPaths WHERE path = ?"
_REFERENCES: Final = (
    "SELECT path FROM Refs JOIN ValidPaths ON reference = ValidPaths.id WHERE referrer = ?"
)


class NixStorePlace(NamedTuple):
    """Where a Nix store is: the directory with its trees, and its database."""

    directory: Path
    database: Path

    @classmethod
    def below(cls, root: Path) -> "NixStorePlace":
        """Return where Nix keeps them below a root directory."""
        nix = root / "nix"
        return cls(nix / "store", nix / "var" / "nix" / "db" / "db.sqlite")


class StoreDirectory:
    """The trees in the directory of a Nix store."""

    num_readers = _NUM_READERS
    needs_signatures = False

    def __init__(self, directory: Path) -> None:
        self._directory = os.fsencode(directory)

    def events(self, claim: NarInfoFile) -> Generator[TreeEvent, None, None]:
        """See `CopySource.events`."""
        return tree_events(b"%b/%b" % (self._directory, claim.path.basename().encode()))


class ListedPaths(StoreDirectory):
    """Paths whose claims are given, and whose trees are in the directory of a Nix store."""

    def __init__(self, directory: Path, claims: Mapping[StorePath, NarInfoFile]) -> None:
        super().__init__(directory)
        self._claims = claims

    def claim(self, path: StorePath) -> NarInfoFile | None:
        """See `CopySource.claim`."""
        return self._claims.get(path)


class NixStore(StoreDirectory):
    """A Nix store, read by its database.

    Raises:
        StoreError: the database cannot be opened.
    """

    def __init__(self, place: NixStorePlace) -> None:
        super().__init__(place.directory)
        self._path = place.database
        self._lock = threading.Lock()
        # Size and mtime of a file that was opened as immutable, to notice changes.
        self._status: tuple[int, int] | None = None
        try:
            self._connection = self._open()
        except (sqlite3.Error, OSError) as exc:
            raise StoreError(
                f"{self._path}: cannot be read as the database of Nix: {_reason(exc)}"
            ) from exc

    def claim(self, path: StorePath) -> NarInfoFile | None:
        """See `CopySource.claim`."""
        try:
            with self._lock:
                row, references = self._rows(path)
        except (sqlite3.Error, OSError) as exc:
            raise StoreError(f"{self._path}: {_reason(exc)}") from exc
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
        raise StoreError(f"{self._path}: changed {_TRIES} times while it was read")

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
            # All queries read one snapshot.
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


def _reason(exc: Exception) -> object:
    return exc.strerror if isinstance(exc, OSError) else exc


def logical_path(path: str, directory: Path) -> str:
    """Return a path below a store's `directory` as one below /nix/store; others unchanged."""
    prefix = f"{directory}/"
    return f"{STORE_DIR}/{path.removeprefix(prefix)}" if path.startswith(prefix) else path
