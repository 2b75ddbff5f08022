"""Claims: what a source states about a store path, and the PathInfo that is made of it.

A claim is a `NarInfoFile` for every kind of source. Its references are sorted, because Nix sorts
them to sign and verify. Only a binary cache sets `url`, `compression` and the fields of the file.
"""

from collections.abc import Iterable
from typing import Final, NamedTuple

from appliance.castore.directory import Node
from appliance.errors import PathInfoError
from appliance.nix.content_address import ContentAddress
from appliance.nix.hashes import NixHash
from appliance.nix.narinfo import NarInfoFile, deriver_of, encode_path_info
from appliance.nix.signing import Signature, check_key_name
from appliance.nix.store_path import StorePath
from appliance.protos import pathinfo_pb2

_DERIVATION: Final = ".drv"
_UNKNOWN_HASH: Final = NixHash("sha256", bytes(32))


class Content(NamedTuple):
    """The result of reading a tree; the node has no name."""

    node: Node
    nar_size: int
    nar_sha256: bytes
    num_files: int


def claim_of(
    path: StorePath,
    *,
    nar_hash: NixHash = _UNKNOWN_HASH,
    nar_size: int = 0,
    references: Iterable[StorePath] = (),
    deriver: StorePath | None = None,
    signatures: Iterable[Signature] = (),
    ca: ContentAddress | None = None,
) -> NarInfoFile:
    """Return the claim of a source that is not a binary cache.

    Raises:
        PathInfoError: the hash is not a SHA-256, or the deriver is not a derivation.
    """
    if nar_hash.algorithm != "sha256":
        raise PathInfoError(
            f"path {path.absolute()}: the hash of its NAR is {nar_hash}, expected a SHA-256"
        )
    if deriver is not None and not deriver.name.endswith(_DERIVATION):
        raise PathInfoError(
            f"path {path.absolute()}: its deriver {deriver.absolute()} "
            f"does not end in {_DERIVATION}"
        )
    return NarInfoFile(
        path,
        "",
        nar_hash,
        nar_size,
        references=sorted_references(references),
        deriver=deriver,
        signatures=tuple(signatures),
        ca=ca,
    )


def claim_of_message(path: StorePath, message: pathinfo_pb2.PathInfo) -> NarInfoFile:
    """Return the claim of a valid PathInfo of `path`.

    Raises:
        PathInfoError: the hash of the NAR or the names of the references are missing.
    """
    narinfo = message.narinfo
    if not narinfo.nar_sha256 or len(narinfo.reference_names) != len(message.references):
        raise PathInfoError(
            f"path {path.absolute()}: the store knows no NAR hash, or no names of references"
        )
    return claim_of(
        path,
        nar_hash=NixHash("sha256", narinfo.nar_sha256),
        nar_size=narinfo.nar_size,
        references=map(StorePath.parse, narinfo.reference_names),
        deriver=deriver_of(narinfo),
        signatures=(
            Signature(check_key_name(signature.name, "signature"), signature.data)
            for signature in narinfo.signatures
        ),
        ca=ContentAddress.of_message(narinfo),
    )


def path_info_of_claim(claim: NarInfoFile, content: Content) -> bytes:
    """Return the encoded PathInfo of a path whose content was read."""
    nar_hash = NixHash("sha256", content.nar_sha256)
    return encode_path_info(
        claim._replace(nar_hash=nar_hash, nar_size=content.nar_size), content.node
    )


def sorted_references(references: Iterable[StorePath]) -> tuple[StorePath, ...]:
    """Return each reference once, in the order that Nix signs."""
    return tuple(sorted(set(references), key=StorePath.basename))


def has_known_nar(claim: NarInfoFile) -> bool:
    """Whether the claim states hash and size of the NAR; those of `nix-store --export` do not."""
    return claim.nar_hash is not _UNKNOWN_HASH
