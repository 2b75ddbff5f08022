"""Uploads: from a NAR and a narinfo to a path in the store.

A path becomes visible when its narinfo has come, and only then does any of its contents get into
the store. Everything that a narinfo claims is checked before: that it is about the NAR that was
uploaded, the content address, the signatures if some are required, and that its references are
there.
"""

import asyncio
from typing import Final, NamedTuple

from appliance.castore.directory import Node, SymlinkNode
from appliance.errors import AlreadyExistsError, PathInfoError
from appliance.http_cache.nar_ingest import ContentTarget, ServicesTarget, StoreTarget, ingest
from appliance.http_cache.pending_nars import PendingNar, PendingNars, buffered
from appliance.nix.content_address import Method
from appliance.nix.hashes import ContentHash
from appliance.nix.nar import ContentRead, FileRead, read_nar
from appliance.nix.narinfo import NarInfoFile, encode_path_info
from appliance.nix.path_info import read_path_info
from appliance.nix.path_info_rules import check_claims
from appliance.nix.store_path import StorePath
from appliance.nix.trusted_keys import TrustedKeys
from appliance.services.contracts import Services
from appliance.store.writer import AsyncStore

_PIECE_SIZE: Final = 1 << 20


class UploadTarget(NamedTuple):
    """Where uploads go: the services, and the local store that all of them are in, if any."""

    services: Services
    local: AsyncStore | None

    def contents(self) -> ContentTarget:
        """Return what takes the contents of one NAR."""
        return ServicesTarget(self.services) if self.local is None else StoreTarget(self.local)


async def accept(
    narinfo: NarInfoFile,
    pending: PendingNars,
    target: UploadTarget,
    trusted_keys: TrustedKeys | None,
) -> None:
    """Put a path whose NAR is pending.

    Args:
        narinfo: describes the path.
        pending: has the NAR under the URL that the narinfo gives.
        target: where the path is put.
        trusted_keys: one of them must have signed a path that is not content-addressed; None if
            no signatures are required.

    Raises:
        AlreadyExistsError: the path has other content.
        PathInfoError, InvalidRequestError: a claim is wrong; the text says which.
        StoreError: the target fails. Contents may be there by then, but not the path.
    """
    nar = pending.borrow(narinfo.url)
    is_done = False
    try:
        _check_file(narinfo, nar)
        # The claims that do not depend on the content, whatever that is.
        check_claims(encode_path_info(narinfo, SymlinkNode(b"", b"unknown")))
        if trusted_keys is not None:
            trusted_keys.check(narinfo)
        await _check_references(narinfo, target.services)
        await asyncio.to_thread(_check_address, narinfo, nar)
        node = await _known_node(narinfo, target.services)
        if node is None:
            node = await ingest(nar, target.contents())
        # What was there at the check may have been removed since.
        encoded = encode_path_info(narinfo, node)
        await target.services.path_infos.put(encoded, needs_references=True)
        is_done = True
    finally:
        pending.give_back(narinfo.url, is_done=is_done)


def _check_file(narinfo: NarInfoFile, nar: PendingNar) -> None:
    claims: list[tuple[str, object, object]] = [
        ("Compression", narinfo.compression, nar.compression),
        ("NarHash", narinfo.nar_hash, nar.nar_hash),
        ("NarSize", narinfo.nar_size, nar.nar_size),
        ("FileHash", narinfo.file_hash or nar.file_hash, nar.file_hash),
        ("FileSize", narinfo.file_size or nar.file_size, nar.file_size),
    ]
    for name, stated, actual in claims:
        if stated != actual:
            raise _wrong(narinfo.path, f"{name} is {stated}, but {actual} was uploaded")


async def _check_references(narinfo: NarInfoFile, services: Services) -> None:
    for reference in narinfo.references:
        if reference == narinfo.path:
            continue
        known = await services.path_infos.get(reference.digest)
        if known is None or read_path_info(known).path != reference:
            raise _wrong(narinfo.path, f"refers to {reference.absolute()}, which is missing")


def _check_address(narinfo: NarInfoFile, nar: PendingNar) -> None:
    address = narinfo.ca
    if address is None:
        return
    itself = narinfo.path if narinfo.path in narinfo.references else None
    hasher = ContentHash(address.hash.algorithm, itself)
    with buffered(nar.file) as reader:
        if address.method is Method.NAR:
            while data := reader.read(_PIECE_SIZE):
                hasher.update(data)
        else:
            for event in read_nar(reader.read):
                if isinstance(event, ContentRead):
                    hasher.update(event.data)
                elif not isinstance(event, FileRead) or event.executable:
                    raise _wrong(narinfo.path, f"{address}: it is not a plain file")
    if address.hash.digest not in hasher.digests():
        actual = address._replace(hash=address.hash._replace(digest=hasher.digests()[0]))
        raise _wrong(narinfo.path, f"CA is {address}, but that of the content is {actual}")


async def _known_node(narinfo: NarInfoFile, services: Services) -> Node | None:
    """Return the root node of a path that is there already with the same NAR."""
    encoded = await services.path_infos.get(narinfo.path.digest)
    if encoded is None:
        return None
    known = read_path_info(encoded)
    if not known.nar_sha256:
        return None
    if known.path != narinfo.path or known.nar_sha256 != narinfo.nar_hash.digest:
        raise AlreadyExistsError(
            f"path {narinfo.path.absolute()}: {known.path.absolute()} is there, with another NAR"
        )
    return known.node


def _wrong(path: StorePath, reason: str) -> PathInfoError:
    return PathInfoError(f"path {path.absolute()}: {reason}", rule="contradiction")
