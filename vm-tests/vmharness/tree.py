"""The host's twin of `probe hash` and `probe tree-digest`: the same records, byte for byte.

Format: guest/probe.c. A normalised record leaves out what equal stores may differ in: every link
count is 1, the size of a directory 0, and the mode 0555 for directories and executable files, 0444
for other files, 0777 for symlinks.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

_LETTERS: Final = {stat.S_IFREG: "f", stat.S_IFDIR: "d", stat.S_IFLNK: "l"}


class TreeDigest(NamedTuple):
    """What `probe tree-digest` prints."""

    digest: str
    entries: int
    files: int
    size_bytes: int
    errors: int

    @classmethod
    def parse(cls, line: bytes) -> "TreeDigest":
        """Return the value behind one line of the probe's output."""
        digest, *fields = line.decode().split()
        return cls(digest, *(int(field.partition("=")[2]) for field in fields))


def records(directory: Path, *, is_normalised: bool = False) -> list[bytes]:
    """Return one record per entry below and including `directory`, in the order of the names."""
    root = os.fsencode(directory)
    return [
        _record(root, name, is_normalised=is_normalised)
        for name in sorted([b".", *_names_below(root, b"")])
    ]


def tree_digest(lines: list[bytes]) -> TreeDigest:
    """Return the summary of a tree's records."""
    fields = [line.split() for line in lines]
    sizes = [int(field[2]) for field in fields if field[0] == b"f"]
    errors = sum(field[5].startswith(b"!") for field in fields)
    digest = hashlib.sha256(b"".join(lines)).hexdigest()
    return TreeDigest(digest, len(lines), len(sizes), sum(sizes), errors)


def _names_below(root: bytes, prefix: bytes) -> Iterator[bytes]:
    with os.scandir(os.path.join(root, prefix)) as children:  # noqa: PTH118 -- names are bytes
        for child in children:
            name = prefix + child.name
            yield name
            if child.is_dir(follow_symlinks=False):
                yield from _names_below(root, name + b"/")


def _record(root: bytes, name: bytes, *, is_normalised: bool) -> bytes:
    path = os.path.join(root, name)  # noqa: PTH118 -- names are bytes
    found = os.lstat(path)
    kind = _LETTERS.get(stat.S_IFMT(found.st_mode), "?")
    mode, size, nlink = stat.S_IMODE(found.st_mode), found.st_size, found.st_nlink
    if is_normalised:
        mode, nlink = _normalised_mode(found.st_mode), 1
        size = 0 if kind == "d" else size
    fields = f"{kind} {mode:04o} {size} {nlink}".encode()
    return b"%s %s %s\n" % (fields, _escape(name), _content(path, kind))


def _normalised_mode(mode: int) -> int:
    if stat.S_ISLNK(mode):
        return 0o777
    return 0o555 if stat.S_ISDIR(mode) or mode & stat.S_IXUSR else 0o444


def _content(path: bytes, kind: str) -> bytes:
    try:
        if kind == "f":
            with open(path, "rb") as file:  # noqa: PTH123 -- names are bytes
                return hashlib.file_digest(file, "sha256").hexdigest().encode()
        if kind == "l":
            return _escape(os.readlink(path))  # noqa: PTH115 -- names are bytes
    except OSError as exc:
        return b"!%d" % (exc.errno or errno.EIO)
    return b"-"


def _escape(name: bytes) -> bytes:
    return b"".join(
        bytes((byte,)) if 0x20 < byte < 0x7F and byte != ord("\\") else b"\\x%02x" % byte
        for byte in name
    )
