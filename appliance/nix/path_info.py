"""PathInfos: what a store says about a path, and the rules that make one valid.

pathinfo.proto: PathInfo, NARInfo.
"""

from typing import Final, NamedTuple

from google.protobuf.message import DecodeError

from appliance.castore.directory import Node, node_from_message, node_to_message
from appliance.errors import DirectoryError, PathInfoError
from appliance.nix.store_path import DIGEST_SIZE, StorePath, StorePathError, check_name
from appliance.protos import pathinfo_pb2

# In bytes.
_SHA256_SIZE: Final = 32
_SIGNATURE_SIZE: Final = 64
_CA_SIZES: Final = {"SHA256": 32, "SHA1": 20, "SHA512": 64, "MD5": 16}

# The rules for a node that have a name of their own where that node is the root.
_ROOT_NODE_RULES: Final = {
    "no-node-present": "no-node-present",
    "invalid-digest-len": "invalid-node-digest-len",
}


class PathInfo(NamedTuple):
    """The parts of a valid PathInfo that this program uses.

    `nar_size` is in bytes; `nar_sha256` is empty where the PathInfo does not state it.
    """

    path: StorePath
    node: Node
    references: tuple[bytes, ...]
    nar_size: int
    nar_sha256: bytes


def read_path_info(data: bytes | memoryview) -> PathInfo:
    """Decode and validate a PathInfo.

    Raises:
        PathInfoError: `data` is not a PathInfo, or breaks a rule; `rule` says which.
    """
    try:
        message = pathinfo_pb2.PathInfo.FromString(bytes(data))
    except DecodeError as exc:
        raise PathInfoError("not a PathInfo message", rule="not-a-message") from exc
    return validate(message)


def validate(message: pathinfo_pb2.PathInfo) -> PathInfo:
    """Check every rule and return the parts that are used.

    Raises:
        PathInfoError: `message` breaks a rule; `rule` says which.
    """
    for index, reference in enumerate(message.references):
        if len(reference) != DIGEST_SIZE:
            raise PathInfoError(
                f"reference {index} has {len(reference)} bytes, expected {DIGEST_SIZE}",
                rule="invalid-reference-digest-len",
            )
    if message.HasField("narinfo"):
        _check_reference_names(message)
    node = _root_node(message)
    try:
        path = StorePath.parse(node.name)
    except StorePathError as exc:
        raise PathInfoError(f"root node: {exc}", rule="invalid-node-name") from exc
    nar_sha256 = message.narinfo.nar_sha256
    if len(nar_sha256) not in {0, _SHA256_SIZE}:
        raise PathInfoError(
            f"SHA-256 of the NAR has {len(nar_sha256)} bytes, expected none or {_SHA256_SIZE}",
            rule="invalid-nar-sha256-digest-len",
        )
    _check_deriver(message.narinfo)
    _check_signatures(message.narinfo)
    _check_ca(message.narinfo)
    return PathInfo(path, node, tuple(message.references), message.narinfo.nar_size, nar_sha256)


def encode_nar_addressed(path: StorePath, node: Node, *, nar_size: int, nar_sha256: bytes) -> bytes:
    """Return the encoded PathInfo of a path without references that is addressed by its NAR.

    The name of `node` is replaced by the base name of `path`.
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
        raise PathInfoError(
            f"{len(names)} reference names, expected {len(references)}: one for each reference",
            rule="inconsistent-number-of-references",
        )
    for index, (reference, name) in enumerate(zip(references, names, strict=True)):
        try:
            actual = StorePath.parse(name).digest
        except StorePathError as exc:
            raise PathInfoError(
                f"reference name {index}: {exc}", rule="invalid-narinfo-reference-name"
            ) from exc
        if actual != reference:
            raise PathInfoError(
                f"reference name {index} has the digest {actual.hex()}, expected {reference.hex()}",
                rule="inconsistent-narinfo-reference-name-digest",
            )


def _check_deriver(narinfo: pathinfo_pb2.NARInfo) -> None:
    if not narinfo.HasField("deriver"):
        return
    if len(narinfo.deriver.digest) != DIGEST_SIZE:
        raise PathInfoError(
            f"digest of the deriver has {len(narinfo.deriver.digest)} bytes, "
            f"expected {DIGEST_SIZE}",
            rule="invalid-deriver",
        )
    try:
        check_name(narinfo.deriver.name)
    except StorePathError as exc:
        raise PathInfoError(f"deriver: {exc}", rule="invalid-deriver") from exc


def _check_signatures(narinfo: pathinfo_pb2.NARInfo) -> None:
    for index, signature in enumerate(narinfo.signatures):
        if not signature.name:
            raise PathInfoError(f"signature {index} has no key name", rule="invalid-signature")
        if len(signature.data) != _SIGNATURE_SIZE:
            raise PathInfoError(
                f"signature {index} has {len(signature.data)} bytes, expected {_SIGNATURE_SIZE}",
                rule="invalid-signature",
            )


def _check_ca(narinfo: pathinfo_pb2.NARInfo) -> None:
    # A kind that is unknown here may be newer than this program: it is accepted as it is.
    if not narinfo.HasField("ca") or narinfo.ca.type not in pathinfo_pb2.NARInfo.CA.Hash.values():
        return
    kind = pathinfo_pb2.NARInfo.CA.Hash.Name(narinfo.ca.type)
    expected = _CA_SIZES[kind.rpartition("_")[2]]
    if len(narinfo.ca.digest) != expected:
        raise PathInfoError(
            f"digest of the content address {kind} has {len(narinfo.ca.digest)} bytes, "
            f"expected {expected}",
            rule="invalid-ca",
        )


def _root_node(message: pathinfo_pb2.PathInfo) -> Node:
    try:
        return node_from_message(message.node)
    except DirectoryError as exc:
        rule = _ROOT_NODE_RULES.get(exc.rule, "invalid-root-node")
        raise PathInfoError(f"root node: {exc}", rule=rule) from exc
