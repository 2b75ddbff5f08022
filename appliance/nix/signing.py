"""Signatures of store paths, and the Ed25519 keys that make and verify them.

What is signed is the fingerprint of a path (see `narinfo`). As text, signatures and keys all have a
key name, a colon, and base 64 of

    signature    64 bytes
    public key   32 bytes: the key
    secret key   64 bytes: the seed (32) and the public key (32)
"""

import base64
import binascii
import re
from typing import Final, NamedTuple

from appliance.errors import PathInfoError

# In bytes.
SIGNATURE_SIZE: Final = 64
_SEED_SIZE: Final = 32
_PUBLIC_SIZE: Final = 32

# Nix accepts any name; ours must be safe in a line of text and in a list of keys.
_NAME: Final = re.compile(r"[!-9;-~]+")

# --- Texts ---


def check_key_name(name: str, what: str) -> str:
    """Return `name` if a key may have it.

    Args:
        name: the name of the key.
        what: what the key or signature is called in the error message.

    Raises:
        PathInfoError: a key may not have it (rule `invalid-name`).
    """
    if not _NAME.fullmatch(name):
        raise PathInfoError(
            f"{what}: name {name!r} is empty, or contains a space or colon", rule="invalid-name"
        )
    return name


def parse_named(text: str, what: str, size: int) -> tuple[str, bytes]:
    """Split `text` into the key name and the `size` bytes that follow in base 64.

    The error message never contains the base 64: it may be a secret key.

    Args:
        text: the signature or key.
        what: what it is called in the error message.
        size: the number of bytes it must have.

    Raises:
        PathInfoError: the text breaks a rule: `missing-separator`, `invalid-name`, `decode-error`,
            `invalid-length`.
    """
    name, separator, encoded = text.partition(":")
    if not separator:
        raise PathInfoError(f"{what}: no colon after the name of the key", rule="missing-separator")
    check_key_name(name, what)
    try:
        data = base64.b64decode(encoded, validate=True)
    except (ValueError, binascii.Error) as exc:
        raise PathInfoError(f"{what} of {name}: not base 64: {exc}", rule="decode-error") from exc
    if len(data) != size:
        raise PathInfoError(
            f"{what} of {name}: has {len(data)} bytes, expected {size}", rule="invalid-length"
        )
    return name, data


def format_named(name: str, data: bytes) -> str:
    """Return the text that `parse_named` reads."""
    return f"{name}:{base64.b64encode(data).decode()}"


# --- Signatures ---


class Signature(NamedTuple):
    """A signature of 64 bytes, made with the key called `name`."""

    name: str
    data: bytes

    @classmethod
    def parse(cls, text: str) -> "Signature":
        """Read a signature.

        Raises:
            PathInfoError: the text breaks a rule of `parse_named`.
        """
        return cls(*parse_named(text, "signature", SIGNATURE_SIZE))

    def __str__(self) -> str:
        return format_named(self.name, self.data)


# --- Keys ---


class PublicKey:
    """A key that verifies signatures."""

    def __init__(self, name: str, data: bytes) -> None:
        # Loaded late, as it takes long: signatures are read by many who have no keys.
        from cryptography.hazmat.primitives.asymmetric.ed25519 import (  # noqa: PLC0415 - see above
            Ed25519PublicKey,
        )

        self.name = name
        self.data = data
        self._key = Ed25519PublicKey.from_public_bytes(data)

    @classmethod
    def parse(cls, text: str) -> "PublicKey":
        """Read a public key.

        Raises:
            PathInfoError: the text breaks a rule of `parse_named`.
        """
        return cls(*parse_named(text, "public key", _PUBLIC_SIZE))

    def verifies(self, signature: Signature, fingerprint: str) -> bool:
        """Whether `signature` has the name of this key and signs `fingerprint` with it."""
        from cryptography.exceptions import InvalidSignature  # noqa: PLC0415 - as above

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
    """A key that signs; `public` is the key that verifies its signatures."""

    def __init__(self, name: str, seed: bytes) -> None:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import (  # noqa: PLC0415 - as above
            Ed25519PrivateKey,
        )

        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public = PublicKey(name, self._key.public_key().public_bytes_raw())

    @classmethod
    def parse(cls, text: str) -> "SecretKey":
        """Read a secret key.

        Raises:
            PathInfoError: the text breaks a rule of `parse_named`, or the public half does not
                belong to the seed (rule `public-half-mismatch`).
        """
        name, data = parse_named(text, "secret key", _SEED_SIZE + _PUBLIC_SIZE)
        key = cls(name, data[:_SEED_SIZE])
        if key.public.data != data[_SEED_SIZE:]:
            raise PathInfoError(
                f"secret key of {name}: its public half belongs to another key",
                rule="public-half-mismatch",
            )
        return key

    def sign(self, fingerprint: str) -> Signature:
        """Return the signature of `fingerprint`; it is the same each time."""
        return Signature(self.public.name, self._key.sign(fingerprint.encode()))
