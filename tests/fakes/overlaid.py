"""Overlays of the kernel on a mount and on an ordinary directory, to be held against each other."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

# Of mount(8) for overlayfs; in each, another of its ways to tell inodes apart is at work.
OPTIONS: Final = (
    "plain",
    "index=on",
    "metacopy=on",
    "xino=on",
    "index=on,nfs_export=on",
    "userxattr",
)
# From Linux 6.16 on, fs/fuse/dir.c (fuse_dentry_revalidate) takes every dentry that came from a
# file handle for one of an earlier epoch, without asking. Overlayfs, which finds by handles what a
# file was copied from, would then say ESTALE of it; so no handles are offered to such a kernel:
# they are good only as long as the inode is in memory.
HANDLES_AIL: Final = tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 16)
AILING: Final = "handles-first"
# What `overlay make` makes, beside each other.
PACKAGES: Final = ("one", "other")
NUM_SCENARIOS: Final = 45
NUM_READING: Final = 5


def outcomes(output: bytes) -> dict[str, str]:
    """Return what the program vm-tests/guest/overlay.c wrote: outcomes by option and scenario."""
    words = [line.split(" ", 2) for line in output.decode().splitlines()]
    return {f"{option} {name}": outcome for option, name, outcome in words}


def failures(found: dict[str, str]) -> dict[str, str]:
    """Return the scenarios in which something changed that must not."""
    return {name: outcome for name, outcome in found.items() if "FAILED" in outcome}


@contextlib.contextmanager
def overlay(lower: Path, directory: Path, options: str = "plain") -> Iterator[Path]:
    """Mount an overlay of `lower` in `directory`, which is new, with its upper half in a tmpfs."""
    (directory / "merged").mkdir(parents=True)
    (directory / "over").mkdir()
    _run("mount", "-t", "tmpfs", "tmpfs", directory / "over")
    try:
        for name in ("upper", "work"):
            (directory / "over" / name).mkdir()
        words = [
            f"lowerdir={lower}",
            f"upperdir={directory}/over/upper",
            f"workdir={directory}/over/work",
            *([] if options == "plain" else [options]),
        ]
        _run("mount", "-t", "overlay", "overlay", "-o", ",".join(words), directory / "merged")
        try:
            yield directory / "merged"
        finally:
            _run("umount", directory / "merged")
    finally:
        _run("umount", directory / "over")


def _run(*command: str | os.PathLike[str]) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, (command, done.stderr)
