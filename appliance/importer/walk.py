"""The entries of one directory, sorted, with the targets of its symlinks.

An entry is its name, NUL, a letter for its kind, and the target of a symlink: a directory of a
million entries takes little more than its names.
"""

import os
import stat
from collections.abc import Iterator, Mapping
from enum import IntEnum
from types import MappingProxyType
from typing import Final, TypeAlias

from appliance.castore.directory_encoder import ENCODED_MAX, ENTRY_MIN, NODE_MIN
from appliance.castore.names import check_target, display
from appliance.errors import DirectoryError, ImportTreeError
from appliance.importer.beneath import DIRECTORY, FILE, SYMLINK, open_beneath, read_entries
from appliance.importer.hasher_pool import HasherPool
from appliance.importer.roots import Identity, OpenRoot, identity_of, open_directory, reason

_OPEN_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY
_ROOT_FLAGS: Final = os.O_PATH | os.O_DIRECTORY
_LETTERS: Final = {stat.S_IFREG: FILE, stat.S_IFDIR: DIRECTORY, stat.S_IFLNK: SYMLINK}
_NODES: Final = frozenset({FILE, DIRECTORY})
_KINDS: Final = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


def open_root(path: bytes) -> OpenRoot:
    """Open the path to import; its last part is a name, unless it is `/`.

    Raises:
        ImportTreeError: it cannot be opened.
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
    """Return the entries of the directory `path`, relative to the root.

    Raises:
        ImportTreeError: it cannot be read, is one of `excluded`, is too large to be served, or has
            something that cannot be imported.
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
    """Return the entry of a root that is no directory.

    Raises:
        ImportTreeError: it cannot be read, or not be imported.
    """
    return _Listing(root, b"", root.directory).complete(root.entry + b"\0?")


def too_large(path: str, num_entries: int) -> ImportTreeError:
    """Return the error of a directory that is too large to be served."""
    return ImportTreeError(
        f"{path}: its {num_entries} entries make a Directory of more than "
        f"{ENCODED_MAX >> 20} MiB, the most that can be served"
    )


class _Listing:
    """The directory `path`, by the descriptor `fd`."""

    def __init__(self, root: OpenRoot, path: bytes, fd: int) -> None:
        self._root = root
        self._path = path
        self._fd = fd

    def read(self) -> list[bytes]:
        entries, least_bytes = self._names()
        num_entries = len(entries)
        entries.sort()
        for index, entry in enumerate(entries):
            if entry[-1] in _NODES:
                least_bytes += NODE_MIN - ENTRY_MIN
            else:
                entries[index] = whole = self.complete(entry)
                # A target of one byte was counted.
                least_bytes += max(len(whole) - len(entry) - 1, 0)
            if least_bytes > ENCODED_MAX:
                raise too_large(self._root.describe(self._path), num_entries)
        return entries

    def _names(self) -> tuple[list[bytes], int]:
        """Return the entries as they were listed, and the least that they take in the encoding."""
        entries: list[bytes] = []
        num_entries = 0
        least_bytes = 0
        for some in read_entries(self._fd):
            num = some.count(b"/")
            num_entries += num
            # Each name comes with three bytes.
            least_bytes += len(some) + (ENTRY_MIN - 3) * num
            # Beyond the limit they are only counted.
            if least_bytes <= ENCODED_MAX:
                entries += some.split(b"/")
                entries.pop()
        if least_bytes > ENCODED_MAX:
            raise too_large(self._root.describe(self._path), num_entries)
        return entries, least_bytes

    def complete(self, entry: bytes) -> bytes:
        """Return an entry with its kind, if that is not known yet, and its target."""
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
            kind = _KINDS.get(stat.S_IFMT(mode), "of an unknown kind")
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


# --- Walking a tree in the order of its NAR, without recursion and without following symlinks.


class Step(IntEnum):
    """What the walk has come to."""

    FILE = 0
    SYMLINK = 1
    DIRECTORY = 2
    # The directory's entries are all done.
    END_DIRECTORY = 3


# One step of the walk: its kind, the name, and a detail. That is the target of a symlink; the path
# of a directory, relative to the root; or of a file, the path of the directory that it is in.
Event: TypeAlias = tuple[Step, bytes, bytes]

NOTHING: Final[Mapping[Identity, str]] = MappingProxyType({})

_END: Final[Event] = (Step.END_DIRECTORY, b"", b"")


def walk(root: OpenRoot, excluded: Mapping[Identity, str] = NOTHING) -> Iterator[Event]:
    """Yield the steps of a tree; the root itself comes with an empty name.

    Args:
        root: open until the end of the walk.
        excluded: directories that the walk must not come to, and why.

    Raises:
        ImportTreeError: something is neither file, directory nor symlink, is excluded, or cannot be
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


# --- The walk of a tree, so far ahead of its import that the hashing processes have work.

# Steps of the walk taken ahead of the one in hand, files or not.
_AHEAD_MAX: Final = 4096


class WalkAhead:
    """Walks the tree `root`, and asks `pool` for its files in the order of the walk.

    Args:
        root: open until the end of the walk.
        pool: idle.
        excluded: see `walk`.
    """

    def __init__(
        self, root: OpenRoot, pool: HasherPool, excluded: Mapping[Identity, str] = NOTHING
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
            # The hashing processes have work for the second half while the walk goes on.
            events, self._events = self._events, []
            middle = len(events) // 2
            yield from events[:middle]
            self.walk_on()
            yield from events[middle:]

    def walk_on(self) -> bool:
        """Walk until enough is ahead; return whether anything is.

        Raises:
            ImportTreeError: something in the tree cannot be imported.
            HasherEndedError: a hashing process has ended.
        """
        pool, events = self._pool, self._events
        while len(events) < _AHEAD_MAX and pool.has_room():
            event = next(self._walk, None)
            if event is None:
                break
            step, name, detail = event
            if step is Step.FILE:
                pool.request(detail, name or self.root.entry)
            events.append(event)
        pool.send()
        return bool(events)
