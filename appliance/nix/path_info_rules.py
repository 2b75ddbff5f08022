"""What a store keeps when a PathInfo is put: one rule for every back end.

A store path has one content for good, because guests cache what they have read of it. The same
content may have root nodes that count sizes in different ways (see `size_dialect`): the last such
node put is kept. A PathInfo that names the content already kept adds what the kept PathInfo lacks:
signatures, references, a deriver, fields of its NARInfo. Where the two differ, the new one is
refused as a contradiction. The deriver is the exception, because a path can have several: the first
one is kept.
"""

from typing import Final, Protocol

from appliance.castore.closure import is_same_tree
from appliance.castore.digest import Digest
from appliance.castore.directory import (
    Directory,
    DirectoryNode,
    FileNode,
    Node,
    node_from_message,
    node_to_message,
)
from appliance.errors import AlreadyExistsError, PathInfoError
from appliance.nix.content_address import ContentAddress, Method
from appliance.nix.hashes import NixHash
from appliance.nix.path_info import PathInfo, read_path_info, validate
from appliance.nix.store_path import StorePath, StorePathError
from appliance.protos import pathinfo_pb2

# Every caller that may put can add signatures, and each answer contains all of them.
SIGNATURES_MAX: Final = 1024


def nar_key(node: Node) -> Digest:
    """Return the key under which a store keeps size and hash of the NAR of `node`."""
    nameless = node_to_message(node._replace(name=b""))
    return Digest.of(nameless.SerializeToString(deterministic=True))


def check_claims(encoded: bytes) -> PathInfo:
    """Validate a PathInfo, and check that its claims agree with each other.

    Raises:
        PathInfoError: it breaks a rule; the rule is `contradiction` if its claims do not agree.
    """
    info = read_path_info(encoded)
    _check_claims(info, pathinfo_pb2.PathInfo.FromString(encoded))
    return info


class Known(Protocol):
    """What a store knows about contents; `accepted` asks while the store puts a PathInfo."""

    def nar_of(self, key: Digest) -> tuple[int, bytes] | None:
        """Return size in bytes and SHA-256 of the NAR with this `nar_key`, if they are known."""

    def directory_of(self, digest: Digest) -> Directory | None:
        """Return the directory, if the store has it and it is intact."""


def accepted(old: bytes | None, new: bytes, store: Known, *, may_replace: bool = False) -> bytes:
    """Return the PathInfo to keep when `new` is put; `old` itself if nothing changes.

    Args:
        old: the PathInfo kept for the path, if any; it is ignored if it is not valid.
        new: a PathInfo that has passed `check_claims`, or that a trusted caller made.
        store: the store in which it is put.
        may_replace: return `new` where it does not agree with `old`, instead of raising.

    Raises:
        AlreadyExistsError: the path has another content.
        PathInfoError: `new` contradicts `old`, or what is known of the NAR (rule `contradiction`).
    """
    if old == new:
        return new
    known = None if old is None else _valid(old)
    message = _valid(new)
    if message is not None:
        _check_nar(message, store)
    if old is None or known is None or message is None:
        return new
    before = known.SerializeToString(deterministic=True)
    try:
        _add(known, message, store)
        _check_claims(validate(known), known)
        _check_nar(known, store)
    except (AlreadyExistsError, PathInfoError):
        if may_replace:
            return new
        raise
    after = known.SerializeToString(deterministic=True)
    return old if before == after else after


def path_of_address(
    path: StorePath, narinfo: pathinfo_pb2.NARInfo, address: ContentAddress
) -> StorePath:
    """Return the store path that follows from a content address.

    Args:
        path: gives the name, and tells which reference is to the path itself.
        narinfo: gives the names of the references; it is part of a valid PathInfo.
        address: the content address.

    Raises:
        StorePathError: a path with this address may not have such references.
    """
    names = {*narinfo.reference_names}
    references = [StorePath.parse(name) for name in sorted(names - {path.basename()})]
    return address.store_path(path.name, references, has_self_reference=path.basename() in names)


def check_size(path: StorePath, what: str, stated: int, known: frozenset[int]) -> None:
    """Check that the size that a root node states is one of those that its content may have.

    Raises:
        PathInfoError: it is none of them (rule `contradiction`).
    """
    if stated not in known:
        sizes = " or ".join(map(str, sorted(known)))
        raise _contradiction(path, f"size of the {what}", stated, sizes)


def _valid(encoded: bytes) -> pathinfo_pb2.PathInfo | None:
    try:
        read_path_info(encoded)
    except PathInfoError:
        return None
    return pathinfo_pb2.PathInfo.FromString(encoded)


def _check_claims(info: PathInfo, message: pathinfo_pb2.PathInfo) -> None:
    narinfo = message.narinfo
    if len(narinfo.signatures) > SIGNATURES_MAX:
        raise PathInfoError(
            f"path {info.path.absolute()}: {len(narinfo.signatures)} signatures, "
            f"the limit is {SIGNATURES_MAX}",
            rule="too-many-signatures",
        )
    address = ContentAddress.of_message(narinfo)
    if address is not None:
        _check_address(info, narinfo, address)


