"""Digests of several algorithms, as Nix writes them.

ALGORITHM:TEXT   base 16, the base 32 of Nix, or base 64: the length tells which
ALGORITHM-TEXT   base 64, whose padding may be missing (as in HTML, Subresource Integrity)
"""

import base64
import binascii
from typing import Final, NamedTuple

from appliance.castore import nixbase32
from appliance.errors import PathInfoError

DIGEST_SIZES: Final = {"md5": 16, "sha1": 20, "sha256": 32, "sha512": 64}


class NixHashError(PathInfoError):
    """A text is not a digest."""


class NixHash(NamedTuple):
    """A digest and its algorithm, one of `DIGEST_SIZES`."""

    algorithm: str
    digest: bytes

    @classmethod
    def parse(cls, text: str) -> "NixHash":
        """Read either form.

        Raises:
            NixHashError: unknown algorithm, or not a digest of its size.
        """
        separator = next((character for character in text if character in ":-"), ":")
        algorithm, _, encoded = text.partition(separator)
        size = DIGEST_SIZES.get(algorithm)
        if size is None:
            known = ", ".join(DIGEST_SIZES)
            raise NixHashError(f"hash {text!r}: does not begin with one of {known}")
        decode = _decode if separator == ":" else _decode_unpadded
        try:
            digest = decode(encoded, size)
        except (ValueError, binascii.Error) as exc:
            raise NixHashError(f"hash {text!r}: {exc}") from exc
        if len(digest) != size:
            raise NixHashError(f"hash {text!r}: {len(digest)} bytes; {algorithm} has {size}")
        return cls(algorithm, digest)

    def sri(self) -> str:
        """Return the form with base 64."""
        return f"{self.algorithm}-{base64.b64encode(self.digest).decode()}"

    def __str__(self) -> str:
        return f"{self.algorithm}:{nixbase32.encode(self.digest)}"


def _decode(text: str, size: int) -> bytes:
    if len(text) == 2 * size:
        return bytes.fromhex(text)
    if len(text) == nixbase32.encoded_size(size):
        return nixbase32.decode(text)
    digest = base64.b64decode(text, validate=True)
    if base64.b64encode(digest).decode() != text:
        raise ValueError("bits past the last byte")
    return digest


def _decode_unpadded(text: str, size: int) -> bytes:
    # Nix lets bits past the last byte and any padding go by in this form.
    return base64.b64decode(text.rstrip("=") + "=" * (-size % 3), validate=True)
