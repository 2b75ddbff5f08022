"""PathInfos: what the store says about a path.

pathinfo.proto: PathInfo, NARInfo.
"""

from typing import Final, NamedTuple

from google.protobuf.message import DecodeError

from appliance.castore.digest import InvalidDigestLenError
from appliance.castore.directory import Node, NoNodeError, node_from_message, node_to_message
from appliance.errors import DirectoryError, PathInfoError
from appliance.nix.store_path import DIGEST_SIZE, StorePath, StorePathError, check_name
from appliance.protos import pathinfo_pb2

_SHA256_SIZE: Final = 32
_SIGNATURE_SIZE: Final = 64
_CA_SIZES: Final = {"SHA256": 32, "SHA1": 20, "SHA512": 64, "MD5": 16}


class InvalidReferenceDigestLenError(PathInfoError):
    """A reference is not 20 bytes long."""

    def __init__(self, index: int, size: int) -> None:
        super().__init__(f"reference {index} has {size} bytes, where {DIGEST_SIZE} are required")
        self.index = index
        self.size = size


class InconsistentNumberOfReferencesError(PathInfoError):
    """There are not as many reference names as references."""

    def __init__(self, num_references: int, num_names: int) -> None:
        super().__init__(f"{num_references} references, but {num_names} names of them")
        self.num_references = num_references
        self.num_names = num_names


class InvalidNarinfoReferenceNameError(PathInfoError):
    """A reference name is not the base name of a store path."""

    def __init__(self, index: int, name: str) -> None:
        super().__init__(f"reference name {index}, {name!r}, is not a store path's base name")
        self.index = index
        self.name = name


class InconsistentNarinfoReferenceNameDigestError(PathInfoError):
    """A reference name has another digest than the reference."""

    def __init__(self, index: int, expected: bytes, actual: bytes) -> None:
        super().__init__(f"reference {index} is {expected.hex()}, by its name {actual.hex()}")
        self.index = index
        self.expected = expected
        self.actual = actual


class NoNodePresentError(PathInfoError):
    """There is no root node."""


class InvalidNodeDigestLenError(PathInfoError):
    """The digest of the root node is not 32 bytes long."""

    def __init__(self, size: int) -> None:
        super().__init__(f"the root node has a digest of {size} bytes")
        self.size = size


class InvalidRootNodeError(PathInfoError):
    """The root node breaks another rule of its own."""


class InvalidNodeNameError(PathInfoError):
    """The name of the root node is not the base name of a store path."""

    def __init__(self, name: bytes, cause: StorePathError) -> None:
        super().__init__(f"root node: {cause}")
        self.name = name


class InvalidNarSha256DigestLenError(PathInfoError):
    """The digest of the NAR is neither absent nor 32 bytes long."""

    def __init__(self, size: int) -> None:
        super().__init__(f"the NAR has a SHA-256 of {size} bytes")
        self.size = size


class InvalidDeriverError(PathInfoError):
    """The deriver is not a store path."""


