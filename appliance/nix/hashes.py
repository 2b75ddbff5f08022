"""Digests of several algorithms, as Nix writes them.

ALGORITHM:TEXT   base 16, the base 32 of Nix, or base 64: the length tells which
ALGORITHM-TEXT   base 64, whose padding may be missing (as in HTML, Subresource Integrity)
"""

import base64
import binascii
import hashlib
from typing import Final, NamedTuple

from appliance.errors import PathInfoError
from appliance.nix.store_path import StorePath, base32_size, decode_base32, encode_base32

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
        return f"{self.algorithm}:{encode_base32(self.digest)}"


def _decode(text: str, size: int) -> bytes:
    if len(text) == 2 * size:
        return bytes.fromhex(text)
    if len(text) == base32_size(size):
        return decode_base32(text)
    digest = base64.b64decode(text, validate=True)
    if base64.b64encode(digest).decode() != text:
        raise ValueError("bits past the last byte")
    return digest


def _decode_unpadded(text: str, size: int) -> bytes:
    # Nix lets bits past the last byte and any padding go by in this form.
    return base64.b64decode(text.rstrip("=") + "=" * (-size % 3), validate=True)


# --- Hashes for content addresses, also of what refers to its own path, as Nix has them.
#
# The digest part of a path cannot follow from itself, so in the content it counts as zeros. Older
# Nix (2.8 does) hashes its places too, after all content: for each, `|` and the offset in decimal.


class ContentHash:
    """The hash, by an algorithm of `NixHash`, of content that may refer to `itself`."""

    def __init__(self, algorithm: str, itself: StorePath | None = None) -> None:
        self._hasher: Final = hashlib.new(algorithm, usedforsecurity=False)
        self._sought: Final = encode_base32(itself.digest).encode() if itself else b""
        self._offsets: list[int] = []
        # What is not hashed yet, as the digest may begin in it, and where it begins.
        self._tail = b""
        self._tail_at = 0

    def update(self, data: bytes) -> None:
        """Append `data` to the content."""
        if not self._sought:
            self._hasher.update(data)
            return
        size = len(self._sought)
        content = self._tail + data
        found = content.find(self._sought)
        while found >= 0:
            self._offsets.append(self._tail_at + found)
            found = content.find(self._sought, found + size)
        content = content.replace(self._sought, bytes(size))
        end = max(0, len(content) - size + 1)
        self._hasher.update(content[:end])
        self._tail = content[end:]
        self._tail_at += end

    def digests(self) -> tuple[bytes, bytes]:
        """Return the digest without the places of the path, and with them."""
        hasher = self._hasher.copy()
        hasher.update(self._tail)
        without_places = hasher.digest()
        for offset in self._offsets:
            hasher.update(b"|%d" % offset)
        return without_places, hasher.digest()
