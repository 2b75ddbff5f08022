"""Narinfos: the files called DIGEST.narinfo in which a binary cache of Nix describes its paths.

Each line is a name, a colon, a space and a value. StorePath, URL, NarHash and NarSize are required;
Sig may occur any number of times, every other name at most once. Unknown names are ignored.
"""

import re
from collections.abc import Callable
from typing import Final, NamedTuple, TypeVar

from appliance.castore.directory import Node, node_to_message
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
# What Nix assumes where a narinfo does not state the compression.
_DEFAULT_COMPRESSION: Final = "bzip2"


class NarInfoFile(NamedTuple):
    """The values of a narinfo.

    `url`, `compression`, `file_hash` and `file_size` describe the NAR as the cache keeps it,
    possibly compressed; sizes are in bytes. The name of the deriver ends in `.drv`.
    """

    path: StorePath
    url: str
    nar_hash: NixHash
    nar_size: int
    compression: str = "none"
    file_hash: NixHash | None = None
    file_size: int | None = None
    references: tuple[StorePath, ...] = ()
    deriver: StorePath | None = None
    system: str | None = None
    signatures: tuple[Signature, ...] = ()
    ca: ContentAddress | None = None

    def fingerprint(self) -> str:
        """Return the text that signatures sign; it depends on the order of the references."""
        references = ",".join(reference.absolute() for reference in self.references)
        return f"1;{self.path.absolute()};{self.nar_hash};{self.nar_size};{references}"

    def with_signature(self, signature: Signature) -> "NarInfoFile":
        """Return a copy with one more signature, or this object if it has that one already."""
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
        PathInfoError: the text breaks a rule; the message names the line. Rules: `invalid-line`,
            `missing-field`, `duplicate-field`, `invalid-field`.
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
    """Return the narinfo of a path whose NAR the cache keeps uncompressed as nar/DIGEST.nar.

    References are sorted, as Nix sorts them when it signs and verifies.

    Raises:
        PathInfoError: `message` is not valid; it lacks the digest of the NAR or the names of
            references (rule `incomplete`); or a signature has a key name that cannot stand in a
            line.
    """
    narinfo = message.narinfo
    path = validate(message).path
    if not narinfo.nar_sha256 or len(narinfo.reference_names) != len(message.references):
        raise PathInfoError(
            f"path {path.absolute()}: its NAR or references are not on record", rule="incomplete"
        )
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


def encode_path_info(narinfo: NarInfoFile, node: Node) -> bytes:
    """Return the encoded PathInfo of a path that a narinfo describes.

    Args:
        narinfo: describes the path.
        node: the content; its name is replaced.
    """
    message = pathinfo_pb2.PathInfo(
        node=node_to_message(node._replace(name=narinfo.path.basename().encode())),
        references=[reference.digest for reference in narinfo.references],
    )
    stated = message.narinfo
    stated.nar_size = narinfo.nar_size
    stated.nar_sha256 = narinfo.nar_hash.digest
    stated.reference_names.extend(reference.basename() for reference in narinfo.references)
    for name, data in narinfo.signatures:
        stated.signatures.add(name=name, data=data)
    if narinfo.deriver is not None:
        stated.deriver.digest = narinfo.deriver.digest
        stated.deriver.name = narinfo.deriver.name.removesuffix(_DERIVATION)
    if narinfo.ca is not None:
        kind = f"{narinfo.ca.method.name}_{narinfo.ca.hash.algorithm.upper()}"
        stated.ca.type = pathinfo_pb2.NARInfo.CA.Hash.Value(kind)
        stated.ca.digest = narinfo.ca.hash.digest
    return message.SerializeToString(deterministic=True)


def deriver_of(narinfo: pathinfo_pb2.NARInfo) -> StorePath | None:
    """Return the deriver, or None; `.drv` is added to its name, which a NARInfo leaves out."""
    if not narinfo.HasField("deriver"):
        return None
    return StorePath(narinfo.deriver.digest, narinfo.deriver.name + _DERIVATION)


class _Fields:
    """The values of all lines, by name."""

    def __init__(self, text: str) -> None:
        self._values: dict[str, list[str]] = {}
        for line in text.removesuffix("\n").split("\n"):
            name, separator, value = line.partition(": ")
            if not separator:
                raise PathInfoError(
                    f"narinfo: {line!r} is not a name, colon, space and value", rule="invalid-line"
                )
            self._values.setdefault(name, []).append(value)

    def all(self, name: str, parse: Callable[[str], T]) -> list[T]:
        """Return all values of `name`, parsed."""
        values = self._values.get(name, [])
        try:
            return [parse(value) for value in values]
        except PathInfoError as exc:
            raise PathInfoError(f"narinfo, {name}: {exc}", rule="invalid-field") from exc

    def single(self, name: str, parse: Callable[[str], T]) -> T | None:
        """Return the one value of `name`, parsed, or None if there is none."""
        values = self.all(name, parse)
        if len(values) > 1:
            raise PathInfoError(
                f"narinfo: {name} occurs {len(values)} times, expected once at most",
                rule="duplicate-field",
            )
        return values[0] if values else None

    def required(self, name: str, parse: Callable[[str], T]) -> T:
        """Return the one value of `name`, parsed."""
        value = self.single(name, parse)
        if value is None:
            raise PathInfoError(f"narinfo: {name} is missing", rule="missing-field")
        return value


def _text(value: str) -> str:
    if not value:
        raise PathInfoError("value is empty", rule="empty-value")
    return value


def _size(value: str) -> int:
    if not _SIZE.fullmatch(value) or int(value) >= _SIZE_LIMIT:
        raise PathInfoError(f"{value!r} is not an unsigned 64-bit number", rule="invalid-size")
    return int(value)


def _sha256(value: str) -> NixHash:
    found = NixHash.parse(value)
    if found.algorithm != "sha256":
        raise PathInfoError(f"{value!r} is not a sha256 hash", rule="invalid-algo")
    return found


def _references(value: str) -> tuple[StorePath, ...]:
    return tuple(map(StorePath.parse, value.split(" "))) if value else ()


def _deriver(value: str) -> StorePath | None:
    if value == _NO_DERIVER:
        return None
    if not value.endswith(_DERIVATION):
        raise PathInfoError(f"{value!r} does not end in {_DERIVATION}", rule="missing-drv-suffix")
    return StorePath.parse(value)
