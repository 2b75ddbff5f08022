"""Guesses which small files are read next: those after a file that was just missed.

This module only names files. `ContentLoader` tells it what it loads, and has `BlobFetcher` fetch
the files that it names.
"""

from collections import OrderedDict
from collections.abc import Iterator
from itertools import pairwise
from typing import Final, NamedTuple

from appliance.castore.digest import Digest
from appliance.castore.directory import Directory
from appliance.store.schema import INLINE_MAX

# Directories, files and subdirectories remembered, together; some 300 bytes each.
_REMEMBERED_MAX: Final = 1 << 16
# Files named at a time. Start with 8: opening one file says little. Double on each further miss in
# the directory, which suggests a sequential reader.
_WINDOW_MIN: Final = 8
_WINDOW_MAX: Final = 64
# Misses counted per directory; more change nothing.
_MISSES_MAX: Final = 8
# After this many misses in a directory, or one for each file that it has, the reader is expected to
# go on to the next directory.
_READ_ON_MISSES: Final = 3
# Directories visited to name files after one miss, and levels climbed to get from one to the next.
_FOLLOWING_MAX: Final = 64
_DEPTH_MAX: Final = 64

SmallFile = tuple[Digest, int]


class _Place(NamedTuple):
    """Where a file stands: `position` among the small files of a directory."""

    directory: Digest
    position: int


class _Siblings:
    """The small files and the subdirectories of a directory, in their order.

    `num_missed` counts the misses here; the files before `reached` have been named.
    """

    __slots__ = ("below", "files", "num_missed", "reached")

    def __init__(self, directory: Directory) -> None:
        self.files = tuple(
            (node.digest, node.size) for node in directory.files if 0 < node.size <= INLINE_MAX
        )
        self.below = tuple(dict.fromkeys(node.digest for node in directory.directories))
        self.num_missed = 0
        self.reached = 0

    def num_remembered(self) -> int:
        return 1 + len(self.files) + len(self.below)

    def window(self) -> int:
        """Return how many files to name after a missed one."""
        return min(_WINDOW_MIN << (self.num_missed - 1), _WINDOW_MAX)

    def is_read_on(self) -> bool:
        """Return whether enough was missed to expect the reader to go on to the next directory."""
        return self.num_missed >= min(_READ_ON_MISSES, len(self.files))

    def take(self, end: int) -> tuple[SmallFile, ...]:
        """Return the files before position `end` that were not returned before."""
        first, self.reached = self.reached, max(self.reached, min(end, len(self.files)))
        return self.files[first : self.reached]


# --- Theory of operation ---
#
# Reading a tree of small files from a service costs one round trip for each file: the guest asks
# for the next file only after it has the last one. Fetching the next files while the first one is
# on its way hides those round trips.
#
# What is guessed: blobs that fit into a record of the cache (`INLINE_MAX` bytes), for which a wrong
# guess costs little. Empty ones need no fetch.
#
# From what: from the order of names in the Directories that were loaded, and from misses. A miss is
# a file that a worker wants because the cache lacks it. The guess is that the reader goes through
# the directory in the order of names. Reads that the cache answers are not seen here.
#
# How far ahead: 8 files after the first miss in a directory; 16, 32 and then 64 after each further
# one. Every file is named once: a miss of a file that is being fetched already moves the window on
# by what it has grown. If a named file is missed and is not being fetched, then it failed or was
# evicted, and so may have been the files after it: these are named again. After three misses in a
# directory, the window continues into the directories that a depth-first walk visits next: into
# the first subdirectory, else to the next one beside it, else to the next one beside a parent.
# They inherit the number of misses, so a walk through many small directories keeps its pace.
#
# What bounds it: 64 files for each miss, and `bytes_max` bytes in all of them (at most 1 MiB and a
# sixteenth of the cache, so that guesses evict little); 64 directories visited and 64 levels
# climbed, as equal directories in several places make the walk go round; 65,536 directories and
# files remembered, the least recently used directory forgotten first.
#
# Why it never delays what somebody waits for: the files are fetched as `BackgroundWork` of the
# fetcher. That begins after the fetch of the missed file. It starts nothing while a fetch is under
# way that a guest waits for (during the first 50 ms of that fetch: a slower one waits for its peer
# and not for this process), and runs at most 16 fetches at a time. These take none of the places of
# other fetches, give up if the cache has no room, and drop their errors. A guest that wants a file
# which is being fetched ahead waits for that fetch; there is no second one.


