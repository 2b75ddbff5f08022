"""The paths to import: how each is opened, and which of them lie in one another."""

import errno
import os
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple, TypeAlias

from appliance.castore.names import display

# Device and inode number.
Identity: TypeAlias = tuple[int, int]

# Error message for a file that changed during the import.
CHANGED: Final = "changed while it was read"

_DIRECTORY_FLAGS: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
# What opening or reading an entry fails with if it has been replaced by one of another kind.
_CHANGED_ERRNOS: Final = frozenset({errno.ELOOP, errno.ENOTDIR, errno.EXDEV, errno.EINVAL})


class Root(NamedTuple):
    """A path to import, and the name to give to its store path."""

    path: bytes
    name: str


class OpenRoot(NamedTuple):
    """The open directory to import, or the one that holds the file or symlink to import.

    Everything is opened relative to it, so it does not matter if the directories above it are
    renamed or replaced during the import.
    """

    # An O_PATH descriptor, which `close` closes.
    directory: int
    identity: Identity
    # The path that it was opened by: empty for the working directory, else it ends with a slash.
    prefix: bytes
    # Name of the file or symlink to import; empty if the directory itself is imported.
    entry: bytes

    def describe(self, path: bytes) -> str:
        """Return the path that the user knows `path` by, for a message.

        Args:
            path: a path relative to the directory.
        """
        return display((self.prefix + path).rstrip(b"/") or b"/")

    def close(self) -> None:
        """Close the directory."""
        os.close(self.directory)


def identity_of(status: os.stat_result) -> Identity:
    """Return what identifies a file on this machine while it exists."""
    return status.st_dev, status.st_ino


def open_directory(prefix: bytes) -> int:
    """Open a directory by its `OpenRoot.prefix`; return an O_PATH descriptor.

    Raises:
        OSError: the directory cannot be opened.
    """
    return os.open(prefix or b".", _DIRECTORY_FLAGS)


def reason(error: OSError) -> str:
    """Return the reason why an entry that was listed a moment ago cannot be opened or read."""
    return CHANGED if error.errno in _CHANGED_ERRNOS else os.strerror(error.errno or 0)


# --- Paths that are the same, or lie in one another ---


class Overlaps:
    """Finds which paths of an import are the same, and which lie in others.

    Paths are compared after resolving the symlinks in their parents. A path that is itself a
    symlink is not resolved, as the symlink is what is imported.
    """

    def __init__(self, roots: Sequence[Root]) -> None:
        # A single path has nothing to be compared with, and is not resolved.
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
        """Return the resolved path of the root of this index."""
        return self._paths[index]

    def given(self, path: bytes) -> bytes:
        """Return the resolved `path` as the user gave it."""
        return self._given[path]

    def outermost(self, path: bytes) -> bytes:
        """Return the outermost of the paths that `path` lies in, or `path` itself."""
        return self._outermost[path]

    def parts(self, path: bytes) -> set[bytes]:
        """Return the paths that lie in the outermost `path`, relative to it."""
        return self._parts[path]


def _resolved(path: bytes) -> bytes:
    parent, _, name = path.rpartition(b"/")
    if not parent:
        parent = b"/" if path.startswith(b"/") else b"."
    return os.path.realpath(parent).rstrip(b"/") + b"/" + name


def _downwards(path: bytes) -> Iterator[bytes]:
    """Yield the directories above `path`, outermost first."""
    end = path.find(b"/")
    while end >= 0:
        yield path[:end] or b"/"
        end = path.find(b"/", end + 1)
