"""The tokens of a NAR.

    str(s)  = length of s as u64 LE, s, zeros up to a multiple of 8
    archive = str("nix-archive-1") node
    node    = str("(") str("type") body str(")")
    body    = str("symlink")   str("target") str(target)
            | str("regular")   [ str("executable") str("") ] str("contents") str(data)
            | str("directory") { str("entry") str("(") str("name") str(name)
                                 str("node") node str(")") }

Entries are sorted by name, bytewise. The constants below are the runs of tokens between the
variable parts.
"""

import struct
from typing import Final

_LENGTH: Final = struct.Struct("<Q")

# Zeros that follow a string, by the last three bits of its length.
PADDING: Final = tuple(bytes(-size % 8) for size in range(8))


def length(size: int) -> bytes:
    """Return the token that precedes a string of `size` bytes."""
    return _LENGTH.pack(size)


def string(value: bytes) -> bytes:
    """Return `value` with its length and padding."""
    return b"".join((_LENGTH.pack(len(value)), value, PADDING[len(value) & 7]))


def _run(*tokens: bytes) -> bytes:
    return b"".join(map(string, tokens))


HEADER: Final = _run(b"nix-archive-1", b"(", b"type")
DIRECTORY: Final = _run(b"directory")
SYMLINK: Final = _run(b"symlink", b"target")
REGULAR: Final = _run(b"regular", b"contents")
EXECUTABLE: Final = _run(b"regular", b"executable", b"", b"contents")
ENTRY: Final = _run(b"entry", b"(", b"name")
NODE: Final = _run(b"node", b"(", b"type")
CLOSE: Final = _run(b")")
# Ends the node of an entry and the entry.
CLOSE_ENTRY: Final = CLOSE + CLOSE
