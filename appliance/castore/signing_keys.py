"""Ed25519 keys of Nix: what is signed is the fingerprint of a path.

public key: NAME `:` base 64 of the key (32 bytes)
secret key: NAME `:` base 64 of the seed and the public key (64 bytes)
"""

from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from appliance.castore.signature import KeyTextError, Signature, format_named, parse_named

_SEED_SIZE: Final = 32
_PUBLIC_SIZE: Final = 32


class PublicKey:
    """Verifies signatures."""

    def __init__(self, name: str, data: bytes) -> None:
        self.name = name
        self.data = data
        self._key = Ed25519PublicKey.from_public_bytes(data)

    @classmethod
    def parse(cls, text: str) -> "PublicKey":
        """Read the text.

        Raises:
            KeyTextError: a rule is broken.
        """
        return cls(*parse_named(text, "public key", _PUBLIC_SIZE))

    def verifies(self, signature: Signature, fingerprint: str) -> bool:
        """Whether `signature` is of `fingerprint`, by this key, and called so."""
        if signature.name != self.name:
            return False
        try:
            self._key.verify(signature.data, fingerprint.encode())
        except InvalidSignature:
            return False
        return True

    def __str__(self) -> str:
        return format_named(self.name, self.data)


class SecretKey:
    """Signs."""

    def __init__(self, name: str, seed: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public = PublicKey(name, self._key.public_key().public_bytes_raw())

    @classmethod
    def parse(cls, text: str) -> "SecretKey":
        """Read the text.

        Raises:
            KeyTextError: a rule is broken, or the halves do not belong together.
        """
        name, data = parse_named(text, "secret key", _SEED_SIZE + _PUBLIC_SIZE)
        key = cls(name, data[:_SEED_SIZE])
        if key.public.data != data[_SEED_SIZE:]:
            raise KeyTextError(f"secret key of {name}: its public half is another key's")
        return key

    def sign(self, fingerprint: str) -> Signature:
        """Return the signature, the same each time."""
        return Signature(self.public.name, self._key.sign(fingerprint.encode()))
