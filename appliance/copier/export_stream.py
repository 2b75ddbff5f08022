"""What `nix-store --export` writes.

    export = { u64 1, NAR, u64 "NIXE", path, references, deriver, signature } u64 0
    path, deriver: strings; references: u64 number, strings; strings and padding as in a NAR
    signature: u64 0, or u64 1 and a string that is ignored

The path follows its content. An export has neither NAR hashes nor content addresses, so damage to
the content of a file cannot be noticed.
"""

from collections.abc import Callable, Generator, Iterator
from typing import Final

from appliance.copier.claims import claim_of
from appliance.copier.copier import (
    CopyOutcome,
    CopyStatus,
    PathCommitter,
    missing_reference,
)
from appliance.copier.target import CopyTarget
from appliance.errors import ApplianceError, NarError
from appliance.nix.nar import Event, read_nar
from appliance.nix.narinfo import NarInfoFile
from appliance.nix.store_path import StorePath

_MAGIC: Final = int.from_bytes(b"NIXE", "little")
_PATH_MAX: Final = 1 << 12
_REFERENCES_MAX: Final = 1 << 20
_STRING_MAX: Final = 1 << 16


def import_export(
    read: Callable[[int], bytes], target: CopyTarget, committer: PathCommitter
) -> Iterator[CopyOutcome]:
    """Copy an export, and yield the result for each path.

    Args:
        read: takes a number of bytes, and returns at least one and at most that many of the next
            bytes, or none at the end of the input.
        target: where to copy to.
        committer: commits to `target`.

    Raises:
        NarError: the export is damaged, or ends too early; what was yielded before is durable.
        StoreError: the target fails in a way that affects all paths.
    """
    source = _ExportReader(read)
    while source.has_next():
        ingest = committer.ingest()
        try:
            content = ingest.take_all(source.events())
            claim = source.claim()
            reason = _obstacle(claim, target)
            if target.known(claim.path) is not None:
                outcome = CopyOutcome(claim.path, CopyStatus.PRESENT)
            elif reason:
                outcome = CopyOutcome(claim.path, CopyStatus.REFUSED, reason=reason)
            else:
                outcome = committer.commit(committer.checked(claim, content, ingest))
        finally:
            ingest.discard()
        yield outcome


def _obstacle(claim: NarInfoFile, target: CopyTarget) -> str:
    for reference in claim.references:
        if reference != claim.path and target.known(reference) is None:
            return missing_reference(claim.path, reference)
    return ""


class _ExportReader:
    """Reads an export from its start."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read

    def has_next(self) -> bool:
        """Whether another path follows, whose NAR begins here."""
        number = self._number()
        if number > 1:
            raise NarError(
                f"not an export of nix-store: found the number {number}, expected 0 or 1"
            )
        return number == 1

    def events(self) -> Generator[Event, None, None]:
        """Yield the tree that comes next; it has to be read to its end."""
        yield from read_nar(self._read)

    def claim(self) -> NarInfoFile:
        """Return what is known of the path whose tree was read."""
        magic = self._number()
        if magic != _MAGIC:
            raise NarError(f"export of nix-store: found {magic:#x} after a NAR, expected NIXE")
        path = self._path()
        count = self._number()
        if count > _REFERENCES_MAX:
            raise NarError(f"export of nix-store: {path.absolute()} has {count} references")
        references = [self._path() for _index in range(count)]
        deriver = self._text(_PATH_MAX)
        if self._number() == 1:
            self._text(_STRING_MAX)
        try:
            return claim_of(
                path,
                references=references,
                deriver=StorePath.parse_absolute(deriver) if deriver else None,
            )
        except ApplianceError as exc:
            raise NarError(f"export of nix-store: {exc}") from exc

    def _path(self) -> StorePath:
        text = self._text(_PATH_MAX)
        try:
            return StorePath.parse_absolute(text)
        except ApplianceError as exc:
            raise NarError(f"export of nix-store: {exc}") from exc

    def _text(self, maximum: int) -> str:
        size = self._number()
        if size > maximum:
            raise NarError(
                f"export of nix-store: a string has {size} bytes, at most {maximum} are allowed"
            )
        data = self._exactly(size)
        if any(self._exactly(-size % 8)):
            raise NarError("export of nix-store: padding is not zero")
        return data.decode("ascii", "backslashreplace")

    def _number(self) -> int:
        return int.from_bytes(self._exactly(8), "little")

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self._read(size - len(data))
            if not more:
                raise NarError("the export ends too early")
            data += more
        return data
