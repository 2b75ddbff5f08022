"""Trees for guests to read: of everything a little, numbered files, very many, a very large one."""

import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

MODES: Final = ("read", "mmap", "direct", "sendfile")

_PAGE: Final = 4096
_KIB: Final = 1 << 10
_MIB: Final = 1 << 20
_DEPTH: Final = 200
_LONGEST_NAME: Final = 255
_LONGEST_TARGET: Final = 4095
# around what the store keeps inline, around one READ of the page cache and the largest READ
_SIZES: Final = (
    *(1, _PAGE - 1, _PAGE, _PAGE + 1),
    *(64 * _KIB - 1, 64 * _KIB, 64 * _KIB + 1, 128 * _KIB + 1),
    *(_MIB - 1, _MIB, _MIB + 1, 3 * _MIB + 17),
)
_NAMES: Final = (
    b"n" * _LONGEST_NAME,
    b"\xff" * _LONGEST_NAME,
    b"not \xc3\x28 UTF-8 \xfe",
    "\N{SNOWMAN}".encode(),
    b" ",
    b"line\nfeed",
    b"back\\slash",
    b"-n",
    b"...",
    b"\x01\x7f",
)
_FLAT_FILES: Final = 50_000
_FILES_PER_DIRECTORY: Final = 100
_DIRECTORIES: Final = {"mmap": 170, "direct": 170, "sendfile": 160}
MANY_FILES: Final = _FLAT_FILES + _FILES_PER_DIRECTORY * sum(_DIRECTORIES.values())

LARGE_SIZE: Final = (2 << 30) + 12_345  # beyond what a signed 32-bit offset reaches
PIECE_SIZE: Final = 2 * _PAGE
_BORDERS: Final = (
    *(64 * _KIB, 128 * _KIB, _MIB - 64 * _KIB, _MIB, _MIB + 64 * _KIB, 2 * _MIB),
    *(1 << 30, (2 << 30) - _MIB, (2 << 30) - 64 * _KIB, 2 << 30),
)
# where a piece is: across each border, at the start, and from a page border to the end
PIECE_OFFSETS: Final = (
    0,
    *(border - _PAGE for border in _BORDERS),
    LARGE_SIZE // _PAGE * _PAGE - _PAGE,
)


def build_numbered(
    directory: Path, num_directories: int, num_files: int, large: Mapping[str, int]
) -> None:
    """Make directories 0, 1 and so on, with files 0, 1 and so on, each larger than the last.

    Args:
        directory: is made.
        num_directories: how many; each has a link to the first file, too.
        num_files: how many in each of them.
        large: names of files beside the directories, and their sizes.
    """
    random_bytes = random.Random(3).randbytes
    for index in range(num_directories):
        leaf = directory / str(index)
        leaf.mkdir(parents=True)
        for number in range(num_files):
            (leaf / str(number)).write_bytes(random_bytes(number * 500))
        (leaf / "link").symlink_to(f"../{index}/0")
    for name, size in large.items():
        (directory / name).write_bytes(random_bytes(size))


def build_varied(directory: Path) -> None:
    """Make a small tree of everything that a tree may hold."""
    directory.mkdir()
    (directory / "empty").mkdir()
    (directory / "nothing").touch()
    (directory / "nothing either").touch()
    sizes = directory / "sizes"
    sizes.mkdir()
    source = random.Random(1)
    for size in _SIZES:
        (sizes / str(size)).write_bytes(source.randbytes(size))
    names = directory / "names"
    names.mkdir()
    for name in _NAMES:
        (names / os.fsdecode(name)).write_bytes(name)
    for equal, mode in (("plain", 0o644), ("also plain", 0o600), ("script", 0o755)):
        (directory / equal).write_bytes(b"#!/bin/sh\necho run: $0\n")
        (directory / equal).chmod(mode)
    _build_symlinks(directory / "symlinks")
    _build_deep(directory / "deep")


def _build_symlinks(directory: Path) -> None:
    directory.mkdir()
    targets = {
        "absolute": b"/mnt/elsewhere",
        "dangling": b"no/such/target",
        "to a file": b"../plain",
        "to a directory": b"../names",
        "to itself": b"to itself",
        "bytes": b"\xff\\ \n",
        "longest": b"t" * _LONGEST_TARGET,
        "longest resolvable": b"/".join([b"."] * 2000) + b"/../plain",
    }
    for name, target in targets.items():
        (directory / name).symlink_to(os.fsdecode(target))


def _build_deep(directory: Path) -> None:
    for depth in range(_DEPTH):
        directory.mkdir()
        # a subtree that is like no other, and a file like those of every third level
        (directory / "file").write_bytes(b"at a depth of %d\n" % (depth % 3))
        directory /= "d"


def build_many(directory: Path) -> None:
    """Make MANY_FILES files below one directory for each of MODES; in "read" they lie side by side.

    All are small; some are empty and some have the content of others.
    """
    directory.mkdir()
    (directory / "read").mkdir()
    _build_files(directory / "read", 0, _FLAT_FILES)
    first = _FLAT_FILES
    for mode, num in _DIRECTORIES.items():
        (directory / mode).mkdir()
        for index in range(num):
            leaf = directory / mode / f"{index:03}"
            leaf.mkdir()
            _build_files(leaf, first, _FILES_PER_DIRECTORY)
            first += _FILES_PER_DIRECTORY


def _build_files(directory: Path, first: int, num: int) -> None:
    directory_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    for index in range(first, first + num):
        fd = os.open(b"%06d" % index, flags, 0o644, dir_fd=directory_fd)
        os.write(fd, b"%d\n" % (index // 2 * 2) * (index // 2 % 20))
        os.close(fd)
    os.close(directory_fd)


def build_large(path: Path) -> None:
    """Make a file of LARGE_SIZE bytes, all zeros but for the pieces at PIECE_OFFSETS."""
    source = random.Random(2)
    with path.open("xb") as file:
        file.truncate(LARGE_SIZE)
        for offset in PIECE_OFFSETS:
            file.seek(offset)
            file.write(source.randbytes(min(PIECE_SIZE, LARGE_SIZE - offset)))


def pieces(path: Path) -> Iterator[bytes]:
    """Yield the bytes of each piece of what `build_large` has made."""
    with path.open("rb") as file:
        for offset in PIECE_OFFSETS:
            file.seek(offset)
            yield file.read(PIECE_SIZE)
