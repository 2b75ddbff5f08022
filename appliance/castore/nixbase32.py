"""The base 32 of Nix: little-endian groups of five bits, most significant first."""

from typing import Final

ALPHABET: Final = "0123456789abcdfghijklmnpqrsvwxyz"

_VALUES: Final = {character: value for value, character in enumerate(ALPHABET)}


def encoded_size(size: int) -> int:
    """Return the number of characters for `size` bytes."""
    return (size * 8 + 4) // 5


def encode(data: bytes) -> str:
    """Return the text of `data`."""
    bits = int.from_bytes(data, "little")
    groups = range(encoded_size(len(data)) - 1, -1, -1)
    return "".join(ALPHABET[bits >> 5 * group & 31] for group in groups)


def decode(text: str) -> bytes:
    """Return the bytes of `text`.

    Raises:
        ValueError: a character outside the alphabet, an impossible length, or bits past the
            last byte.
    """
    size = len(text) * 5 // 8
    if encoded_size(size) != len(text):
        raise ValueError(f"{text!r}: no bytes encode to {len(text)} characters")
    bits = 0
    for character in text:
        value = _VALUES.get(character)
        if value is None:
            raise ValueError(f"{text!r}: {character!r} is not in the alphabet")
        bits = bits << 5 | value
    if bits >> 8 * size:
        raise ValueError(f"{text!r}: has bits past the last byte")
    return bits.to_bytes(size, "little")
