"""What is imported: a path, and the directory below which all of it is opened."""

import errno
import os
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple, TypeAlias

from appliance.castore.names import display

# Device and inode.
Identity: TypeAlias = tuple[int, int]

CHANGED: Final = "changed while it was read"

_DIRECTORY_FLAGS: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
# A symlink or a file is where another kind of entry was listed.
_CHANGED_ERRNOS: Final = frozenset({errno.ELOOP, errno.ENOTDIR, errno.EXDEV, errno.EINVAL})


class Root(NamedTuple):
    """A path to import, and the name that its store path gets."""

    path: bytes
    name: str


class OpenRoot(NamedTuple):
    """An open directory: the one to import, or the one that has the file or symlink to import.

    Nothing above it is looked up again, so what becomes of the directories that lead to it does not
    matter.
    """

    # A descriptor that only stands for it.
    directory: int
    identity: Identity
    # What it was opened by: empty for the working directory, else with a slash at its end.
    prefix: bytes
    # Name of the file or symlink; empty if the directory is what is imported.
    entry: bytes

    def describe(self, path: bytes) -> str:
        """Return `path`, relative to the directory, for a message."""
        return display((self.prefix + path).rstrip(b"/") or b"/")

    def close(self) -> None:
        """Close the directory."""
        os.close(self.directory)


def identity_of(status: os.stat_result) -> Identity:
    """Return what tells a file from all others."""
    return status.st_dev, status.st_ino


def open_directory(prefix: bytes) -> int:
    """Open a directory by its `OpenRoot.prefix`, for a descriptor that only stands for it.

    Raises:
        OSError: it cannot be opened.
    """
    return os.open(prefix or b".", _DIRECTORY_FLAGS)


def reason(error: OSError) -> str:
    """Say why something in a tree, listed a moment ago, cannot be opened or read."""
    return CHANGED if error.errno in _CHANGED_ERRNOS else os.strerror(error.errno or 0)


# --- Which of the paths to import are the same, or lie in one another ---


class Overlaps:
    """The paths of one import.

    They are told apart without the symlinks on the way to them; a path that is one stays one.
    """

    def __init__(self, roots: Sequence[Root]) -> None:
        # One path is like no other, and need not be looked at.
        resolve = _resolved if len(roots) > 1 else bytes
        self._paths = [resolve(root.path) for root in roots]
        self._given = {path: root.path for path, root in zip(self._paths, roots, strict=True)}
        self._outermost: dict[bytes, bytes] = {}
        self._parts: dict[bytes, set[bytes]] = {path: set() for path in self._given}
        for path in self._given:
            outermost = next((above for above in _downwards(path) if above in self._given), path)
            self._outermost[path] = outermost
            if path != outermost:
                self._parts[outermost].add(path.removeprefix(outermost).lstrip(b"/"))

    def path(self, index: int) -> bytes:
        """Return what tells the root of this number from others."""
        return self._paths[index]

    def given(self, path: bytes) -> bytes:
        """Return `path` as the user calls it."""
        return self._given[path]

    def outermost(self, path: bytes) -> bytes:
        """Return `path`, or of all paths that it lies in the one that lies in none."""
        return self._outermost[path]

    def parts(self, path: bytes) -> set[bytes]:
        """Return, relative to the outermost `path`, the paths that lie in it."""
        return self._parts[path]


def _resolved(path: bytes) -> bytes:
    parent, _, name = path.rpartition(b"/")
    if not parent:
        parent = b"/" if path.startswith(b"/") else b"."
    return os.path.realpath(parent).rstrip(b"/") + b"/" + name


def _downwards(path: bytes) -> Iterator[bytes]:
    """Yield the directories that `path` lies in, outermost first."""
    end = path.find(b"/")
    while end >= 0:
        yield path[:end] or b"/"
        end = path.find(b"/", end + 1)
