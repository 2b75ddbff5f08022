"""BLAKE3 digests, which name blobs and directories."""

import base64
import binascii
from typing import Final, Self

from blake3 import blake3

from appliance.errors import DirectoryError

# In bytes.
DIGEST_SIZE: Final = 32

_TVIX_PREFIX: Final = "b3:"
_SRI_PREFIX: Final = "blake3-"


class Digest(bytes):
    """The 32 bytes of a BLAKE3 digest; `str` gives them in hexadecimal, as a store names files.

    Raises:
        DirectoryError: `value` does not have 32 bytes (rule `invalid-digest-len`).
    """

    __slots__ = ()

    def __new__(cls, value: bytes | memoryview) -> Self:
        """Copy `value`."""
        if len(value) != DIGEST_SIZE:
            raise DirectoryError(
                f"digest has {len(value)} bytes, expected {DIGEST_SIZE}", rule="invalid-digest-len"
            )
        return super().__new__(cls, value)

    @classmethod
    def of(cls, content: bytes | bytearray | memoryview) -> Self:
        """Return the digest of `content`."""
        return cls(blake3(content).digest())

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read either of the forms in base64, `b3:...` or `blake3-...`.

        Raises:
            DirectoryError: the text has neither prefix (rule `unknown-prefix`), is not base64
                (`invalid-encoding`), or does not encode 32 bytes (`invalid-digest-len`).
        """
        for prefix in (_TVIX_PREFIX, _SRI_PREFIX):
            if text.startswith(prefix):
                try:
                    return cls(base64.b64decode(text.removeprefix(prefix), validate=True))
                except binascii.Error as exc:
                    raise DirectoryError(
                        f"digest {text!r}: not base64", rule="invalid-encoding"
                    ) from exc
        raise DirectoryError(
            f"digest {text!r}: begins with neither b3: nor blake3-", rule="unknown-prefix"
        )

    def sri(self) -> str:
        """Return the form `blake3-...`, in base64."""
        return _SRI_PREFIX + base64.b64encode(self).decode()

    def tvix(self) -> str:
        """Return the form `b3:...`, in base64."""
        return _TVIX_PREFIX + base64.b64encode(self).decode()

    def __str__(self) -> str:
        return self.hex()

    def __repr__(self) -> str:
        return f"Digest({self})"


EMPTY_DIGEST: Final = Digest.of(b"")