def _check_nar(message: pathinfo_pb2.PathInfo, store: Known) -> None:
    info = validate(message)
    nar = store.nar_of(nar_key(info.node))
    if nar is None:
        return
    size, sha256 = nar
    if info.nar_sha256 and info.nar_sha256 != sha256:
        raise _contradiction(
            info.path, "hash of the NAR", _sha256(info.nar_sha256), _sha256(sha256)
        )
    if (info.nar_sha256 or info.nar_size) and info.nar_size != size:
        raise _contradiction(info.path, "size of the NAR", info.nar_size, size)


def _check_address(info: PathInfo, narinfo: pathinfo_pb2.NARInfo, address: ContentAddress) -> None:
    try:
        expected = path_of_address(info.path, narinfo, address).absolute()
    except StorePathError as exc:
        expected = f"none ({exc})"
    if expected != info.path.absolute():
        raise PathInfoError(
            f"path {info.path.absolute()}: by its content address {address}, "
            f"the path is {expected}",
            rule="contradiction",
        )
    is_whole_nar = address.method is Method.NAR and address.hash.algorithm == "sha256"
    refers_to_itself = info.path.basename() in narinfo.reference_names
    if is_whole_nar and not refers_to_itself and info.nar_sha256 not in {b"", address.hash.digest}:
        raise _contradiction(
            info.path, "hash of the NAR", _sha256(info.nar_sha256), f"{address.hash} (its ca)"
        )


def _add(known: pathinfo_pb2.PathInfo, new: pathinfo_pb2.PathInfo, store: Known) -> None:
    old_node, new_node = node_from_message(known.node), node_from_message(new.node)
    path = StorePath.parse(new_node.name)
    if old_node != new_node and is_same_tree(old_node, new_node, store.directory_of):
        known.node.CopyFrom(new.node)
    elif old_node != new_node:
        raise AlreadyExistsError(
            f"path {path.absolute()}: already has other content: "
            f"{_content(old_node)}, not {_content(new_node)}"
        )
    _add_references(known, new, path)
    if new.HasField("narinfo"):
        _add_narinfo(known.narinfo, new.narinfo, path)


def _add_references(
    known: pathinfo_pb2.PathInfo, new: pathinfo_pb2.PathInfo, path: StorePath
) -> None:
    # A PathInfo with neither references nor a NARInfo may just not state its references.
    states_them = new.references or new.HasField("narinfo")
    if known.references and states_them and {*known.references} != {*new.references}:
        stated = f"{len(new.references)} references"
        raise _contradiction(path, "references", stated, f"another set of {len(known.references)}")
    names = dict(zip(new.references, new.narinfo.reference_names, strict=False))
    if known.HasField("narinfo") and len(names) < len({*new.references}):
        return  # The new references lack names, and those of `known` must all have one.
    if not known.references:
        known.references.extend(new.references)
    if names and not known.narinfo.reference_names:
        known.narinfo.reference_names.extend(names[digest] for digest in known.references)


def _add_narinfo(known: pathinfo_pb2.NARInfo, new: pathinfo_pb2.NARInfo, path: StorePath) -> None:
    known.SetInParent()
    if known.nar_sha256 and new.nar_sha256 and known.nar_sha256 != new.nar_sha256:
        raise _contradiction(
            path, "hash of the NAR", _sha256(new.nar_sha256), _sha256(known.nar_sha256)
        )
    if known.nar_size and new.nar_size and known.nar_size != new.nar_size:
        raise _contradiction(path, "size of the NAR", new.nar_size, known.nar_size)
    if known.HasField("ca") and new.HasField("ca") and known.ca != new.ca:
        raise _contradiction(path, "content address", _ca(new), _ca(known))
    known.nar_sha256 = known.nar_sha256 or new.nar_sha256
    known.nar_size = known.nar_size or new.nar_size
    if new.HasField("ca"):
        known.ca.CopyFrom(new.ca)
    if new.HasField("deriver") and not known.HasField("deriver"):
        known.deriver.CopyFrom(new.deriver)
    signatures = {(signature.name, signature.data) for signature in known.signatures}
    for signature in new.signatures:
        if (signature.name, signature.data) not in signatures:
            known.signatures.add().CopyFrom(signature)


def _contradiction(path: StorePath, what: str, stated: object, known: object) -> PathInfoError:
    return PathInfoError(
        f"path {path.absolute()}: {what}: states {stated}, but it is {known}", rule="contradiction"
    )


def _sha256(digest: bytes) -> NixHash:
    return NixHash("sha256", digest)


def _ca(narinfo: pathinfo_pb2.NARInfo) -> object:
    return ContentAddress.of_message(narinfo) or f"one of unknown kind {narinfo.ca.type}"


def _content(node: Node) -> str:
    match node:
        case DirectoryNode():
            return f"directory {node.digest} of size {node.size}"
        case FileNode():
            kind = "executable file" if node.executable else "file"
            return f"{kind} {node.digest} of {node.size} bytes"
        case _:
            return f"symlink to {node.target!r}"