class InvalidSignatureError(PathInfoError):
    """A signature is not 64 bytes long, or nobody's."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"signature {index} {reason}")
        self.index = index


class InvalidCaError(PathInfoError):
    """The content address has a digest of the wrong length."""

    def __init__(self, kind: str, size: int, expected: int) -> None:
        super().__init__(f"the content address {kind} has {size} bytes, not {expected}")
        self.kind = kind
        self.size = size


class PathInfo(NamedTuple):
    """What is used of a valid PathInfo."""

    path: StorePath
    node: Node
    references: tuple[bytes, ...]
    nar_size: int
    # Empty when not stated.
    nar_sha256: bytes


def read_path_info(data: bytes | memoryview) -> PathInfo:
    """Decode and validate.

    Raises:
        PathInfoError: a rule is broken; its subclass says which.
    """
    try:
        message = pathinfo_pb2.PathInfo.FromString(bytes(data))
    except DecodeError as exc:
        raise PathInfoError("not a PathInfo message") from exc
    return validate(message)


def validate(message: pathinfo_pb2.PathInfo) -> PathInfo:
    """Check every rule and return what is used.

    Raises:
        PathInfoError: a rule is broken; its subclass says which.
    """
    for index, reference in enumerate(message.references):
        if len(reference) != DIGEST_SIZE:
            raise InvalidReferenceDigestLenError(index, len(reference))
    if message.HasField("narinfo"):
        _check_reference_names(message)
    node = _root_node(message)
    try:
        path = StorePath.parse(node.name)
    except StorePathError as exc:
        raise InvalidNodeNameError(node.name, exc) from exc
    nar_sha256 = message.narinfo.nar_sha256
    if len(nar_sha256) not in {0, _SHA256_SIZE}:
        raise InvalidNarSha256DigestLenError(len(nar_sha256))
    _check_deriver(message.narinfo)
    _check_signatures(message.narinfo)
    _check_ca(message.narinfo)
    return PathInfo(path, node, tuple(message.references), message.narinfo.nar_size, nar_sha256)


def encode_nar_addressed(path: StorePath, node: Node, *, nar_size: int, nar_sha256: bytes) -> bytes:
    """Return the PathInfo of a path without references that is addressed by its NAR.

    The name of `node` is replaced by that of `path`.
    """
    named = node._replace(name=path.basename().encode())
    ca = pathinfo_pb2.NARInfo.CA(type=pathinfo_pb2.NARInfo.CA.NAR_SHA256, digest=nar_sha256)
    narinfo = pathinfo_pb2.NARInfo(nar_size=nar_size, nar_sha256=nar_sha256, ca=ca)
    message = pathinfo_pb2.PathInfo(node=node_to_message(named), narinfo=narinfo)
    return message.SerializeToString(deterministic=True)


def _check_reference_names(message: pathinfo_pb2.PathInfo) -> None:
    references = message.references
    names = message.narinfo.reference_names
    if len(names) != len(references):
        raise InconsistentNumberOfReferencesError(len(references), len(names))
    for index, (reference, name) in enumerate(zip(references, names, strict=True)):
        try:
            actual = StorePath.parse(name).digest
        except StorePathError as exc:
            raise InvalidNarinfoReferenceNameError(index, name) from exc
        if actual != reference:
            raise InconsistentNarinfoReferenceNameDigestError(index, reference, actual)


def _check_deriver(narinfo: pathinfo_pb2.NARInfo) -> None:
    if not narinfo.HasField("deriver"):
        return
    if len(narinfo.deriver.digest) != DIGEST_SIZE:
        raise InvalidDeriverError(
            f"the deriver has a digest of {len(narinfo.deriver.digest)} bytes, where {DIGEST_SIZE} "
            "are required"
        )
    try:
        check_name(narinfo.deriver.name)
    except StorePathError as exc:
        raise InvalidDeriverError(f"the deriver: {exc}") from exc


def _check_signatures(narinfo: pathinfo_pb2.NARInfo) -> None:
    for index, signature in enumerate(narinfo.signatures):
        if not signature.name:
            raise InvalidSignatureError(index, "has no name")
        if len(signature.data) != _SIGNATURE_SIZE:
            size = len(signature.data)
            raise InvalidSignatureError(index, f"has {size} bytes, not {_SIGNATURE_SIZE}")


def _check_ca(narinfo: pathinfo_pb2.NARInfo) -> None:
    # Kinds that are not known here may have come later, and are kept as they are.
    if not narinfo.HasField("ca") or narinfo.ca.type not in pathinfo_pb2.NARInfo.CA.Hash.values():
        return
    kind = pathinfo_pb2.NARInfo.CA.Hash.Name(narinfo.ca.type)
    expected = _CA_SIZES[kind.rpartition("_")[2]]
    if len(narinfo.ca.digest) != expected:
        raise InvalidCaError(kind, len(narinfo.ca.digest), expected)


def _root_node(message: pathinfo_pb2.PathInfo) -> Node:
    try:
        return node_from_message(message.node)
    except NoNodeError as exc:
        raise NoNodePresentError("there is no root node") from exc
    except InvalidDigestLenError as exc:
        raise InvalidNodeDigestLenError(exc.size) from exc
    except DirectoryError as exc:
        raise InvalidRootNodeError(f"root node: {exc}") from exc
