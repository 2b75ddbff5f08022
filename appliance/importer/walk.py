"""Walking a tree in the order of its NAR, without recursion and without following symlinks."""

import os
import stat
from collections.abc import Iterator
from enum import IntEnum
from operator import attrgetter
from typing import Final, NamedTuple

from appliance.castore.names import check_target
from appliance.errors import DirectoryError, ImportTreeError
from appliance.importer.long_paths import DIRECT_MAX, open_at, readlink


class Step(IntEnum):
    """What the walk has come to."""

    FILE = 0
    SYMLINK = 1
    DIRECTORY = 2
    # The directory's entries are all done.
    END_DIRECTORY = 3


class Event(NamedTuple):
    """One step of the walk; `detail` is the path of a file or the target of a symlink."""

    step: Step
    name: bytes
    detail: bytes


_KINDS: Final = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}
_END: Final = Event(Step.END_DIRECTORY, b"", b"")

_by_name = attrgetter("name")


def walk(root: bytes) -> Iterator[Event]:
    """Yield the steps of the tree `root`; the root itself comes with an empty name.

    Raises:
        ImportTreeError: something is neither file, directory nor symlink, or cannot be read.
    """
    mode = _lstat_mode(root)
    if not stat.S_ISDIR(mode):
        yield _leaf(mode, b"", root)
        return
    yield Event(Step.DIRECTORY, b"", root)
    stack = [(root, iter(_entries(root)))]
    while stack:
        path, entries = stack[-1]
        for name, mode in entries:
            child = b"%b/%b" % (path, name)
            if stat.S_ISREG(mode):
                yield Event(Step.FILE, name, child)
            elif stat.S_ISDIR(mode):
                yield Event(Step.DIRECTORY, name, child)
                stack.append((child, iter(_entries(child))))
                break
            else:
                yield _leaf(mode, name, child)
        else:
            yield _END
            stack.pop()


def display(path: bytes) -> str:
    """Return `path` for a message: one line that leaves a terminal alone, whatever the bytes."""
    text = path.decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def _leaf(mode: int, name: bytes, path: bytes) -> Event:
    if stat.S_ISREG(mode):
        return Event(Step.FILE, name, path)
    if stat.S_ISLNK(mode):
        return Event(Step.SYMLINK, name, _target(path))
    kind = _KINDS.get(stat.S_IFMT(mode), "of an unknown kind")
    raise ImportTreeError(
        f"{display(path)}: is {kind}; only files, directories and symlinks can be imported"
    )


def _target(path: bytes) -> bytes:
    try:
        return check_target(readlink(path))
    except OSError as exc:
        raise ImportTreeError(f"{display(path)}: {exc.strerror}") from exc
    except DirectoryError as exc:
        raise ImportTreeError(f"{display(path)}: {exc}") from exc


def _lstat_mode(path: bytes) -> int:
    try:
        return os.lstat(path).st_mode
    except OSError as exc:
        raise ImportTreeError(f"{display(path)}: {exc.strerror}") from exc


def _entries(path: bytes) -> list[tuple[bytes, int]]:
    """Return (name, mode with the type alone) of all entries, sorted."""
    try:
        if len(path) > DIRECT_MAX:
            return _entries_by_fd(path)
        with os.scandir(path) as entries:
            return [(entry.name, _type(entry)) for entry in sorted(entries, key=_by_name)]
    except OSError as exc:
        raise ImportTreeError(f"{display(path)}: {exc.strerror}") from exc


def _entries_by_fd(path: bytes) -> list[tuple[bytes, int]]:
    fd = open_at(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with os.scandir(fd) as entries:
            return sorted((os.fsencode(entry.name), _type(entry)) for entry in entries)
    finally:
        os.close(fd)


def _type(entry: os.DirEntry[bytes] | os.DirEntry[str]) -> int:
    # The first three cost no system call where the file system tells types in its listings.
    if entry.is_file(follow_symlinks=False):
        return stat.S_IFREG
    if entry.is_dir(follow_symlinks=False):
        return stat.S_IFDIR
    if entry.is_symlink():
        return stat.S_IFLNK
    return entry.stat(follow_symlinks=False).st_mode