class SmallFiles:
    """The small files of the directories that were loaded last.

    Args:
        bytes_max: the most bytes that the files named after one miss have in all.
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._directories: OrderedDict[Digest, _Siblings] = OrderedDict()
        self._next: dict[Digest, Digest] = {}
        self._above: dict[Digest, Digest] = {}
        self._places: dict[Digest, _Place] = {}
        self._num_remembered = 0

    def add(self, digest: Digest, directory: Directory) -> None:
        """Remember the files of a directory, and the order of its subdirectories."""
        if digest in self._directories:
            return
        siblings = self._directories[digest] = _Siblings(directory)
        self._num_remembered += siblings.num_remembered()
        for position, (file_digest, _size) in enumerate(siblings.files):
            self._places[file_digest] = _Place(digest, position)
        self._next.update(pairwise(siblings.below))
        self._above.update(dict.fromkeys(siblings.below, digest))
        while self._num_remembered > _REMEMBERED_MAX and len(self._directories) > 1:
            self._forget_oldest()

    def after(self, digest: Digest, *, is_under_way: bool) -> list[SmallFile]:
        """Return the files to fetch ahead when a file is missed; each is returned once.

        Args:
            digest: the digest of the missed file.
            is_under_way: the file is being fetched already. Otherwise, if it was named before, its
                fetch failed or it was evicted, and the files after it are named again.
        """
        place = self._places.get(digest)
        if place is None:
            return []
        self._directories.move_to_end(place.directory)
        siblings = self._directories[place.directory]
        start = place.position + 1
        siblings.reached = max(start, siblings.reached) if is_under_way else start
        return list(self._within_bytes(self._named(place.directory, siblings, start)))

    def _named(self, digest: Digest, siblings: _Siblings, start: int) -> Iterator[SmallFile]:
        siblings.num_missed = min(siblings.num_missed + 1, _MISSES_MAX)
        left = start + siblings.window()
        yield from siblings.take(left)
        if not siblings.is_read_on():
            return
        num_missed = siblings.num_missed
        for following in self._following(digest):
            left -= len(siblings.files)
            if left <= 0:
                return
            siblings = following
            siblings.num_missed = max(siblings.num_missed, num_missed)
            yield from siblings.take(left)

    def _following(self, digest: Digest) -> Iterator[_Siblings]:
        # Depth first, as far as directories are known. An equal directory in several places is
        # remembered in one of them, so this may go round.
        at: Digest | None = digest
        for _ in range(_FOLLOWING_MAX):
            siblings = self._directories.get(at) if at is not None else None
            if siblings is None or at is None:
                return
            if at != digest:
                yield siblings
            at = siblings.below[0] if siblings.below else self._beside(at)

    def _beside(self, digest: Digest) -> Digest | None:
        for _ in range(_DEPTH_MAX):
            if digest in self._next:
                return self._next[digest]
            if digest not in self._above:
                return None
            digest = self._above[digest]
        return None

    def _within_bytes(self, files: Iterator[SmallFile]) -> Iterator[SmallFile]:
        left = self._bytes_max
        for digest, size in files:
            left -= size
            if left < 0:
                return
            yield digest, size

    def _forget_oldest(self) -> None:
        digest, siblings = self._directories.popitem(last=False)
        self._num_remembered -= siblings.num_remembered()
        for below in siblings.below:
            self._next.pop(below, None)
            self._above.pop(below, None)
        for file_digest, _size in siblings.files:
            place = self._places.get(file_digest)
            if place is not None and place.directory == digest:
                del self._places[file_digest]
