"""Signatures of store paths, as text: KEY-NAME `:` base 64."""

import base64
import binascii
import re
from typing import Final, NamedTuple

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
