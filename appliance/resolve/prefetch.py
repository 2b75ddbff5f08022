"""Reading ahead: which small files are likely to be wanted after one that was just missed.

This module only names files. `ClosureLoader` tells it what is below a store path, `ContentLoader`
what was missed, and `BlobFetcher` fetches what it names.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from appliance.castore.digest import Digest
from appliance.castore.directory import Directory
from appliance.castore.names import display
from appliance.store.schema import INLINE_MAX

# --- Theory of operation ---
#
# A guest asks for one thing at a time, and what is not here costs it a round trip to the peer. So
# whatever it asks for, that which follows in a walk is requested with it, in one of two forms:
#
# - Directories come as closures (see `closure_loader`): the one that is wanted and all below it, in
#   one answer. After the first round trip, a walk waits for the bandwidth only.
# - Small files follow each other in the order of a walk: the files of a directory by name, then its
#   subdirectories, depth first. This module has that order for each path, as a list. A *reader* is
#   a range of places in such a list: those that have been named since it began. A miss within the
#   range, or right behind it, moves it on: the window, the number of places that it shall be ahead
#   of the miss, doubles from `_WINDOW_MIN` to `_WINDOW_MAX`, and what this adds to the range is
#   named. A miss elsewhere is a reader of its own, which says little yet, so its window is small.
#
# Only misses are seen here: reads that the cache answers are not. A reader that goes on comes to
# the end of its range and misses there, and waits for one round trip; but each time the range is
# twice as long, so a walk through n files waits log(n) times. A miss within the range is a file
# that is on its way, and moves the range on before its end is reached. If a file within the range
# is missed and is not on its way, then it failed or was evicted, and so may those after it: the
# range begins anew behind it.
#
# Small files are those that fit into a record of the cache: a wrong guess costs little. Large ones
# and empty ones have their places, but are not named.
#
# What bounds it: `bytes_max` in all files of a window, and thus a share of the cache, so that
# guesses evict little; `_READERS_MAX` readers for each path; `_FILES_MAX` files remembered in all,
# where whole paths are forgotten, the least recently used first.
#
# Why it never delays what somebody waits for: the files are fetched as `BackgroundWork` of the
# fetcher. That begins after the fetch of the missed file. It starts nothing while a fetch is under
# way that a guest waits for (during the first 50 ms of that fetch: a slower one waits for its peer
# and not for this process), and takes none of the places of other fetches, gives up if the cache
# has no room, and drops its errors. A guest that wants a file which is being fetched ahead waits
# for that fetch; there is no second one.

_WINDOW_MIN: Final = 8
_WINDOW_MAX: Final = 512
_READERS_MAX: Final = 8
# Some 250 bytes each.
_FILES_MAX: Final = 1 << 17

SmallFile = tuple[Digest, int]


class _File(NamedTuple):
    digest: Digest
    size: int
    name: bytes
    # Position of its directory in `_Path.directories`.
    directory: int


class _Directory(NamedTuple):
    name: bytes
    # Position of the directory above it; its own for the root.
    above: int


@dataclass(slots=True)
class _Reader:
    """Somebody who reads files in order: those from `start` to before `end` have been named."""

    start: int
    end: int
    window: int


@dataclass(slots=True)
class _Path:
    """The files of one path in the order of a walk; `readers` has the latest one last."""

    files: list[_File] = field(default_factory=list)
    directories: list[_Directory] = field(default_factory=list)
    readers: list[_Reader] = field(default_factory=list)


class ReadAhead:
    """The files of the paths that were used last, in the order of a walk through each.

    Args:
        bytes_max: the most bytes that the files named after one miss have in all.
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._paths: OrderedDict[Digest, _Path] = OrderedDict()
        # Of equal files in several places, the one that was remembered last.
        self._places: dict[Digest, tuple[Digest, int]] = {}
        self._num_files = 0

    def add(self, root: Digest, name: bytes, directories: Mapping[Digest, Directory]) -> None:
        """Remember the files below a directory, in place of what was known of it.

        Args:
            root: the directory.
            name: its name, for messages; a store path's, or empty if it is not known.
            directories: itself and those below it, as far as they are known.
        """
        self._forget(root)
        path = _Path()
        for file in _walk(root, name, directories, path.directories):
            if len(path.files) == _FILES_MAX:
                break
            self._places[file.digest] = (root, len(path.files))
            path.files.append(file)
        self._paths[root] = path
        self._num_files += len(path.files)
        while self._num_files > _FILES_MAX:
            self._forget(next(iter(self._paths)))

    def after(self, digest: Digest, *, is_under_way: bool) -> list[SmallFile]:
        """Return the files to fetch ahead when a file is missed.

        Args:
            digest: the digest of the missed file.
            is_under_way: the file is being fetched already.
        """
        place = self._places.get(digest)
        if place is None:
            return []
        root, position = place
        self._paths.move_to_end(root)
        path = self._paths[root]
        reader = _reader_at(path, position)
        if position < reader.end and not is_under_way:
            reader.end = position
        reader.start = max(reader.start, position - _WINDOW_MAX)
        first = max(reader.end, position + 1)
        reader.end = max(first, min(position + 1 + reader.window, len(path.files)))
        reader.window = min(2 * reader.window, _WINDOW_MAX)
        named = list(self._within_bytes(path.files[first : reader.end]))
        return [(file.digest, file.size) for file in named if 0 < file.size <= INLINE_MAX]

    def place_of(self, digest: Digest) -> str:
        """Return where a file is, for messages: one of its places, or nothing if none is known."""
        place = self._places.get(digest)
        if place is None:
            return ""
        root, position = place
        path = self._paths[root]
        file = path.files[position]
        names = [file.name]
        at = file.directory
        while path.directories[at].above != at:
            names.append(path.directories[at].name)
            at = path.directories[at].above
        names.append(path.directories[at].name or b"...")
        return display(b"/".join(reversed(names)))

    def _within_bytes(self, files: list[_File]) -> Iterator[_File]:
        left = self._bytes_max
        for file in files:
            if file.size <= INLINE_MAX:
                left -= file.size
            if left < 0:
                return
            yield file

    def _forget(self, root: Digest) -> None:
        path = self._paths.pop(root, None)
        if path is None:
            return
        self._num_files -= len(path.files)
        for file in path.files:
            place = self._places.get(file.digest)
            if place is not None and place[0] == root:
                del self._places[file.digest]


def _reader_at(path: _Path, position: int) -> _Reader:
    for number, reader in enumerate(path.readers):
        if reader.start <= position <= reader.end:
            path.readers.append(path.readers.pop(number))
            return reader
    if len(path.readers) == _READERS_MAX:
        del path.readers[0]
    path.readers.append(_Reader(position, position, _WINDOW_MIN))
    return path.readers[-1]


def _walk(
    root: Digest,
    name: bytes,
    known: Mapping[Digest, Directory],
    directories: list[_Directory],
) -> Iterator[_File]:
    # Each directory once, however often it is there: its files are the same. It is put into
    # `directories` before its files are yielded.
    seen = {root}
    stack = [(root, name, 0)]
    while stack:
        digest, its_name, above = stack.pop()
        directory = known.get(digest)
        if directory is None:
            continue
        index = len(directories)
        directories.append(_Directory(its_name, above))
        for file in directory.files:
            yield _File(file.digest, file.size, file.name, index)
        below = [node for node in directory.directories if node.digest not in seen]
        seen.update(node.digest for node in below)
        stack.extend((node.digest, node.name, index) for node in reversed(below))
