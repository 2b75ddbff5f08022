"""BLAKE3 digests, by which blobs and directories are named."""

import base64
import binascii
from typing import Final, Self

from blake3 import blake3

from appliance.errors import DirectoryError

DIGEST_SIZE: Final = 32

_TVIX_PREFIX: Final = "b3:"
_SRI_PREFIX: Final = "blake3-"


class InvalidDigestLenError(DirectoryError):
    """A digest is not 32 bytes long."""

    def __init__(self, size: int) -> None:
        super().__init__(f"a digest of {size} bytes, where {DIGEST_SIZE} are required")
        self.size = size


class Digest(bytes):
    """The 32 bytes of a BLAKE3 digest; as text hexadecimal, as the files of a store are named.

    Raises:
        InvalidDigestLenError: another number of bytes.
    """

    __slots__ = ()

    def __new__(cls, value: bytes | memoryview) -> Self:
        """Copy `value`."""
        if len(value) != DIGEST_SIZE:
            raise InvalidDigestLenError(len(value))
        return super().__new__(cls, value)

    @classmethod
    def of(cls, content: bytes | bytearray | memoryview) -> Self:
        """Return the digest of `content`."""
        return cls(blake3(content).digest())

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read either of the textual forms in base64.

        Raises:
            DirectoryError: neither prefix, not base64, or not 32 bytes.
        """
        for prefix in (_TVIX_PREFIX, _SRI_PREFIX):
            if text.startswith(prefix):
                try:
                    return cls(base64.b64decode(text.removeprefix(prefix), validate=True))
                except binascii.Error as exc:
                    raise DirectoryError(f"digest {text!r}: not base64") from exc
        raise DirectoryError(f"digest {text!r}: begins with neither b3: nor blake3-")

    def sri(self) -> str:
        """Return the form `blake3-` and base64."""
        return _SRI_PREFIX + base64.b64encode(self).decode()

    def tvix(self) -> str:
        """Return the form `b3:` and base64."""
        return _TVIX_PREFIX + base64.b64encode(self).decode()

    def __str__(self) -> str:
        return self.hex()

    def __repr__(self) -> str:
        return f"Digest({self})"


EMPTY_DIGEST: Final = Digest.of(b"")
