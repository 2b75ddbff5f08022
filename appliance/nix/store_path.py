"""Store paths: their base 32, their grammar, and how content-addressed ones are computed.

A path is `/nix/store/`, a digest of 20 bytes in base 32, `-`, and a name.
"""

import re
from collections.abc import Sequence
from typing import Final, NamedTuple

from appliance.errors import PathInfoError

STORE_DIR: Final = "/nix/store"
DIGEST_SIZE: Final = 20
NAME_MAX: Final = 211

# Nix reads the bytes as one little-endian number and writes it in groups of five bits, the most
# significant group first.
BASE32_ALPHABET: Final = "0123456789abcdfghijklmnpqrsvwxyz"

_BASE32_VALUES: Final = {character: value for value, character in enumerate(BASE32_ALPHABET)}
_BAD_CHARACTER: Final = re.compile(r"[^A-Za-z0-9+\-._?=]", re.ASCII)

# --- Base 32 ---


def base32_size(size: int) -> int:
    """Return the number of characters that encode `size` bytes."""
    return (size * 8 + 4) // 5


def encode_base32(data: bytes) -> str:
    """Return `data` in the base 32 of Nix."""
    bits = int.from_bytes(data, "little")
    groups = range(base32_size(len(data)) - 1, -1, -1)
    return "".join(BASE32_ALPHABET[bits >> 5 * group & 31] for group in groups)


def decode_base32(text: str) -> bytes:
    """Return the bytes that `text` encodes.

    Raises:
        ValueError: `text` has a character outside the alphabet, an impossible length, or bits past
            the last byte.
    """
    size = len(text) * 5 // 8
    if base32_size(size) != len(text):
        raise ValueError(f"{text!r}: no number of bytes encodes to {len(text)} characters")
    bits = 0
    for character in text:
        value = _BASE32_VALUES.get(character)
        if value is None:
            raise ValueError(f"{text!r}: {character!r} is not in the alphabet")
        bits = bits << 5 | value
    if bits >> 8 * size:
        raise ValueError(f"{text!r}: has bits past the last byte")
    return bits.to_bytes(size, "little")


# --- Grammar ---

_DIGEST_CHARS: Final = base32_size(DIGEST_SIZE)


class StorePathError(PathInfoError):
    """A text is not a store path, or no store path can be computed; `rule` says why."""


class StorePath(NamedTuple):
    """A store path. `parse` and the functions of this module return valid ones only."""

    digest: bytes
    name: str

    @classmethod
    def parse(cls, basename: str | bytes) -> "StorePath":
        """Read the base name of a store path.

        Raises:
            StorePathError: the text breaks a rule; `rule` says which.
        """
        text = basename if isinstance(basename, str) else basename.decode("latin-1")
        if len(text) < _DIGEST_CHARS + 2:
            raise StorePathError(f"{text!r}: too short for a store path", rule="invalid-length")
        try:
            digest = decode_base32(text[:_DIGEST_CHARS])
        except ValueError as exc:
            raise StorePathError(f"{text!r}: {exc}", rule="invalid-hash-encoding") from exc
        if text[_DIGEST_CHARS] != "-":
            raise StorePathError(f"{text!r}: no dash after the digest", rule="missing-dash")
        return cls(digest, check_name(text[_DIGEST_CHARS + 1 :]))

    @classmethod
    def parse_absolute(cls, path: str) -> "StorePath":
        """Read an absolute store path.

        Raises:
            StorePathError: the text breaks a rule; `rule` says which.
        """
        prefix = STORE_DIR + "/"
        if not path.startswith(prefix):
            raise StorePathError(
                f"{path!r}: does not begin with {prefix}", rule="missing-store-dir"
            )
        return cls.parse(path.removeprefix(prefix))

    def basename(self) -> str:
        """Return the digest and the name, without the store directory."""
        return f"{encode_base32(self.digest)}-{self.name}"

    def absolute(self) -> str:
        """Return the path, with the store directory."""
        return f"{STORE_DIR}/{self.basename()}"


