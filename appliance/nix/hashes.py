"""Hashes as Nix writes them, and hashing of content that may contain its own store path.

A hash has an algorithm and a digest. As text it has one of two forms:

    ALGORITHM:TEXT   base 16, the base 32 of Nix, or base 64; the length tells which
    ALGORITHM-TEXT   base 64, possibly without padding (as in HTML, Subresource Integrity)
"""

import base64
import binascii
import hashlib
from typing import Final, NamedTuple

from appliance.errors import PathInfoError
from appliance.nix.store_path import StorePath, base32_size, decode_base32, encode_base32

# In bytes.
DIGEST_SIZES: Final = {"md5": 16, "sha1": 20, "sha256": 32, "sha512": 64}

# --- Hashes as text ---


class NixHash(NamedTuple):
    """A digest and its algorithm, one of `DIGEST_SIZES`."""

    algorithm: str
    digest: bytes

    @classmethod
    def parse(cls, text: str) -> "NixHash":
        """Read either form.

        Raises:
            PathInfoError: the algorithm is unknown (rule `invalid-algo`), the digest is in none of
                the encodings (`invalid-hash-encoding`), or it does not have the size of the
                algorithm (`invalid-digest-length`).
        """
        separator = next((character for character in text if character in ":-"), ":")
        algorithm, _, encoded = text.partition(separator)
        size = DIGEST_SIZES.get(algorithm)
        if size is None:
            known = ", ".join(DIGEST_SIZES)
            raise PathInfoError(
                f"hash {text!r}: does not begin with one of {known}", rule="invalid-algo"
            )
        decode = _decode if separator == ":" else _decode_unpadded
        try:
            digest = decode(encoded, size)
        except (ValueError, binascii.Error) as exc:
            raise PathInfoError(f"hash {text!r}: {exc}", rule="invalid-hash-encoding") from exc
        if len(digest) != size:
            raise PathInfoError(
                f"hash {text!r}: {algorithm} digest has {len(digest)} bytes, expected {size}",
                rule="invalid-digest-length",
            )
        return cls(algorithm, digest)

    def sri(self) -> str:
        """Return the form ALGORITHM-TEXT, in padded base 64."""
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
    # In this form Nix ignores bits past the last byte, and accepts any padding.
    return base64.b64decode(text.rstrip("=") + "=" * (-size % 3), validate=True)


# --- Hashing content that contains its own store path ---
#
# The digest part of a path cannot depend on itself, so wherever it occurs in the content, zeros are
# hashed in its place. Older Nix (2.8, for one) also hashes the places, after all content: for each
# of them `|` and its offset in decimal.


class ContentHash:
    """Hashes content that may contain the digest part of the path `itself`.

    Args:
        algorithm: one of `DIGEST_SIZES`.
        itself: the path whose digest part counts as zeros; None if the content has no such path.
    """

    def __init__(self, algorithm: str, itself: StorePath | None = None) -> None:
        self._hasher: Final = hashlib.new(algorithm, usedforsecurity=False)
        self._sought: Final = encode_base32(itself.digest).encode() if itself else b""
        self._offsets: list[int] = []
        # The end of the content, in which the digest part may begin: not hashed yet. Its offset.
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
        # Keep one byte less than the digest part has, so it is found across two pieces.
        end = max(0, len(content) - size + 1)
        self._hasher.update(content[:end])
        self._tail = content[end:]
        self._tail_at += end

    def digests(self) -> tuple[bytes, bytes]:
        """Return the digest without the places of the path, and the one with them."""
        hasher = self._hasher.copy()
        hasher.update(self._tail)
        without_places = hasher.digest()
        for offset in self._offsets:
            hasher.update(b"|%d" % offset)
        return without_places, hasher.digest()
