"""Content addresses: which hash of its content determines the digest of a store path.

    fixed:r:HASH       the hash of its NAR
    fixed:HASH         the hash of its one file
    text:sha256:...    the hash of its one file, a text that may refer to other paths

pathinfo.proto: NARInfo.CA.
"""

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

from appliance.errors import PathInfoError
from appliance.nix.hashes import NixHash
from appliance.nix.store_path import (
    StorePath,
    StorePathError,
    fixed_output_path,
    nar_path,
    text_path_by_digest,
)
from appliance.protos import pathinfo_pb2


class Method(Enum):
    """What was hashed.

    The value is the prefix of the text; the name is the prefix of the names in `NARInfo.CA.Hash`.
    """

    NAR = "fixed:r:"
    FLAT = "fixed:"
    TEXT = "text:"


class ContentAddress(NamedTuple):
    """What was hashed, and its hash."""

    method: Method
    hash: NixHash

    @classmethod
    def parse(cls, text: str) -> "ContentAddress":
        """Read a content address.

        Raises:
            PathInfoError: the text is not a content address; `rule` says why.
        """
        for method in Method:
            if text.startswith(method.value):
                found = NixHash.parse(text.removeprefix(method.value))
                if method is Method.TEXT and found.algorithm != "sha256":
                    raise PathInfoError(
                        f"content address {text!r}: text: is followed by {found.algorithm}, "
                        "expected sha256",
                        rule="invalid-text-algo",
                    )
                return cls(method, found)
        raise PathInfoError(
            f"content address {text!r}: begins with neither fixed: nor text:",
            rule="unknown-method",
        )

    @classmethod
    def of_message(cls, narinfo: pathinfo_pb2.NARInfo) -> "ContentAddress | None":
        """Return the content address in a valid NARInfo; None if absent or of an unknown kind."""
        kinds = pathinfo_pb2.NARInfo.CA.Hash
        if not narinfo.HasField("ca") or narinfo.ca.type not in kinds.values():
            return None
        method, _, algorithm = kinds.Name(narinfo.ca.type).partition("_")
        return cls(Method[method], NixHash(algorithm.lower(), narinfo.ca.digest))

    def store_path(
        self, name: str, references: Sequence[StorePath] = (), *, has_self_reference: bool = False
    ) -> StorePath:
        """Return the store path that follows from this content address.

        Args:
            name: the name of the path.
            references: without the path itself; their order matters.
            has_self_reference: whether the content refers to the path itself.

        Raises:
            StorePathError: content of this kind may not have such references (rule
                `invalid-reference`), or a store path may not have this name.
        """
        algorithm, digest = self.hash
        if self.method is Method.NAR and algorithm == "sha256":
            return nar_path(digest, name, references, has_self_reference=has_self_reference)
        if has_self_reference:
            raise StorePathError(
                f"{name!r}: only a NAR hashed with sha256 may refer to itself",
                rule="invalid-reference",
            )
        if self.method is Method.TEXT:
            return text_path_by_digest(digest, name, references)
        is_recursive = self.method is Method.NAR
        return fixed_output_path(
            algorithm, digest, name, is_recursive=is_recursive, references=references
        )

    def __str__(self) -> str:
        return f"{self.method.value}{self.hash}"