def check_name(name: str) -> str:
    """Return `name` if a store path may have it.

    Raises:
        StorePathError: a store path may not have it.
    """
    if not 1 <= len(name) <= NAME_MAX:
        raise StorePathError(
            f"{name!r}: has {len(name)} characters, expected 1 to {NAME_MAX}",
            rule="invalid-length",
        )
    if bad := _BAD_CHARACTER.search(name):
        raise StorePathError(
            f"{name!r}: character {bad[0]!r} at {bad.start()} is not allowed", rule="invalid-name"
        )
    return name


def check_new_name(name: str) -> str:
    """Return `name` if a new store path may have it.

    This is stricter than `check_name`: Nix refuses names whose first dash-separated part is `.` or
    `..`, but such paths exist.

    Raises:
        StorePathError: a new store path may not have it.
    """
    check_name(name)
    if name.split("-", 1)[0] in {".", ".."}:
        raise StorePathError(f"{name!r}: begins with a part that is . or ..", rule="invalid-name")
    return name


# --- Computation ---


def compress(digest: bytes, size: int = DIGEST_SIZE) -> bytes:
    """Fold `digest` to `size` bytes with exclusive or."""
    folded = bytearray(size)
    for index, value in enumerate(digest):
        folded[index % size] ^= value
    return bytes(folded)


def path_of(kind: str, inner_sha256: bytes, name: str) -> StorePath:
    """Return the path whose fingerprint has this kind, e.g. `source` or `output:out`.

    Raises:
        StorePathError: a store path may not have this name.
    """
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
    """Return the path of a tree, given the SHA-256 of its NAR.

    The order of the references matters.
    """
    kind = _with_references("source", references) + (":self" if has_self_reference else "")
    return path_of(kind, nar_sha256, name)


def text_path(contents: bytes, name: str, references: Sequence[StorePath] = ()) -> StorePath:
    """Return the path of a text, given the text. The order of the references matters."""
    return text_path_by_digest(_sha256(contents), name, references)


def text_path_by_digest(
    sha256: bytes, name: str, references: Sequence[StorePath] = ()
) -> StorePath:
    """Return the path of a text, given its SHA-256. The order of the references matters."""
    return path_of(_with_references("text", references), sha256, name)


def fixed_output_path(
    algorithm: str,
    digest: bytes,
    name: str,
    *,
    is_recursive: bool,
    references: Sequence[StorePath] = (),
) -> StorePath:
    """Return the path of a fixed output, given the digest of its NAR or of its one flat file.

    Args:
        algorithm: the algorithm of `digest`.
        digest: the digest of the NAR if `is_recursive`, else of the file.
        name: the name of the path.
        is_recursive: whether the NAR was hashed.
        references: in the order that matters to Nix; only a NAR hashed with SHA-256 may have any.

    Raises:
        StorePathError: there are references, but this is not a NAR hashed with SHA-256
            (rule `invalid-reference`), or a store path may not have this name.
    """
    if is_recursive and algorithm == "sha256":
        return nar_path(digest, name, references)
    if references:
        raise StorePathError(
            f"{name!r}: only a NAR hashed with sha256 may have references",
            rule="invalid-reference",
        )
    method = "r:" if is_recursive else ""
    inner = _sha256(f"fixed:out:{method}{algorithm}:{digest.hex()}:".encode())
    return path_of("output:out", inner, name)


def placeholder(output: str) -> str:
    """Return the text that stands for the path of `output` until that path is known."""
    return "/" + encode_base32(_sha256(f"nix-output:{output}".encode()))


def _with_references(kind: str, references: Sequence[StorePath]) -> str:
    return ":".join([kind, *(reference.absolute() for reference in references)])


def _sha256(data: bytes) -> bytes:
    import hashlib  # noqa: PLC0415 - slow to load, and most programs compute no store path

    return hashlib.sha256(data).digest()
