"""Walks a tree in the order of its NAR, ahead of the import.

`list_directory` lists one directory, sorted. `walk` yields a tree as a sequence of steps, without
recursion and without following symlinks. `LookaheadWalk` takes the steps of a walk before they are
needed, and requests the files among them from the hashing processes.

A listed entry is one byte string: the name, a NUL, a letter for the kind, and the target if it is a
symlink. So a directory of a million entries takes little more memory than their names.
"""

import os
import stat
from collections.abc import Iterator, Mapping
from enum import IntEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, TypeAlias

from appliance.castore.directory_encoder import ENCODED_MAX, ENTRY_MIN, NODE_MIN
from appliance.castore.names import check_target, display
from appliance.errors import DirectoryError, ImportTreeError
from appliance.importer.beneath import DIRECTORY, FILE, SYMLINK, open_beneath, read_entries
from appliance.importer.roots import Identity, OpenRoot, identity_of, open_directory, reason

if TYPE_CHECKING:
    from appliance.importer.hasher_pool import HasherPool

_OPEN_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY
_ROOT_FLAGS: Final = os.O_PATH | os.O_DIRECTORY
_LETTERS: Final = {stat.S_IFREG: FILE, stat.S_IFDIR: DIRECTORY, stat.S_IFLNK: SYMLINK}
# Kinds that need no further look; symlinks need their targets.
_COMPLETE: Final = frozenset({FILE, DIRECTORY})
_REFUSED_KINDS: Final = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}
# Maximum number of steps, with files or not, to take ahead of the import.
_LOOKAHEAD_STEPS: Final = 4096

NO_EXCLUSIONS: Final[Mapping[Identity, str]] = MappingProxyType({})

# --- Listing a directory ---


