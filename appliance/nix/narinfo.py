"""What a binary cache of Nix says of a path, in a file called DIGEST.narinfo.

The file has lines of a name, colon, space and value. StorePath, URL, NarHash and NarSize have to
be there; Sig may come any number of times, every other name once. Names not known are ignored.
"""

import re
from collections.abc import Callable
from typing import Final, NamedTuple, TypeVar

from appliance.errors import PathInfoError
from appliance.nix.content_address import ContentAddress
from appliance.nix.hashes import NixHash
from appliance.nix.path_info import validate
from appliance.nix.signing import Signature, check_key_name
from appliance.nix.store_path import StorePath, encode_base32
from appliance.protos import pathinfo_pb2

T = TypeVar("T")

_SIZE: Final = re.compile(r"[0-9]{1,20}")
_SIZE_LIMIT: Final = 1 << 64
_DERIVATION: Final = ".drv"
_NO_DERIVER: Final = "unknown-deriver"
# Nix decompresses with it what does not say how it is compressed.
_DEFAULT_COMPRESSION: Final = "bzip2"


class NarInfoError(PathInfoError):
    """A narinfo breaks a rule."""


class NarInfoFile(NamedTuple):
    """The values of a narinfo; `url` and what begins with `file` are of the NAR as it is kept."""

    path: StorePath
    url: str
    nar_hash: NixHash
    nar_size: int
    compression: str = "none"
    file_hash: NixHash | None = None
    file_size: int | None = None
    references: tuple[StorePath, ...] = ()
    # With `.drv` at the end of its name.
    deriver: StorePath | None = None
    system: str | None = None
    signatures: tuple[Signature, ...] = ()
    ca: ContentAddress | None = None

    def fingerprint(self) -> str:
        """Return what is signed; the order of the references is part of it."""
        references = ",".join(reference.absolute() for reference in self.references)
        return f"1;{self.path.absolute()};{self.nar_hash};{self.nar_size};{references}"

    def with_signature(self, signature: Signature) -> "NarInfoFile":
        """Return it with one more signature, unless it has that one already."""
        if signature in self.signatures:
            return self
        return self._replace(signatures=(*self.signatures, signature))

    def __str__(self) -> str:
        lines: list[tuple[str, object]] = [
            ("StorePath", self.path.absolute()),
            ("URL", self.url),
            ("Compression", self.compression),
            ("FileHash", self.file_hash),
            ("FileSize", self.file_size),
            ("NarHash", self.nar_hash),
            ("NarSize", self.nar_size),
            ("References", " ".join(reference.basename() for reference in self.references)),
            ("Deriver", None if self.deriver is None else self.deriver.basename()),
            ("System", self.system),
            *(("Sig", signature) for signature in self.signatures),
            ("CA", self.ca),
        ]
        return "".join(f"{name}: {value}\n" for name, value in lines if value is not None)


def parse_narinfo(text: str) -> NarInfoFile:
    """Read a narinfo.

    Raises:
        NarInfoError: a rule is broken; the text names the line.
    """
    fields = _Fields(text)
    return NarInfoFile(
        path=fields.required("StorePath", StorePath.parse_absolute),
        url=fields.required("URL", _text),
        nar_hash=fields.required("NarHash", _sha256),
        nar_size=fields.required("NarSize", _size),
        compression=fields.single("Compression", _text) or _DEFAULT_COMPRESSION,
        file_hash=fields.single("FileHash", _sha256),
        file_size=fields.single("FileSize", _size),
        references=fields.single("References", _references) or (),
        deriver=fields.single("Deriver", _deriver),
        system=fields.single("System", _text),
        signatures=tuple(fields.all("Sig", Signature.parse)),
        ca=fields.single("CA", ContentAddress.parse),
    )


def narinfo_of(message: pathinfo_pb2.PathInfo) -> NarInfoFile:
    """Return the narinfo of a path whose NAR is kept uncompressed as nar/DIGEST.nar.

    References come sorted, as Nix has them when it signs and verifies.

    Raises:
        NarInfoError: it does not say enough: digest and size of the NAR, names of references.
        PathInfoError: it is not valid, or a signature has a name that no line can have.
    """
    narinfo = message.narinfo
    path = validate(message).path
    if not narinfo.nar_sha256 or len(narinfo.reference_names) != len(message.references):
        raise NarInfoError(f"path {path.absolute()}: its NAR or references are not on record")
    nar_hash = NixHash("sha256", narinfo.nar_sha256)
    return NarInfoFile(
        path,
        f"nar/{encode_base32(nar_hash.digest)}.nar",
        nar_hash,
        narinfo.nar_size,
        file_hash=nar_hash,
        file_size=narinfo.nar_size,
        references=tuple(map(StorePath.parse, sorted(narinfo.reference_names))),
        deriver=deriver_of(narinfo),
        signatures=tuple(
            Signature(check_key_name(signature.name, "signature"), signature.data)
            for signature in narinfo.signatures
        ),
        ca=ContentAddress.of_message(narinfo),
    )


def deriver_of(narinfo: pathinfo_pb2.NARInfo) -> StorePath | None:
    """Return the deriver, whose name a NARInfo has without `.drv`."""
    if not narinfo.HasField("deriver"):
        return None
    return StorePath(narinfo.deriver.digest, narinfo.deriver.name + _DERIVATION)


class _Fields:
    """The lines, by name."""

    def __init__(self, text: str) -> None:
        self._values: dict[str, list[str]] = {}
        for line in text.removesuffix("\n").split("\n"):
            name, separator, value = line.partition(": ")
            if not separator:
                raise NarInfoError(f"narinfo: {line!r} is not a name, colon, space and value")
            self._values.setdefault(name, []).append(value)

    def all(self, name: str, parse: Callable[[str], T]) -> list[T]:
        """Return every value called `name`."""
        values = self._values.get(name, [])
        try:
            return [parse(value) for value in values]
        except PathInfoError as exc:
            raise NarInfoError(f"narinfo, {name}: {exc}") from exc

    def single(self, name: str, parse: Callable[[str], T]) -> T | None:
        """Return the value called `name`, if there is one."""
        values = self.all(name, parse)
        if len(values) > 1:
            raise NarInfoError(f"narinfo: {name} stands there {len(values)} times")
        return values[0] if values else None

    def required(self, name: str, parse: Callable[[str], T]) -> T:
        """Return the value called `name`, which has to be there."""
        value = self.single(name, parse)
        if value is None:
            raise NarInfoError(f"narinfo: {name} is missing")
        return value


def _text(value: str) -> str:
    if not value:
        raise NarInfoError("is empty")
    return value


def _size(value: str) -> int:
    if not _SIZE.fullmatch(value) or int(value) >= _SIZE_LIMIT:
        raise NarInfoError(f"{value!r} is not a number of 64 bits")
    return int(value)


def _sha256(value: str) -> NixHash:
    found = NixHash.parse(value)
    if found.algorithm != "sha256":
        raise NarInfoError(f"{value!r} is not a sha256")
    return found


def _references(value: str) -> tuple[StorePath, ...]:
    return tuple(map(StorePath.parse, value.split(" "))) if value else ()


def _deriver(value: str) -> StorePath | None:
    if value == _NO_DERIVER:
        return None
    if not value.endswith(_DERIVATION):
        raise NarInfoError(f"{value!r} does not end in {_DERIVATION}")
    return StorePath.parse(value)
