"""A NAR becomes a store path that is addressed by its content, as its tree would by an import."""

from collections.abc import Callable

from appliance.copier.claims import claim_of
from appliance.copier.copier import CopyOutcome, PathCommitter
from appliance.errors import NarError
from appliance.nix.content_address import ContentAddress, Method
from appliance.nix.hashes import NixHash
from appliance.nix.nar import read_nar
from appliance.nix.store_path import nar_path


def import_nar(read: Callable[[int], bytes], name: str, committer: PathCommitter) -> CopyOutcome:
    """Import one NAR, which has to be all there is to read, as the store path named `name`.

    Args:
        read: returns at most so many of the next bytes, and none at the end only.
        name: of the store path; a valid one.
        committer: commits to the target.

    Raises:
        NarError: it is not a NAR, or more follows it.
        StoreError: the target fails.
    """
    ingest = committer.ingest()
    try:
        content = ingest.take_all(read_nar(read))
        if read(1):
            raise NarError(f"the NAR has {content.nar_size} bytes, but more follow")
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
