"""Trees to import, and helpers for tests of imports."""

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

DEADLINE_S: Final = 120
# Sizes around the limits of inline blobs and of one piece, in bytes.
SIZES: Final = (0, 1, 65535, 65536, 65537, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3_500_000)
_FANOUT: Final = 99


class Silent:
    """Shows no progress."""

    def update(self, *, num_files: int, num_bytes: int, path: str) -> None:
        """Ignore the arguments."""


def make_varied_tree(top: Path) -> Path:
    """Make a tree with everything that can be imported."""
    top.mkdir()
    for size in SIZES:
        (top / f"size{size}").write_bytes(random.Random(size).randbytes(size))
    for name in ["a", "a-b", "a.b", "ab", "A", "Ä", ".hidden", "n" * 255]:
        (top / name).write_bytes(b"the same in all")
    (top / "executable").write_bytes(b"#!/bin/sh\n")
    (top / "executable").chmod(0o755)
    (top / "for-the-group").write_bytes(b"#!/bin/sh\n")
    (top / "for-the-group").chmod(0o654)
    (top / "empty").mkdir()
    (top / "a-dir" / "deeper" / "deepest").mkdir(parents=True)
    (top / "a-dir" / "deeper" / "deepest" / "file").write_bytes(b"at the bottom")
    (top / "a-dir" / "link").symlink_to("deeper/deepest")
    (top / "dangling").symlink_to("/nowhere/" + "x" * 100)
    os.close(os.open(os.fsencode(top) + b"/\xff\xfe\n", os.O_CREAT | os.O_WRONLY))
    return top


def make_many_files(top: Path, *, num_small: int, num_large: int) -> Path:
    """Make a tree of small and large files with different contents."""
    top.mkdir()
    noise = random.Random(num_small)
    for number in range(num_small):
        directory = top / f"dir{number % 50:02}"
        directory.mkdir(exist_ok=True)
        (directory / f"small{number}").write_bytes(noise.randbytes(noise.randrange(9000)))
    for number in range(num_large):
        (top / f"large{number}").write_bytes(noise.randbytes(noise.randrange(70_000, 3_000_000)))
    return top


def make_sparse(path: Path, size: int) -> None:
    """Make a file of `size` zeros that takes no space on the disk."""
    with path.open("wb") as file:
        file.truncate(size)


def nix_path(tree: Path, root: Path) -> str:
    """Return the store path of `tree` as Nix has it, with a temporary store below `root`."""
    command: list[str | Path] = ["nix-store", "--store", f"local?root={root}", "--add", tree]
    done = subprocess.run(command, check=True, capture_output=True, timeout=DEADLINE_S)
    return done.stdout.decode().strip()


def start_import(store: Path, *paths: Path) -> "subprocess.Popen[bytes]":
    """Start the command. Its stdout is a pipe that all its processes keep open."""
    return subprocess.Popen(
        import_command(store, *paths), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def import_command(store: Path, *paths: Path) -> list[str | Path]:
    """Return the command that imports `paths`."""
    return [sys.executable, "-m", "appliance", "import", "--store", f"lmdb://{store}", *paths]


def make_directories(top: Path, num_directories: int) -> None:
    """Make a tree of `num_directories` directories with different contents."""
    num_made = 0
    while num_made < num_directories:
        parent = top / f"{num_made}"
        parent.mkdir(parents=True)
        num_leaves = min(_FANOUT, num_directories - num_made - 1)
        for leaf in range(num_leaves):
            directory = parent / str(leaf)
            directory.mkdir()
            (directory / "link").symlink_to(f"{num_made}-{leaf}")
        num_made += 1 + num_leaves


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    """Mount a disk of `size` at `path`."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)