def open_root(path: bytes) -> OpenRoot:
    """Open the path to import.

    Args:
        path: "/", or a path whose last component is neither empty nor "." nor "..".

    Raises:
        ImportTreeError: the path cannot be opened.
    """
    entry = path.rpartition(b"/")[2]
    parent = path.removesuffix(entry)
    try:
        directory = open_directory(parent)
        try:
            status = os.stat(entry or b".", dir_fd=directory, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                parent = path.rstrip(b"/") + b"/"
                directory, above = open_beneath(directory, entry, _ROOT_FLAGS), directory
                os.close(above)
                entry = b""
            return OpenRoot(directory, identity_of(os.fstat(directory)), parent, entry)
        except BaseException:
            os.close(directory)
            raise
    except OSError as exc:
        raise ImportTreeError(f"{display(path)}: {exc.strerror}") from exc


def list_directory(root: OpenRoot, path: bytes, excluded: Mapping[Identity, str]) -> list[bytes]:
    """Return the entries of a directory, sorted by name.

    Args:
        root: open.
        path: path of the directory, relative to the root.
        excluded: directories that must not be imported, each with the reason.

    Raises:
        ImportTreeError: the directory cannot be read, is excluded, is too large to be served, or
            has an entry that cannot be imported.
    """
    try:
        fd = open_beneath(root.directory, path, _OPEN_FLAGS)
    except OSError as exc:
        raise ImportTreeError(f"{root.describe(path)}: {reason(exc)}") from exc
    try:
        if (why := excluded.get(identity_of(os.fstat(fd)))) is not None:
            raise ImportTreeError(f"{root.describe(path)}: {why}")
        return _Listing(root, path, fd).read()
    except OSError as exc:
        raise ImportTreeError(f"{root.describe(path)}: {reason(exc)}") from exc
    finally:
        os.close(fd)


def list_entry(root: OpenRoot) -> bytes:
    """Return the entry of a root that is a file or symlink.

    Raises:
        ImportTreeError: it cannot be read or imported.
    """
    return _Listing(root, b"", root.directory).complete(root.entry + b"\0?")


def too_large(path: str, num_entries: int) -> ImportTreeError:
    """Return the error to raise for a directory that is too large to be served."""
    return ImportTreeError(
        f"{path}: its {num_entries} entries make a Directory of more than "
        f"{ENCODED_MAX >> 20} MiB, the most that can be served"
    )


class _Listing:
    """Lists the directory `path`, which is open as `fd`."""

    def __init__(self, root: OpenRoot, path: bytes, fd: int) -> None:
        self._root = root
        self._path = path
        self._fd = fd

    def read(self) -> list[bytes]:
        entries, least_bytes = self._names()
        num_entries = len(entries)
        entries.sort()
        for index, entry in enumerate(entries):
            if entry[-1] in _COMPLETE:
                least_bytes += NODE_MIN - ENTRY_MIN
            else:
                entries[index] = whole = self.complete(entry)
                # ENTRY_MIN has counted one byte of the target.
                least_bytes += max(len(whole) - len(entry) - 1, 0)
            if least_bytes > ENCODED_MAX:
                raise too_large(self._root.describe(self._path), num_entries)
        return entries

    def _names(self) -> tuple[list[bytes], int]:
        """Return the entries as they were listed, and a lower bound of their encoded size."""
        entries: list[bytes] = []
        num_entries = 0
        least_bytes = 0
        for some in read_entries(self._fd):
            num = some.count(b"/")
            num_entries += num
            # Beside its name, an entry has three bytes in `some`.
            least_bytes += len(some) + (ENTRY_MIN - 3) * num
            # Beyond the limit entries are only counted, for the error message.
            if least_bytes <= ENCODED_MAX:
                entries += some.split(b"/")
                entries.pop()
        if least_bytes > ENCODED_MAX:
            raise too_large(self._root.describe(self._path), num_entries)
        return entries, least_bytes

    def complete(self, entry: bytes) -> bytes:
        """Return an entry with its kind, looked up if it is not known, and its target."""
        name = entry[:-2]
        try:
            kind = entry[-1] if entry[-1] == SYMLINK else self._kind(name)
            target = self._target(name) if kind == SYMLINK else b""
        except OSError as exc:
            raise ImportTreeError(f"{self._describe(name)}: {reason(exc)}") from exc
        except DirectoryError as exc:
            raise ImportTreeError(f"{self._describe(name)}: {exc}") from exc
        return b"%b\0%c%b" % (name, kind, target)

    def _kind(self, name: bytes) -> int:
        mode = os.stat(name, dir_fd=self._fd, follow_symlinks=False).st_mode
        letter = _LETTERS.get(stat.S_IFMT(mode))
        if letter is None:
            kind = _REFUSED_KINDS.get(stat.S_IFMT(mode), "of an unsupported kind")
            raise ImportTreeError(
                f"{self._describe(name)}: is {kind}; "
                "only files, directories and symlinks can be imported"
            )
        return letter

    def _target(self, name: bytes) -> bytes:
        target = os.readlink(name, dir_fd=self._fd)
        return check_target(target)

    def _describe(self, name: bytes) -> str:
        return self._root.describe(b"%b/%b" % (self._path, name) if self._path else name)


# --- Walking a tree ---


class Step(IntEnum):
    """The kinds of steps of a walk."""

    FILE = 0
    SYMLINK = 1
    DIRECTORY = 2
    # The end of the entries of the innermost directory.
    END_DIRECTORY = 3


# One step of a walk: its kind, the name of the entry, and a detail. The detail of a symlink is its
# target; of a directory, its path relative to the root; of a file, the path of its directory.
Event: TypeAlias = tuple[Step, bytes, bytes]

_END: Final[Event] = (Step.END_DIRECTORY, b"", b"")


def walk(root: OpenRoot, excluded: Mapping[Identity, str] = NO_EXCLUSIONS) -> Iterator[Event]:
    """Yield the steps of a tree in the order of its NAR; the name of the root is empty.

    Args:
        root: must stay open until the end of the walk.
        excluded: directories that must not be imported, each with the reason.

    Raises:
        ImportTreeError: an entry is not a file, directory or symlink, is excluded, or cannot be
            read.
    """
    if root.entry:
        _, _, rest = list_entry(root).partition(b"\0")
        yield (Step.FILE, b"", b"") if rest[0] == FILE else (Step.SYMLINK, b"", rest[1:])
        return
    yield (Step.DIRECTORY, b"", b"")
    stack = [(b"", iter(list_directory(root, b"", excluded)))]
    while stack:
        path, entries = stack[-1]
        for entry in entries:
            name, _, rest = entry.partition(b"\0")
            kind = rest[0]
            if kind == FILE:
                yield (Step.FILE, name, path)
            elif kind == SYMLINK:
                yield (Step.SYMLINK, name, rest[1:])
            else:
                child = b"%b/%b" % (path, name) if path else name
                yield (Step.DIRECTORY, name, child)
                stack.append((child, iter(list_directory(root, child, excluded))))
                break
        else:
            yield _END
            stack.pop()


# --- Walking ahead of the import ---


class LookaheadWalk:
    """Walks a tree ahead of its import, and requests its files in the order of the walk.

    So the hashing processes read files while the import is still busy with earlier steps.

    Args:
        root: must stay open until the end of the walk.
        pool: from where files are requested; idle.
        excluded: directories that must not be imported, each with the reason.
    """

    def __init__(
        self, root: OpenRoot, pool: "HasherPool", excluded: Mapping[Identity, str] = NO_EXCLUSIONS
    ) -> None:
        self.root = root
        self._walk = walk(root, excluded)
        self._pool = pool
        self._events: list[Event] = []
        pool.begin_root(root)

    def __iter__(self) -> Iterator[Event]:
        """Yield the steps of the walk.

        Raises:
            ImportTreeError: something in the tree cannot be imported.
            HasherEndedError: a hashing process has ended.
        """
        while self.walk_on():
            # Walk on after the first half: the hashing processes still have the second one to do.
            events, self._events = self._events, []
            middle = len(events) // 2
            yield from events[:middle]
            self.walk_on()
            yield from events[middle:]

    def walk_on(self) -> bool:
        """Take steps until there are enough ahead of the import; return whether there are any.

        Raises:
            ImportTreeError: something in the tree cannot be imported.
            HasherEndedError: a hashing process has ended.
        """
        pool, events = self._pool, self._events
        while len(events) < _LOOKAHEAD_STEPS and pool.has_room():
            event = next(self._walk, None)
            if event is None:
                break
            step, name, detail = event
            if step is Step.FILE:
                pool.request(detail, name or self.root.entry)
            events.append(event)
        pool.send()
        return bool(events)
