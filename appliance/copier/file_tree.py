"""A tree of the file system, as the events of its NAR.

The rules are those of an import: everything below the root is opened from one descriptor, and no
symlink is followed.
"""

import os
import stat
from collections.abc import Generator
from typing import Final

from appliance.copier.ingest import LocalFile, TreeEvent
from appliance.errors import ImportTreeError
from appliance.importer.beneath import open_beneath
from appliance.importer.roots import CHANGED, OpenRoot, reason
from appliance.importer.walk import Step, open_root, walk
from appliance.nix.nar import (
    ContentRead,
    DirectoryEndRead,
    DirectoryRead,
    EntryRead,
    FileRead,
    SymlinkRead,
)

_PIECE_SIZE: Final = 1 << 18
# A file may have been replaced by a FIFO since it was listed; opening that must not block.
_FLAGS: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY


def tree_events(path: bytes) -> Generator[TreeEvent, None, None]:
    """Yield the tree at `path`, which may be a file or symlink too.

    Raises:
        ImportTreeError: an entry cannot be read, or is neither file, directory nor symlink.
    """
    root = open_root(path)
    try:
        for step, name, detail in walk(root):
            if name:
                yield EntryRead(name)
            match step:
                case Step.FILE:
                    directory = b"%b/" % detail if detail else b""
                    yield from _file_events(root, directory + (name or root.entry))
                case Step.SYMLINK:
                    yield SymlinkRead(detail)
                case Step.DIRECTORY:
                    yield DirectoryRead()
                case Step.END_DIRECTORY:
                    yield DirectoryEndRead()
    finally:
        root.close()


def _file_events(root: OpenRoot, path: bytes) -> Generator[TreeEvent, None, None]:
    try:
        fd = open_beneath(root.directory, path, _FLAGS)
        try:
            yield from _read(root, path, fd)
        finally:
            os.close(fd)
    except OSError as exc:
        raise ImportTreeError(f"{_describe(root, path)}: {reason(exc)}") from exc


def _read(root: OpenRoot, path: bytes, fd: int) -> Generator[TreeEvent, None, None]:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise ImportTreeError(f"{_describe(root, path)}: {CHANGED}")
    local = LocalFile(fd, status.st_size)
    yield local
    yield FileRead(status.st_size, bool(status.st_mode & stat.S_IXUSR))
    left = status.st_size
    while left:
        data = os.read(local.fd, min(left, _PIECE_SIZE))
        if not data:
            raise ImportTreeError(f"{_describe(root, path)}: {CHANGED}")
        left -= len(data)
        yield ContentRead(data)


def _describe(root: OpenRoot, path: bytes) -> str:
    return root.describe(path)
