"""Checks of claims: whether they are trusted, and whether the content agrees with them."""

from collections.abc import Callable

from appliance.castore.directory import FileNode
from appliance.copier.claims import Content, has_known_nar
from appliance.errors import PathInfoError
from appliance.nix.content_address import ContentAddress, Method
from appliance.nix.hashes import ContentHash, NixHash
from appliance.nix.narinfo import NarInfoFile

CheckClaim = Callable[[NarInfoFile], None]


def trust_all(_claim: NarInfoFile) -> None:
    """Accept every claim: for stores of this machine, and where the user asked for it."""


class AddressCheck:
    """Checks the content of a path against its content address, if it has one.

    Args:
        claim: the claim about the path; `check_claims` checks its path against the address.
    """

    def __init__(self, claim: NarInfoFile) -> None:
        self._path = claim.path
        self._address: ContentAddress | None = claim.ca
        self.nar_hash: ContentHash | None = None
        self.flat_hash: ContentHash | None = None
        if claim.ca is None:
            return
        refers_to_itself = claim.path in claim.references
        hasher = ContentHash(claim.ca.hash.algorithm, claim.path if refers_to_itself else None)
        if claim.ca.method is Method.NAR:
            self.nar_hash = hasher
        else:
            self.flat_hash = hasher

    def check(self, content: Content) -> None:
        """Check the content that was read.

        Raises:
            PathInfoError: it has another content address.
        """
        address = self._address
        hasher = self.nar_hash or self.flat_hash
        if address is None or hasher is None:
            return
        node = content.node
        is_plain = isinstance(node, FileNode) and not node.executable
        if address.method is not Method.NAR and not is_plain:
            raise PathInfoError(
                f"path {self._path.absolute()}: its content address is {address}, "
                "which is for a file that is not executable, but it is something else"
            )
        digests = hasher.digests()
        if address.hash.digest not in digests:
            actual = address._replace(hash=address.hash._replace(digest=digests[0]))
            raise PathInfoError(
                f"path {self._path.absolute()}: its content address is {address}, "
                f"but its content has the address {actual}"
            )


def check_nar(claim: NarInfoFile, content: Content) -> None:
    """Check the content that was read against the size and hash of the NAR in the claim.

    Raises:
        PathInfoError: they differ.
    """
    if not has_known_nar(claim):
        return
    actual = NixHash("sha256", content.nar_sha256)
    for what, stated, found in (
        ("size", claim.nar_size, content.nar_size),
        ("hash", claim.nar_hash, actual),
    ):
        if stated != found:
            raise PathInfoError(
                f"path {claim.path.absolute()}: the {what} of its NAR is stated as {stated}, "
                f"but is {found}"
            )
