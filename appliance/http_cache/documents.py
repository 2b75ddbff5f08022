"""What a binary cache keeps besides store paths: build logs and realisations.

log/DRV                     the log of a build, as text, for `nix log`; it may be compressed
realisations/ID.doi         what a derivation with a content-addressed output was built to, as JSON

They are files in a directory of the store. One that is there is complete: it was written under
another name first. None of them is needed to serve a store path.
"""

import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

from appliance.errors import (
    AlreadyExistsError,
    InvalidRequestError,
    PathInfoError,
    ReadOnlyStoreError,
    ServiceLimitError,
    disk_error,
)
from appliance.nix.signing import PublicKey, SecretKey, Signature
from appliance.nix.store_path import StorePath

# In bytes: of one log, of one realisation, and of all files together.
LOG_MAX: Final = 64 << 20
REALISATION_MAX: Final = 1 << 20
_TOTAL_MAX: Final = 4 << 30
_PIECE_SIZE: Final = 1 << 20

_LOGS: Final = "log"
_REALISATIONS: Final = "realisations"
_REALISATION_ID: Final = re.compile(r"sha256:[0-9a-f]{64}![0-9A-Za-z+._?=-]{1,211}")
# Content codings that a log may have; a file that has one has it as its extension.
LOG_CODINGS: Final = ("br", "bzip2", "gzip", "xz", "zstd")


class StoredLog(NamedTuple):
    """An open log, which the caller closes, its size in bytes, and its content coding."""

    file: BinaryIO
    size: int
    coding: str | None


class Documents:
    """The files in `directory`; None if there is no place for them.

    Its methods block, and may be called from several threads at the same time.
    """

    def __init__(self, directory: Path | None, *, maximum: int = _TOTAL_MAX) -> None:
        self._directory = directory
        self._maximum = maximum
        self._lock = threading.Lock()
        self._size: int | None = None

    # --- Logs ---

    def open_log(self, name: str) -> StoredLog | None:
        """Open the log of a derivation, by the base name of its path; None if there is none.

        Raises:
            InvalidRequestError: `name` is not that of a derivation.
        """
        check_derivation(name)
        if self._directory is None:
            return None
        for coding in (None, *LOG_CODINGS):
            with suppress(FileNotFoundError):
                file = self._log_path(self._directory, name, coding).open("rb")
                return StoredLog(file, os.fstat(file.fileno()).st_size, coding)
        return None

    def new_file(self) -> BinaryIO:
        """Return a file without a name, for `put_log`; the caller closes it.

        Raises:
            ReadOnlyStoreError: nothing is kept here.
            StoreError: it cannot be made.
        """
        directory = self._writable()
        try:
            directory.mkdir(mode=0o755, exist_ok=True)
            return tempfile.TemporaryFile(dir=directory, buffering=0)
        except OSError as exc:
            raise disk_error(exc, directory) from exc

    def put_log(self, name: str, coding: str | None, file: BinaryIO) -> None:
        """Keep a log in place of the one before; its content is copied from `file`.

        Raises:
            InvalidRequestError: `name` is not that of a derivation.
            ServiceLimitError: there is no room.
            StoreError: it cannot be written.
        """
        check_derivation(name)
        target = self._log_path(self._writable(), name, coding)
        self._write(target, file)
        for other in {None, *LOG_CODINGS} - {coding}:
            self._remove(self._log_path(self._writable(), name, other))

    # --- Realisations ---

    def realisation(self, name: str) -> dict[str, Any] | None:
        """Return a realisation by its id; None if there is none.

        Raises:
            InvalidRequestError: `name` is not an id.
        """
        check_realisation_id(name)
        if self._directory is None:
            return None
        with suppress(FileNotFoundError):
            found: dict[str, Any] = json.loads(self._realisation_path(name).read_bytes())
            return found
        return None

    def put_realisation(self, realisation: dict[str, Any]) -> None:
        """Keep a realisation that `parse_realisation` returned, with the signatures known before.

        Raises:
            AlreadyExistsError: there is one with another output path.
            ServiceLimitError: there is no room.
            StoreError: it cannot be written.
        """
        name = realisation["id"]
        with self._lock:
            known = self.realisation(name)
            if known is not None and _unsigned(known) != _unsigned(realisation):
                raise AlreadyExistsError(
                    f"realisation {name}: {known['outPath']} is there, not {realisation['outPath']}"
                )
            signatures = {*realisation["signatures"], *(known or realisation)["signatures"]}
            merged = {**realisation, "signatures": sorted(signatures)}
            path = self._realisation_path(name)
        self._write(path, BytesIO(json.dumps(merged).encode()))

    # --- Files ---

    def _writable(self) -> Path:
        if self._directory is None:
            raise ReadOnlyStoreError("logs and realisations are kept with a local store only")
        return self._directory

    def _log_path(self, directory: Path, name: str, coding: str | None) -> Path:
        return directory / _LOGS / (name if coding is None else f"{name}.{coding}")

    def _realisation_path(self, name: str) -> Path:
        return self._writable() / _REALISATIONS / f"{name}.doi"

    def _write(self, path: Path, content: BinaryIO) -> None:
        with self._lock:
            new_size = content.seek(0, os.SEEK_END)
            content.seek(0)
            size = self._total_size() - _size_of(path) + new_size
            if size > self._maximum:
                raise ServiceLimitError(
                    f"logs and realisations would take {size} bytes, the limit is {self._maximum}"
                )
            try:
                path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
                _replace(path, content)
            except OSError as exc:
                raise disk_error(exc, path) from exc
            self._size = size

    def _remove(self, path: Path) -> None:
        with self._lock:
            size = _size_of(path)
            path.unlink(missing_ok=True)
            self._size = self._total_size() - size

    def _total_size(self) -> int:
        if self._size is None:
            kinds = (self._writable() / _LOGS, self._writable() / _REALISATIONS)
            self._size = sum(
                entry.stat().st_size for kind in kinds if kind.is_dir() for entry in kind.iterdir()
            )
        return self._size


