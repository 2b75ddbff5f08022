"""Which claims about store paths are trusted: those that a trusted key has signed.

A signature covers the path, the hash and size of its NAR, and its references. It says nothing about
the castore node, so whoever accepts a node because of a signature has to compare its NAR, too.
"""

from collections.abc import Iterable, Sequence
from typing import Final

from appliance.errors import ConfigError, PathInfoError
from appliance.nix.narinfo import NarInfoFile
from appliance.nix.signing import PublicKey
from appliance.nix.store_path import StorePath


class UntrustedPathError(PathInfoError):
    """No trusted key has signed the claims about a path."""


class TrustedKeys:
    """Public keys whose signatures are trusted."""

    def __init__(self, keys: Sequence[PublicKey]) -> None:
        self.keys: Final = tuple(keys)

    def check(self, claim: NarInfoFile) -> None:
        """Check that one of the keys has signed a claim.

        A claim with a content address needs no signature, because the content proves it. The
        caller compares them.

        Raises:
            UntrustedPathError: the claim has neither a content address nor a trusted signature.
        """
        if claim.ca is None and not self._has_signed(claim):
            raise UntrustedPathError(
                f"path {claim.path.absolute()}: {self._reason(claim)}", rule="untrusted"
            )

    def wrong_signatures(self, claim: NarInfoFile) -> list[str]:
        """Return the names of the keys under which the claim has a signature that is wrong."""
        fingerprint = _fingerprint(claim)
        names = {key.name for key in self.keys}
        return [
            signature.name
            for signature in claim.signatures
            if signature.name in names
            and not any(key.verifies(signature, fingerprint) for key in self.keys)
        ]

    def _has_signed(self, claim: NarInfoFile) -> bool:
        fingerprint = _fingerprint(claim)
        return any(
            key.verifies(signature, fingerprint)
            for signature in claim.signatures
            for key in self.keys
        )

    def _reason(self, claim: NarInfoFile) -> str:
        wrong = self.wrong_signatures(claim)
        if wrong:
            return f"its signature by {wrong[0]} is wrong"
        if not claim.signatures:
            return "it has no signature"
        signers = ", ".join(sorted({name for name, _data in claim.signatures}))
        return f"it is signed by {signers} only, and no such key is trusted"


def parse_keys(texts: Iterable[str], option: str) -> TrustedKeys:
    """Read public keys, each text with one or several of them, separated by spaces.

    Args:
        texts: the texts, as the user has given them.
        option: where they were given, for the error message.

    Raises:
        ConfigError: one of them is not a public key.
    """
    try:
        return TrustedKeys([PublicKey.parse(key) for text in texts for key in text.split()])
    except PathInfoError as exc:
        raise ConfigError(f"{option}: {exc}") from exc


def _fingerprint(claim: NarInfoFile) -> str:
    # Nix sorts references to sign and verify.
    references = tuple(sorted(claim.references, key=StorePath.basename))
    return claim._replace(references=references).fingerprint()
