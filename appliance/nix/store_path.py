"""Store paths: `/nix/store/` DIGEST `-` NAME, and the digests of content-addressed ones."""

import re
from collections.abc import Sequence
from typing import Final, NamedTuple

from appliance.errors import PathInfoError

STORE_DIR: Final = "/nix/store"
DIGEST_SIZE: Final = 20
NAME_MAX: Final = 211

# Nix writes groups of five bits, little-endian, the most significant first.
BASE32_ALPHABET: Final = "0123456789abcdfghijklmnpqrsvwxyz"

_BASE32_VALUES: Final = {character: value for value, character in enumerate(BASE32_ALPHABET)}
_BAD_CHARACTER: Final = re.compile(r"[^A-Za-z0-9+\-._?=]", re.ASCII)


def base32_size(size: int) -> int:
    """Return the number of characters for `size` bytes."""
    return (size * 8 + 4) // 5


def encode_base32(data: bytes) -> str:
    """Return the text of `data`."""
    bits = int.from_bytes(data, "little")
    groups = range(base32_size(len(data)) - 1, -1, -1)
    return "".join(BASE32_ALPHABET[bits >> 5 * group & 31] for group in groups)


def decode_base32(text: str) -> bytes:
    """Return the bytes of `text`.

    Raises:
        ValueError: a character outside the alphabet, an impossible length, or bits past the
            last byte.
    """
    size = len(text) * 5 // 8
    if base32_size(size) != len(text):
        raise ValueError(f"{text!r}: no bytes encode to {len(text)} characters")
    bits = 0
    for character in text:
        value = _BASE32_VALUES.get(character)
        if value is None:
            raise ValueError(f"{text!r}: {character!r} is not in the alphabet")
        bits = bits << 5 | value
    if bits >> 8 * size:
        raise ValueError(f"{text!r}: has bits past the last byte")
    return bits.to_bytes(size, "little")


_DIGEST_CHARS: Final = base32_size(DIGEST_SIZE)


class StorePathError(PathInfoError):
    """A text is not a store path."""


class InvalidLengthError(StorePathError):
    """Too short or too long."""


class InvalidHashEncodingError(StorePathError):
    """The digest is not nixbase32."""


class MissingDashError(StorePathError):
    """No dash between digest and name."""


class InvalidCharacterError(StorePathError):
    """The name has a character that is not allowed."""


class MissingStoreDirError(StorePathError):
    """An absolute path does not begin with the store directory."""


class InvalidReferenceError(StorePathError):
    """References were given for a kind of path that can have none."""


class StorePath(NamedTuple):
    """A store path; made by `parse` or one of the functions below it is valid."""

    digest: bytes
    name: str

    @classmethod
    def parse(cls, basename: str | bytes) -> "StorePath":
        """Read the base name of a store path.

        Raises:
            StorePathError: a rule is broken; its subclass says which.
        """
        text = basename if isinstance(basename, str) else basename.decode("latin-1")
        if len(text) < _DIGEST_CHARS + 2:
            raise InvalidLengthError(f"{text!r}: too short for a store path")
        try:
            digest = decode_base32(text[:_DIGEST_CHARS])
        except ValueError as exc:
            raise InvalidHashEncodingError(f"{text!r}: {exc}") from exc
        if text[_DIGEST_CHARS] != "-":
            raise MissingDashError(f"{text!r}: no dash after the digest")
        return cls(digest, check_name(text[_DIGEST_CHARS + 1 :]))

    @classmethod
    def parse_absolute(cls, path: str) -> "StorePath":
        """Read an absolute store path.

        Raises:
            StorePathError: a rule is broken; its subclass says which.
        """
        prefix = STORE_DIR + "/"
        if not path.startswith(prefix):
            raise MissingStoreDirError(f"{path!r}: does not begin with {prefix}")
        return cls.parse(path.removeprefix(prefix))

    def basename(self) -> str:
        """Return DIGEST-NAME."""
        return f"{encode_base32(self.digest)}-{self.name}"

    def absolute(self) -> str:
        """Return the path with the store directory."""
        return f"{STORE_DIR}/{self.basename()}"


def check_name(name: str) -> str:
    """Return `name` if a store path may have it.

    Raises:
        StorePathError: it may not.
    """
    if not 1 <= len(name) <= NAME_MAX:
        raise InvalidLengthError(f"{name!r}: a name has 1 to {NAME_MAX} characters")
    if bad := _BAD_CHARACTER.search(name):
        raise InvalidCharacterError(
            f"{name!r}: character {bad[0]!r} at {bad.start()} is not allowed"
        )
    return name


def check_new_name(name: str) -> str:
    """Return `name` if a new store path should have it.

    Nix refuses names whose first dash-separated part is `.` or `..`.

    Raises:
        StorePathError: it may not.
    """
    check_name(name)
    if name.split("-", 1)[0] in {".", ".."}:
        raise InvalidCharacterError(f"{name!r}: begins with a part that is . or ..")
    return name


def compress(digest: bytes, size: int = DIGEST_SIZE) -> bytes:
    """Fold a digest to `size` bytes with exclusive or."""
    folded = bytearray(size)
    for index, value in enumerate(digest):
        folded[index % size] ^= value
    return bytes(folded)


def path_of(kind: str, inner_sha256: bytes, name: str) -> StorePath:
    """Return the path of a fingerprint of `kind`, e.g. `source` or `output:out`."""
    check_name(name)
    fingerprint = f"{kind}:sha256:{inner_sha256.hex()}:{STORE_DIR}:{name}"
    return StorePath(compress(_sha256(fingerprint.encode())), name)


def nar_path(
    nar_sha256: bytes,
    name: str,
    references: Sequence[StorePath] = (),
    *,
    has_self_reference: bool = False,
) -> StorePath:
    """Return the path of a tree by the SHA-256 of its NAR; references in the order given."""
    kind = _with_references("source", references) + (":self" if has_self_reference else "")
    return path_of(kind, nar_sha256, name)


def text_path(contents: bytes, name: str, references: Sequence[StorePath] = ()) -> StorePath:
    """Return the path of a text; references in the order given."""
    return text_path_by_digest(_sha256(contents), name, references)


def text_path_by_digest(
    sha256: bytes, name: str, references: Sequence[StorePath] = ()
) -> StorePath:
    """Return the path of the text of that SHA-256; references in the order given."""
    return path_of(_with_references("text", references), sha256, name)


def fixed_output_path(
    algorithm: str,
    digest: bytes,
    name: str,
    *,
    is_recursive: bool,
    references: Sequence[StorePath] = (),
) -> StorePath:
    """Return the path of a fixed output: of a NAR if recursive, of a flat file otherwise.

    Raises:
        InvalidReferenceError: references, and not a NAR by SHA-256.
    """
    if is_recursive and algorithm == "sha256":
        return nar_path(digest, name, references)
    if references:
        raise InvalidReferenceError(f"{name!r}: only a NAR by sha256 may have references")
    method = "r:" if is_recursive else ""
    inner = _sha256(f"fixed:out:{method}{algorithm}:{digest.hex()}:".encode())
    return path_of("output:out", inner, name)


def placeholder(output: str) -> str:
    """Return the text that stands for the path of `output` before it is known."""
    return "/" + encode_base32(_sha256(f"nix-output:{output}".encode()))


def _with_references(kind: str, references: Sequence[StorePath]) -> str:
    return ":".join([kind, *(reference.absolute() for reference in references)])


def _sha256(data: bytes) -> bytes:
    import hashlib  # noqa: PLC0415 -- slow to load, and most programs compute no store path

    return hashlib.sha256(data).digest()
