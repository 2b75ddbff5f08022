"""Hashes for content addresses, also of what refers to its own path, as Nix has them.

The digest part of a path cannot follow from itself, so in the content it counts as zeros. Older Nix
(2.8 does) hashes its places too, after all content: for each, `|` and the offset in decimal.
"""

import hashlib
from typing import Final

from appliance.castore import nixbase32
from appliance.castore.store_path import StorePath


class ContentHash:
    """The hash, by an algorithm of `NixHash`, of content that may refer to `itself`."""

    def __init__(self, algorithm: str, itself: StorePath | None = None) -> None:
        self._hasher: Final = hashlib.new(algorithm, usedforsecurity=False)
        self._sought: Final = nixbase32.encode(itself.digest).encode() if itself else b""
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
