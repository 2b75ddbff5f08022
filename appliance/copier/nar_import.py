"""Imports a NAR as a content-addressed store path, as an import of its tree would."""

from collections.abc import Callable

from appliance.copier.claims import claim_of
from appliance.copier.copier import CopyOutcome, PathCommitter
from appliance.errors import NarError
from appliance.nix.content_address import ContentAddress, Method
from appliance.nix.hashes import NixHash
from appliance.nix.nar import read_nar
from appliance.nix.store_path import nar_path


def import_nar(read: Callable[[int], bytes], name: str, committer: PathCommitter) -> CopyOutcome:
    """Import the NAR that makes up the whole input as the store path named `name`.

    Args:
        read: takes a number of bytes, and returns at least one and at most that many of the next
            bytes, or none at the end of the input.
        name: of the store path; a valid one.
        committer: commits to the target.

    Raises:
        NarError: it is not a NAR, or more bytes follow it.
        StoreError: the target fails.
    """
    ingest = committer.ingest()
    try:
        content = ingest.take_all(read_nar(read))
        if read(1):
            raise NarError(f"more bytes follow the NAR of {content.nar_size} bytes")
        nar_hash = NixHash("sha256", content.nar_sha256)
        claim = claim_of(
            nar_path(content.nar_sha256, name),
            nar_hash=nar_hash,
            nar_size=content.nar_size,
            ca=ContentAddress(Method.NAR, nar_hash),
        )
        return committer.commit(committer.checked(claim, content, ingest))
    finally:
        ingest.discard()
