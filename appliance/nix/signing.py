"""Signatures of store paths, as text: KEY-NAME `:` base 64."""

import base64
import binascii
import re
from typing import Final, NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from appliance.errors import PathInfoError

SIGNATURE_SIZE: Final = 64

# Nix takes any name; it has to be safe in a line, and in a list of keys.
_NAME: Final = re.compile(r"[!-9;-~]+")


class KeyTextError(PathInfoError):
    """A text is not a signature or key; a secret key is never part of the message."""


class Signature(NamedTuple):
    """64 bytes made with the key called `name`."""

    name: str
    data: bytes

    @classmethod
    def parse(cls, text: str) -> "Signature":
        """Read the text.

        Raises:
            KeyTextError: a rule is broken.
        """
        return cls(*parse_named(text, "signature", SIGNATURE_SIZE))

    def __str__(self) -> str:
        return format_named(self.name, self.data)


def check_key_name(name: str, what: str) -> str:
    """Return `name` if a key can have it.

    Raises:
        KeyTextError: it cannot; `what` says what the key or signature is to the reader.
    """
    if not _NAME.fullmatch(name):
        raise KeyTextError(f"{what}: name {name!r} is empty, or has a space or colon in it")
    return name


def parse_named(text: str, what: str, size: int) -> tuple[str, bytes]:
    """Split NAME `:` base 64 into the name and `size` bytes.

    Raises:
        KeyTextError: a rule is broken.
    """
    name, separator, encoded = text.partition(":")
    if not separator:
        raise KeyTextError(f"{what}: has no colon after the name of the key")
    check_key_name(name, what)
    try:
        data = base64.b64decode(encoded, validate=True)
    except (ValueError, binascii.Error) as exc:
        raise KeyTextError(f"{what} of {name}: not base 64: {exc}") from exc
    if len(data) != size:
        raise KeyTextError(f"{what} of {name}: {len(data)} bytes, where {size} are required")
    return name, data


def format_named(name: str, data: bytes) -> str:
    """Return what `parse_named` reads."""
    return f"{name}:{base64.b64encode(data).decode()}"


# --- Ed25519 keys of Nix: what is signed is the fingerprint of a path ---
#
# public key: NAME `:` base 64 of the key (32 bytes)
# secret key: NAME `:` base 64 of the seed and the public key (64 bytes)

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
