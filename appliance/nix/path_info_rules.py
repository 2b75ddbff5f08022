"""What is kept when a PathInfo is put: one rule for every back end.

Of a store path there is one content, for good: guests keep what they have read of it. The same
content may be counted in another way (see `size_dialect`): of such root nodes the last is kept. A
PathInfo that names the same content as the one kept adds to it what that lacks: signatures,
references, a deriver, fields of its NARInfo. What it states otherwise is a contradiction, but for
the deriver, of which a path can have several: the first is kept.
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
from appliance.nix.store_path import InvalidReferenceError, StorePath
from appliance.protos import pathinfo_pb2

# Anybody who may put can add signatures, and all who ask get them all.
SIGNATURES_MAX: Final = 1024


class ContradictionError(PathInfoError):
    """A PathInfo contradicts itself, or what is known of its path; the text names what and how."""


def nar_key(node: Node) -> Digest:
    """Return under which key a store keeps what it calculated of the NAR of `node`."""
    nameless = node_to_message(node._replace(name=b""))
    return Digest.of(nameless.SerializeToString(deterministic=True))


def check_claims(encoded: bytes) -> PathInfo:
    """Validate a PathInfo, and check what it says against itself.

    Raises:
        PathInfoError: a rule is broken; a ContradictionError if its claims do not agree.
    """
    info = read_path_info(encoded)
    _check_claims(info, pathinfo_pb2.PathInfo.FromString(encoded))
    return info


class Known(Protocol):
    """What a store knows of contents; asked while it puts a PathInfo."""

    def nar_of(self, key: Digest) -> tuple[int, bytes] | None:
        """Return size in bytes and SHA-256 of a NAR, if they were calculated, by `nar_key`."""

    def directory_of(self, digest: Digest) -> Directory | None:
        """Return a directory, if it is there and as it should be."""


def accepted(old: bytes | None, new: bytes, store: Known, *, may_replace: bool = False) -> bytes:
    """Return what is to be kept when `new` is put; `old` itself if that changes nothing.

    Args:
        old: what is kept of the path; one that is not valid counts for nothing.
        new: what `check_claims` has passed, or the word of a caller that made it.
        store: where it is put.
        may_replace: `new` takes the place of `old` where they do not agree.

    Raises:
        AlreadyExistsError: the path has another node.
        ContradictionError: `new` contradicts `old`, or the NAR.
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
    """Return the store path that follows from the content address and references of `path`.

    Raises:
        InvalidReferenceError: it can have no such references.
    """
    names = {*narinfo.reference_names}
    references = [StorePath.parse(name) for name in sorted(names - {path.basename()})]
    return address.store_path(path.name, references, has_self_reference=path.basename() in names)


def check_size(path: StorePath, what: str, stated: int, known: frozenset[int]) -> None:
    """Check the size that a root node states against those that its content may have.

    Raises:
        ContradictionError: it is none of them.
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
            f"path {info.path.absolute()}: {len(narinfo.signatures)} signatures; "
            f"it can have {SIGNATURES_MAX}"
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
    except InvalidReferenceError as exc:
        expected = f"none ({exc})"
    if expected != info.path.absolute():
        raise ContradictionError(
            f"path {info.path.absolute()}: by its content address {address} it is {expected}"
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
            f"path {path.absolute()}: is there already, with other content: "
            f"{_content(old_node)}, not {_content(new_node)}"
        )
    _add_references(known, new, path)
    if new.HasField("narinfo"):
        _add_narinfo(known.narinfo, new.narinfo, path)


def _add_references(
    known: pathinfo_pb2.PathInfo, new: pathinfo_pb2.PathInfo, path: StorePath
) -> None:
    # A PathInfo without a NARInfo that has no references may just not state any.
    states_them = new.references or new.HasField("narinfo")
    if known.references and states_them and {*known.references} != {*new.references}:
        raise _contradiction(
            path, "references", f"{len(new.references)} of them", f"{len(known.references)} others"
        )
    names = dict(zip(new.references, new.narinfo.reference_names, strict=False))
    if known.HasField("narinfo") and len(names) < len({*new.references}):
        return  # whose names are missing cannot be added to those that have some
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


def _contradiction(path: StorePath, what: str, stated: object, known: object) -> ContradictionError:
    return ContradictionError(f"path {path.absolute()}: {what}: states {stated}, but it is {known}")


def _sha256(digest: bytes) -> NixHash:
    return NixHash("sha256", digest)


def _ca(narinfo: pathinfo_pb2.NARInfo) -> object:
    return ContentAddress.of_message(narinfo) or f"of kind {narinfo.ca.type}"


def _content(node: Node) -> str:
    match node:
        case DirectoryNode():
            return f"directory {node.digest} of size {node.size}"
        case FileNode():
            kind = "executable file" if node.executable else "file"
            return f"{kind} {node.digest} of {node.size} bytes"
        case _:
            return f"symlink to {node.target!r}"
