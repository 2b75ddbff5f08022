"""What is imported: a path, and the directory below which all of it is opened."""

import errno
import os
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
