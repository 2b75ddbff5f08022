"""Content addresses: what about its content gave a store path its digest.

    fixed:r:HASH       its NAR
    fixed:HASH         its one file
    text:sha256:...    its one file, a text that may refer to other paths

pathinfo.proto: NARInfo.CA.
"""

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

from appliance.errors import PathInfoError
from appliance.nix.hashes import NixHash
from appliance.nix.store_path import (
    InvalidReferenceError,
    StorePath,
    fixed_output_path,
    nar_path,
    text_path_by_digest,
)
from appliance.protos import pathinfo_pb2


class ContentAddressError(PathInfoError):
    """A text is not a content address."""


class Method(Enum):
    """What was hashed; the values begin the text, the names those of `NARInfo.CA.Hash`."""

    NAR = "fixed:r:"
    FLAT = "fixed:"
    TEXT = "text:"


class ContentAddress(NamedTuple):
    """What was hashed, and its digest."""

    method: Method
    hash: NixHash

    @classmethod
    def parse(cls, text: str) -> "ContentAddress":
        """Read the text.

        Raises:
            PathInfoError: a rule is broken.
        """
        for method in Method:
            if text.startswith(method.value):
                found = NixHash.parse(text.removeprefix(method.value))
                if method is Method.TEXT and found.algorithm != "sha256":
                    raise ContentAddressError(f"content address {text!r}: texts have a sha256")
                return cls(method, found)
        raise ContentAddressError(f"content address {text!r}: begins with neither fixed: nor text:")

    @classmethod
    def of_message(cls, narinfo: pathinfo_pb2.NARInfo) -> "ContentAddress | None":
        """Return what a valid NARInfo says; None if nothing, or of a kind not known here."""
        kinds = pathinfo_pb2.NARInfo.CA.Hash
        if not narinfo.HasField("ca") or narinfo.ca.type not in kinds.values():
            return None
        method, _, algorithm = kinds.Name(narinfo.ca.type).partition("_")
        return cls(Method[method], NixHash(algorithm.lower(), narinfo.ca.digest))

    def store_path(
        self, name: str, references: Sequence[StorePath] = (), *, has_self_reference: bool = False
    ) -> StorePath:
        """Return the path that follows; references in the order given, without the path itself.

        Raises:
            InvalidReferenceError: one of its kind can have no such references.
        """
        algorithm, digest = self.hash
        if self.method is Method.NAR and algorithm == "sha256":
            return nar_path(digest, name, references, has_self_reference=has_self_reference)
        if has_self_reference:
            raise InvalidReferenceError(f"{name!r}: only a NAR by sha256 may refer to itself")
        if self.method is Method.TEXT:
            return text_path_by_digest(digest, name, references)
        is_recursive = self.method is Method.NAR
        return fixed_output_path(
            algorithm, digest, name, is_recursive=is_recursive, references=references
        )

    def __str__(self) -> str:
        return f"{self.method.value}{self.hash}"