def check_derivation(name: str) -> None:
    """Check that `name` is the base name of the path of a derivation.

    Raises:
        InvalidRequestError: it is not.
    """
    try:
        is_derivation = StorePath.parse(name).name.endswith(".drv")
    except PathInfoError as exc:
        raise InvalidRequestError(f"log: {exc}") from exc
    if not is_derivation:
        raise InvalidRequestError(f"log: {name} does not end in .drv")


def check_realisation_id(name: str) -> None:
    """Check that `name` has the form sha256:HEX!OUTPUT.

    Raises:
        InvalidRequestError: it does not.
    """
    if not _REALISATION_ID.fullmatch(name):
        raise InvalidRequestError(f"realisation: {name[:100]!r} is not sha256:HEX!OUTPUT")


def parse_realisation(data: bytes, name: str) -> dict[str, Any]:
    """Read the realisation with the id `name`.

    Raises:
        InvalidRequestError: it is none, or has another id; the text says which rule is broken.
    """
    check_realisation_id(name)
    try:
        parsed = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise InvalidRequestError(f"realisation {name}: not JSON: {exc}") from exc
    match parsed:
        case {"id": str(found), "outPath": str(output)}:
            dependencies = parsed.get("dependentRealisations", {})
            signatures = parsed.get("signatures", [])
        case _:
            raise InvalidRequestError(f"realisation {name}: has no id or no outPath")
    if found != name:
        raise InvalidRequestError(f"realisation {name}: has the id {found[:100]!r}")
    if not isinstance(dependencies, dict) or not isinstance(signatures, list):
        raise InvalidRequestError(
            f"realisation {name}: dependentRealisations is not an object, "
            "or signatures is not a list"
        )
    try:
        for text in (output, *map(str, dependencies.values())):
            StorePath.parse(text)
        for text in signatures:
            Signature.parse(str(text))
    except PathInfoError as exc:
        raise InvalidRequestError(f"realisation {name}: {exc}") from exc
    for dependency in dependencies:
        check_realisation_id(dependency)
    return {
        "dependentRealisations": dependencies,
        "id": found,
        "outPath": output,
        "signatures": signatures,
    }


def is_signed(realisation: dict[str, Any], keys: Iterable[PublicKey]) -> bool:
    """Whether one of `keys` has signed a realisation."""
    fingerprint = _fingerprint(realisation)
    signatures = map(Signature.parse, realisation["signatures"])
    return any(key.verifies(each, fingerprint) for each in signatures for key in keys)


def signed(realisation: dict[str, Any], key: SecretKey) -> dict[str, Any]:
    """Return a realisation with a signature by `key`."""
    signature = str(key.sign(_fingerprint(realisation)))
    return {**realisation, "signatures": sorted({*realisation["signatures"], signature})}


def _fingerprint(realisation: dict[str, Any]) -> str:
    # Compact JSON by ascending names, as Nix writes what it signs.
    return json.dumps(_unsigned(realisation), sort_keys=True, separators=(",", ":"))


def _unsigned(realisation: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in realisation.items() if name != "signatures"}


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _replace(path: Path, content: BinaryIO) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            shutil.copyfileobj(content, file, _PIECE_SIZE)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
