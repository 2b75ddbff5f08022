"""Which small files are likely to be read after one that is: those after it in its directory."""

from collections import OrderedDict
from collections.abc import Iterator
from itertools import pairwise
from typing import Final, NamedTuple

from appliance.castore.digest import Digest
from appliance.castore.directory import Directory
from appliance.store.schema import INLINE_MAX

# Directories, files and sub-directories remembered; some 300 bytes each.
_REMEMBERED_MAX: Final = 1 << 16
# How many are named at a time: few in a directory of which nothing was missed yet, as who opens one
# file need not want others; twice as many each time, as who misses one after another reads on.
_WINDOW_MIN: Final = 8
_WINDOW_MAX: Final = 64
_MISSES_MAX: Final = 8
_READ_ON_MISSES: Final = 3
# Directories looked at for files to name, and levels gone up from one to another.
_FOLLOWING_MAX: Final = 64
_DEPTH_MAX: Final = 64

SmallFile = tuple[Digest, int]


class _Place(NamedTuple):
    directory: Digest
    position: int


class _Siblings:
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
        """Whether so much was missed that whoever reads will go on to the next directory."""
        return self.num_missed >= min(_READ_ON_MISSES, len(self.files))

    def take(self, end: int) -> tuple[SmallFile, ...]:
        """Return the files up to before `end` that were not returned before."""
        first, self.reached = self.reached, max(self.reached, min(end, len(self.files)))
        return self.files[first : self.reached]


class SmallFiles:
    """The small files of the directories that were seen last.

    Args:
        bytes_max: the sizes of what is named at a time add up to no more.
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._directories: OrderedDict[Digest, _Siblings] = OrderedDict()
        self._next: dict[Digest, Digest] = {}
        self._above: dict[Digest, Digest] = {}
        self._places: dict[Digest, _Place] = {}
        self._num_remembered = 0

    def add(self, digest: Digest, directory: Directory) -> None:
        """Remember the files of a directory, and the order of its sub-directories."""
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
        """Return what to fetch too when a file is missed; each once, while that works.

        Args:
            digest: of the file.
            is_under_way: it was named and is being fetched. Otherwise, if it was named, it did not
                come, or was evicted: and so may what was named after it.
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
        # As far as they are known, in the order of who enters a directory when its files are read.
        # Equal directories are in several places, of which one is remembered: so this may go round.
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
